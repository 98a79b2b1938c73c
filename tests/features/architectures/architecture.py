"""What an entry of the list is, and how its model is built, called and given padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Any] | tuple[Any, ...]
Pooling = str | Callable[[Tensor, Tensor | None], Tensor]
Layers = str | list[str]

WITH_CLS, WITHOUT_CLS = ("cls", "mean", "tokens"), ("mean", "tokens")
BIDIRECTIONAL, CAUSAL = (*WITH_CLS, "last"), (*WITHOUT_CLS, "last")

# What an argument with an axis of tokens has in padding.
PADDING = {
    **dict.fromkeys(("input_ids", "decoder_input_ids"), 7),
    **dict.fromkeys(("attention_mask", "decoder_attention_mask"), 0),
    **dict.fromkeys(("token_type_ids", "mm_token_type_ids", "bbox"), 0),
    **dict.fromkeys(("input_values", "input_features", "src"), 0.0),
    "labels": -100,
    "src_key_padding_mask": True,
}


@dataclass(frozen=True)
class Architecture:
    """A small model in which training mode is not random, and how the regulariser is used."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    layers: Layers
    poolings: tuple[Pooling, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the regulariser
    stride: int = 1  # steps of the input per token of the layers: padding is a multiple of it
    left: bool = False  # padding may also be on the left: positions are relative
    reads_padding: str = ""  # what in the model itself lets padding change valid tokens
    needs: str = "transformers"


def call(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def has_mask(batch: Batch) -> bool:
    """Whether the batch says which of its tokens are valid."""
    if isinstance(batch, tuple):
        return any(isinstance(part, dict) and has_mask(part) for part in batch)
    return not {"attention_mask", "src_key_padding_mask"}.isdisjoint(batch)


def padded(batch: Batch, count: int, left: bool = False) -> Batch:
    """The batch with ``count`` more tokens in each row, all of them masked."""
    if isinstance(batch, tuple):
        return tuple(padded(part, count, left) for part in batch)
    sides = (count, 0) if left else (0, count)
    longer = {}
    for name, value in batch.items():
        if name in PADDING and value.dim() < 4:  # CLAP's features have no mask
            inner = (0, 0) * (value.dim() - 2)
            value = nn.functional.pad(value, (*inner, *sides), value=PADDING[name])
        longer[name] = value
    return longer


def without_dropout(config: Any) -> Any:
    """A configuration of transformers in which nothing is random in training mode."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
        elif name == "mask_time_prob":  # SpecAugment
            config.mask_time_prob = 0.0
    return config


def build(model_type: str, head: str, sizes: Mapping[str, Any]) -> nn.Module:
    """A model of transformers, of this class or of what an ``Auto`` class makes."""
    import transformers

    config = without_dropout(transformers.AutoConfig.for_model(model_type, **sizes))
    model_class = getattr(transformers, head)
    return (model_class.from_config if head.startswith("Auto") else model_class)(config)


def pretrained(
    model_type: str,
    sizes: Mapping[str, Any],
    batch: Callable[[], Batch],
    layers: Layers,
    poolings: tuple[Pooling, ...],
    head: str = "AutoModel",
    **fields: Any,
) -> Architecture:
    """An entry for a model of transformers."""
    return Architecture(partial(build, model_type, head, sizes), batch, layers, poolings, **fields)


def channels_last(output: Tensor, _mask: Tensor | None) -> Tensor:
    """Rows of (batch, ..., D)."""
    return output.flatten(0, -2)


def channels_first(output: Tensor, _mask: Tensor | None) -> Tensor:
    """Rows of (batch, D, ...)."""
    return output.movedim(1, -1).flatten(0, -2)


def sequence_first(output: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of (tokens, batch, D): means over the valid tokens."""
    if mask is None:
        return output.mean(0)
    weights = mask.T.unsqueeze(-1).to(output.dtype)
    return (output * weights).sum(0) / weights.sum(0)
