"""Which axis of a layer's output is what: the poolings' reading of it is checked, not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layer_names import paths_to

_SEQUENCE_MODULES = (nn.MultiheadAttention, nn.RNNBase)  # what batch_first is an attribute of
_SEQUENCE_CONTAINERS = (
    *_SEQUENCE_MODULES,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_AXES = (3, 4, 5)  # numbers of axes of the outputs whose channels are looked for
_CHANNELS_FIRST = ("batchnorm", "groupnorm", "instancenorm", "2d")  # in names of norms


class LayerAxes:
    """What is known of the axes of one layer's output, from the modules around it.

    Modules declare the width of the axis that they act on: convolutions and batch norms of axis 1,
    linear layers and layer norms of the last axis. The nearest enclosing module that declares a
    width of the output tells which of the two has its channels.
    """

    def __init__(self, name: str, enclosing: list[nn.Module], widths: list[_Widths]) -> None:
        self.name = name
        self._widths = widths
        self._is_leaf = not any(True for _ in enclosing[0].children())
        inside = [module for module in enclosing if isinstance(module, _SEQUENCE_CONTAINERS)]
        self._sequence_first = next((type(m).__name__ for m in inside if _is_sequence_first(m)), "")
        # A model as a whole may permute axes anywhere.
        self._is_ambiguous = any(map(_is_sequence_first, enclosing[:-1] or enclosing))

    def check(self, shape: tuple[int, ...], batch_sizes: frozenset[int]) -> None:
        """Refuse an output whose axes are not those that the poolings take them for.

        Args:
            shape: of the output. Its first axis must be the batch; its channels must be the last
                axis of three, and axis 1 of more.
            batch_sizes: the sizes of the first axes of the model's inputs; empty if unknown.

        Raises:
            ValueError: what was seen, with an example of a callable pooling.
        """
        if len(shape) == 3 and self._sequence_first:
            self._refuse(
                shape,
                f"it is of an nn.{self._sequence_first} with batch_first=False, so it is "
                "(tokens, batch, D)",
                "x.mean(0)",
            )
        if batch_sizes and shape[0] not in batch_sizes:
            self._refuse_first_axis(shape, batch_sizes)
        if len(shape) == 3 and self._is_ambiguous:
            self._check_square(shape, batch_sizes)
        channels = self._channel_axis(shape)
        if len(shape) == 3 and channels == 1:
            seen = f"the modules around it have {shape[1]} channels in axis 1: (batch, C, L)"
            self._refuse(shape, seen, "x.mean(2)")
        if len(shape) > 3 and channels == -1:
            seen = f"the modules around it have {shape[-1]} channels in the last axis"
            self._refuse(shape, seen, f"x.flatten(1, {len(shape) - 2}).mean(1)")

    def _channel_axis(self, shape: tuple[int, ...]) -> int | None:
        """1 or -1; None where modules declare neither or both."""
        if len(shape) not in _AXES:
            return None
        axes, one, last = len(shape), shape[1], shape[-1]
        is_pending = False
        for widths in self._widths:  # of the layer, of its parent, and so on
            is_first, is_last = widths.has_first(one, axes), widths.has_last(last, axes)
            if is_first and is_last:
                return -1 if shape[-3] == shape[-2] != last else None  # (batch, H, H, C)
            # Convolutions may run between two transpositions, and layers may make gates.
            is_own = self._is_leaf and widths is self._widths[0]
            if is_first and (is_own or not widths.has_first(last, axes)):
                return 1
            if is_last and (one == last or not widths.has_last(one, axes)):
                return -1
            is_pending |= is_first or is_last
        if not is_pending:
            return None
        if is_first:
            return 1
        return None if shape[-2] == last else -1  # (batch, C, W, W)

    def _refuse_first_axis(self, shape: tuple[int, ...], batch_sizes: frozenset[int]) -> None:
        sizes = " or ".join(map(str, sorted(batch_sizes)))
        seen = f"its first axis is not the batch: the model's inputs have {sizes} rows"
        if len(shape) == 3 and shape[1] in batch_sizes:
            self._refuse(shape, f"{seen}, as its second axis: (tokens, batch, D)", "x.mean(0)")
        spatial = tuple(range(2, len(shape)))
        rows = {2: "x", 3: "x.mean(1)"}.get(len(shape), f"x.mean({spatial})")
        self._refuse(shape, f"{seen} (windows, frames and positions are not rows)", rows)

    def _check_square(self, shape: tuple[int, ...], batch_sizes: frozenset[int]) -> None:
        """Refuse (n, n, D) near attention that has tokens first, until a batch tells them apart."""
        if shape[0] == shape[1]:
            self._refuse(
                shape,
                "an nn.MultiheadAttention or RNN with batch_first=False is around it, and its "
                "first two axes are equal, so which one is the batch is not known",
                "x[:, 0]",
            )
        self._is_ambiguous = not batch_sizes or shape[1] in batch_sizes

    def _refuse(self, shape: tuple[int, ...], seen: str, rows: str) -> None:
        raise ValueError(
            f"the output of layer {self.name!r} must be (batch, D), (batch, tokens, D), "
            f"(batch, C, H, W) or (batch, C, T, H, W) for a pooling by name; got {shape}, and "
            f"{seen}. Choose another layer, or make rows (rows, D) yourself: "
            f"pooling=lambda x, mask: {rows}"
        )


def layer_axes(names: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, LayerAxes]:
    """The axes of each named layer; ``modules`` are all of the model, by name, the model as ""."""
    widths: dict[str, _Widths] = {}
    axes = {}
    for name in names:
        paths = paths_to(name)[::-1]
        for outer in paths:
            if outer not in widths:
                widths[outer] = _Widths.of(modules[outer])
        axes[name] = LayerAxes(
            name, [modules[outer] for outer in paths], [widths[outer] for outer in paths]
        )
    return axes


def _is_sequence_first(module: nn.Module) -> bool:
    """Whether a module has attention or an RNN that takes (tokens, batch, D)."""
    return any(not m.batch_first for m in module.modules() if isinstance(m, _SEQUENCE_MODULES))


class _Widths(NamedTuple):
    """The widths that a module, and those in it, declare for the axes that they act on."""

    first: frozenset[tuple[int, int]]  # (number of axes, width of axis 1)
    last: frozenset[int]

    def has_first(self, width: int, axes: int) -> bool:
        """Whether axis 1 may be channels; also those of images that have become tokens."""
        return any((more, width) in self.first for more in _AXES if more >= axes)

    def has_last(self, width: int, axes: int) -> bool:
        """Whether the last axis may be channels; also those of images that have become tokens."""
        return width in self.last or any(
            (more, width) in self.first for more in _AXES if more > axes
        )

    @classmethod
    def of(cls, module: nn.Module) -> _Widths:
        first: set[tuple[int, int]] = set()
        last: set[int] = set()
        for inner in module.modules():
            axes, declared = _declared(inner)
            widths = [width for width in declared if isinstance(width, int)]
            if axes:
                first.update((number, width) for number in axes for width in widths)
            else:
                last.update(widths)
        return cls(frozenset(first), frozenset(last))


def _declared(module: nn.Module) -> tuple[tuple[int, ...], tuple[object, ...]]:
    """The numbers of axes of outputs whose axis 1 a module acts on, none for the last; widths."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return (len(module.kernel_size) + 2,), (module.in_channels, module.out_channels)
    if isinstance(module, nn.MultiheadAttention):
        return (), (module.embed_dim,)
    if isinstance(module, nn.RNNBase):
        return (), (module.proj_size, module.hidden_size, 2 * module.hidden_size)
    kind = type(module).__name__.lower()
    if "norm" in kind and (shape := _normalized(module)):
        is_first = getattr(module, "data_format", "") == "channels_first"  # of ConvNeXt
        if is_first or any(part in kind for part in _CHANNELS_FIRST):
            axes = next((axes for axes in _AXES if f"{axes - 2}d" in kind), None)
            return (axes,) if axes else _AXES, shape
        return (), shape
    names = ("in_features", "out_features", "embedding_dim")
    return (), tuple(getattr(module, name, None) for name in names)


def _normalized(module: nn.Module) -> tuple[int, ...]:
    """The width of the one axis that a norm acts on; empty if unknown."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        shape: Any = tuple(weight.shape)
    else:  # a norm without parameters
        shape = getattr(module, "normalized_shape", None) or getattr(module, "num_features", None)
    if isinstance(shape, int):
        return (shape,)
    return tuple(shape) if isinstance(shape, tuple | list) and len(shape) == 1 else ()
