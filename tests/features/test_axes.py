"""Outputs whose axes are not those that the poolings take them for are refused, and no others."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rift_kernels.features.axes import LayerAxes, layer_axes
from rift_kernels.features.hooks import Call, first_tensor
from rift_kernels.features.layer_names import modules_by_name

BATCH, TOKENS, WIDTH = 6, 5, 16
SEQUENCE_FIRST = torch.randn(TOKENS, BATCH, WIDTH)
BATCH_FIRST = torch.randn(BATCH, TOKENS, WIDTH)


def outputs(model: nn.Module, *inputs: object, **keywords: object) -> dict[str, Tensor]:
    """The output of each module, as a capture takes it."""
    captured: dict[str, Tensor] = {}

    def hook(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            captured.pop(name, None)
        else:
            captured[name] = tensor

    modules = modules_by_name(model)
    handles = [m.register_forward_hook(functools.partial(hook, n)) for n, m in modules.items()]
    with torch.no_grad():
        model(*inputs, **keywords)
    for handle in handles:
        handle.remove()
    return captured


def axes_of(model: nn.Module, layer: str = "") -> LayerAxes:
    return layer_axes([layer], modules_by_name(model))[layer]


def checked(model: nn.Module, x: Tensor, layer: str = "", batch: int = BATCH) -> Tensor:
    output = outputs(model, x)[layer]
    axes_of(model, layer).check(tuple(output.shape), frozenset({batch}))
    return output


class Permuted(nn.Module):
    """Modules that run on permuted axes, as windows, convolutions in transformers and CLIP do."""

    def __init__(self, module: nn.Module, axes: tuple[int, ...], then: nn.Module | None = None):
        super().__init__()
        self.module, self.axes, self.then = module, axes, then or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x.permute(self.axes)).permute(torch.tensor(self.axes).argsort().tolist())
        return self.then(y)


class Attention(nn.Module):
    """A block as OpenAI's CLIP has it: attention over the first axis, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(*[self.norm(x)] * 3, need_weights=False)[0]


class Gate(nn.Module):
    """Channels from 2 linear layers scale an image, as in squeeze-and-excitation."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 1)
        self.act = nn.ReLU()
        self.gate = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return x * self.gate(x.mean((2, 3)))[..., None, None]


def convnext(width: int) -> nn.Module:
    """A ConvNeXt block: channels first outside, and last in its norm and linear layers."""
    inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
    inner = inner.append(nn.Linear(4 * width, width))
    block = nn.Sequential(nn.Conv2d(width, width, 1), Permuted(inner, (0, 2, 3, 1)))
    return nn.Sequential(nn.Conv2d(3, width, 1), block)


def swin(width: int) -> nn.Module:
    """A patch embedding that ends with the channels in the last axis, and a block."""
    block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
    embed = nn.Sequential(nn.Conv2d(3, width, 1), SimpleModule(lambda x: x.permute(0, 2, 3, 1)))
    return nn.Sequential(embed, nn.Sequential(block, nn.Identity()))


class SimpleModule(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class ChannelsFirstNorm(nn.LayerNorm):
    """As transformers' ConvNextLayerNorm."""

    data_format = "channels_first"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerNorm2d(nn.LayerNorm):
    """As that of timm and torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def images(size: int = 7, channels: int = 3) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


def transformer(**settings: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, **settings)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


signal = functools.partial(torch.randn, BATCH, 4)
REFUSED = {
    "channels last": (swin(WIDTH), images(), "1", "16 channels in the last axis"),
    "channels last, identity": (swin(WIDTH), images(), "1.1", "16 channels in the last axis"),
    "channels last, square": (swin(WIDTH), images(WIDTH), "1", "16 channels in the last axis"),
    "channels last, width of an earlier convolution": (
        *(nn.Sequential(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 3, 1), swin(WIDTH)), images()),
        *("2.1.1", "16 channels in the last axis"),
    ),
    "channels last, 5 axes": (
        *(nn.Linear(3, WIDTH), torch.randn(BATCH, 2, 4, 4, 3), "", "16 channels in the last axis"),
    ),
    "Conv1d": (nn.Conv1d(4, WIDTH, 3), signal(9), "", r"axis 1: \(batch, C, L\)"),
    "Conv1d, square": (nn.Conv1d(4, WIDTH, 1), signal(WIDTH), "", "16 channels in axis 1"),
    "Conv1d and ReLU": (
        *(nn.Sequential(nn.Conv1d(4, WIDTH, 3), nn.ReLU()), signal(9), "1"),
        "16 channels in axis 1",
    ),
    "Conv1d and ReLU, square": (
        *(nn.Sequential(nn.Conv1d(4, WIDTH, 1), nn.ReLU()), signal(WIDTH), ""),
        "16 channels in axis 1",
    ),
    "Conv1d and BatchNorm1d, square": (
        *(nn.Sequential(nn.Conv1d(4, WIDTH, 1), nn.BatchNorm1d(WIDTH)), signal(WIDTH), ""),
        "16 channels in axis 1",
    ),
    "Conv1d between transpositions, square": (
        nn.Sequential(Permuted(nn.Conv1d(WIDTH, WIDTH, 1), (0, 2, 1)), nn.LayerNorm(WIDTH)),
        *(torch.randn(BATCH, WIDTH, WIDTH), "0.module", "16 channels in axis 1"),
    ),
    "InstanceNorm1d": (nn.InstanceNorm1d(4), signal(9), "", "4 channels in axis 1"),
    "channels last, norm without parameters": (
        *(nn.LayerNorm(WIDTH, elementwise_affine=False), torch.randn(BATCH, 7, 7, WIDTH), ""),
        "16 channels in the last axis",
    ),
    "channels last, as high as there are heads": (
        *(nn.Sequential(nn.Linear(3, WIDTH), Gate(7).gate), torch.randn(BATCH, 7, 7, 3), "0"),
        "16 channels in the last axis",
    ),
    "channels last, a gate as wide as high": (
        *(Gate(7).gate, torch.randn(BATCH, 7, 7, WIDTH), "1", "16 channels in the last axis"),
    ),
    "channels last, a gate as wide as one side": (
        *(Gate(7).gate, torch.randn(BATCH, 7, 5, WIDTH), "1", "16 channels in the last axis"),
    ),
    "flattened image": (
        *(nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.Flatten(2)), images(), ""),
        "16 channels in axis 1",
    ),
    "inside a convolution module": (
        Permuted(nn.Sequential(nn.Conv1d(WIDTH, 32, 1), nn.SiLU()), (0, 2, 1), nn.LayerNorm(32)),
        *(BATCH_FIRST, "module.1", "32 channels in axis 1"),
    ),
    "TransformerEncoder": (
        *(transformer(), SEQUENCE_FIRST, "", "nn.TransformerEncoder with batch_first=False"),
    ),
    "inside a TransformerEncoderLayer": (
        *(transformer(), SEQUENCE_FIRST, "layers.0.linear1"),
        "nn.TransformerEncoderLayer with batch_first=False",
    ),
    "LSTM": (nn.LSTM(WIDTH, 8), SEQUENCE_FIRST, "", "nn.LSTM with batch_first=False"),
    "tokens first": (
        *(Permuted(Attention(), (1, 0, 2)), BATCH_FIRST, "module"),
        r"have 6 rows, as its second axis: \(tokens, batch, D\)",
    ),
    "windows": (
        *(nn.Sequential(nn.Unflatten(0, (3, 2)), nn.Flatten(1, 2), nn.Linear(16, 8)), BATCH_FIRST),
        *("2", "first axis is not the batch"),
    ),
    "positions": (SimpleModule(lambda x: x[0]), BATCH_FIRST, "", "first axis is not the batch"),
    "frames": (
        *(SimpleModule(lambda x: x.flatten(0, 1)), torch.randn(BATCH, 2, 3, 4, 4), ""),
        "first axis is not the batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_axes_are_refused_with_an_example_that_works(name) -> None:
    model, x, layer, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        checked(model, x, layer)
    assert f"layer {layer!r}" in str(error.value)
    pooling = eval(re.search(r"pooling=(lambda x, mask: .*)", str(error.value))[1])
    rows = pooling(outputs(model, x)[layer], None)
    assert rows.dim() == 2


ACCEPTED = {
    "ConvNeXt": (convnext(WIDTH), images(), "1"),
    "ConvNeXt, as wide as high": (convnext(WIDTH), images(WIDTH), "1"),
    "image": (nn.Conv2d(3, WIDTH, 3), images(), ""),
    "image, ReLU": (Gate(4), images(), "act"),
    "gate as narrow as the image": (Gate(7), images(), ""),
    "gate alone, as narrow as the image": (Gate(7).gate, torch.randn(BATCH, WIDTH), ""),
    "scaled image, as wide as the gate": (
        nn.Sequential(
            *(SimpleModule(lambda x: 2 * x), SimpleModule(lambda x: x.mean((2, 3)))),
            nn.Linear(WIDTH, 7),
        ),
        *(images(7, WIDTH), "0"),
    ),
    "norm of ConvNeXt, as wide as high": (
        *(ChannelsFirstNorm(WIDTH), torch.randn(BATCH, WIDTH, WIDTH, WIDTH), ""),
    ),
    "LayerNorm2d, as wide as high": (
        *(LayerNorm2d(WIDTH), torch.randn(BATCH, WIDTH, WIDTH, WIDTH), ""),
    ),
    "concatenated channels": (
        nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 1), SimpleModule(lambda x: torch.cat([x, x], 1))),
            *(nn.Conv2d(2 * WIDTH, 8, 1), SimpleModule(lambda x: x.mean((2, 3))), nn.Linear(8, 7)),
        ),
        *(images(7), "1"),
    ),
    "concatenated tokens, as many as channels": (
        nn.Sequential(
            *(nn.Conv1d(4, 5, 1), SimpleModule(lambda x: torch.cat([x, x], 2)), nn.Linear(18, 8)),
        ),
        *(signal(9), "1"),
    ),
    "words of which a convolution makes as many channels": (
        nn.Sequential(
            SimpleModule(lambda x: x[..., 0].abs().long()),
            *(nn.Embedding(9, 8), SimpleModule(lambda x: x.mT), nn.Conv1d(8, TOKENS, 1)),
        ),
        *(BATCH_FIRST, "1"),
    ),
    "LSTM over as many steps as channels": (
        nn.Sequential(
            *(nn.Conv1d(4, 9, 1), SimpleModule(lambda x: x.mT)),
            nn.LSTM(9, 8, batch_first=True, bidirectional=True),
        ),
        *(signal(9), "2"),
    ),
    "volume": (nn.Conv3d(3, WIDTH, 1), torch.randn(BATCH, 3, 2, 4, 4), ""),
    "tokens": (transformer(batch_first=True), BATCH_FIRST, "layers.0.linear1"),
    "rows": (nn.Linear(WIDTH, 8), torch.randn(BATCH, WIDTH), ""),
    "LSTM": (nn.LSTM(WIDTH, 8, batch_first=True), BATCH_FIRST, ""),
    "patches, as many as wide": (
        nn.Sequential(nn.Conv2d(3, WIDTH, 1), SimpleModule(lambda x: x.flatten(2).mT)),
        *(images(4), ""),
    ),
    "convolution over tokens": (
        *(Permuted(nn.Conv1d(WIDTH, WIDTH, 1), (0, 2, 1), nn.Linear(WIDTH, 8)), BATCH_FIRST, ""),
    ),
    "convolution over as many tokens": (
        nn.Sequential(Permuted(nn.Conv1d(WIDTH, WIDTH, 1), (0, 2, 1)), nn.LayerNorm(WIDTH)),
        *(torch.randn(BATCH, WIDTH, WIDTH), "0"),
    ),
    "nothing declared": (nn.Identity(), torch.randn(BATCH, 7, 7, 16), ""),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_usual_axes_are_accepted(name) -> None:
    model, x, layer = ACCEPTED[name]
    checked(model, x, layer)


def test_unknown_sizes_of_the_batch_are_not_checked() -> None:
    axes_of(nn.Identity()).check((3, 4), frozenset())
    axes_of(nn.Identity()).check((3, 4), frozenset({1, 3}))
    with pytest.raises(ValueError, match="the model's inputs have 1 or 2 rows"):
        axes_of(nn.Identity()).check((3, 4), frozenset({1, 2}))


def test_a_batch_that_is_not_seen_has_no_known_size() -> None:
    x = torch.zeros(3, 4)
    assert Call((x, None, 0.5, {"a": [x[0]]}), {"name": "b"}).batch_sizes() == {1, 3, 4}
    assert Call((object(),), {"temperature": x}).batch_sizes() == frozenset()


def test_square_outputs_of_attention_are_ambiguous_until_a_batch_tells() -> None:
    model = nn.Sequential(nn.Sequential(Permuted(Attention(), (1, 0, 2))))
    for layer in ("0.0", "0.0.module.norm"):
        axes = axes_of(model, layer)
        with pytest.raises(ValueError, match="which one is the batch is not known"):
            axes.check((4, 4, WIDTH), frozenset({4}))
    axes = axes_of(model, "0.0")
    axes.check((5, 4, WIDTH), frozenset({4, 5}))
    with pytest.raises(ValueError, match="which one is the batch is not known"):
        axes.check((4, 4, WIDTH), frozenset({4}))
    axes.check((5, 4, WIDTH), frozenset({5}))
    axes.check((4, 4, WIDTH), frozenset({4}))
    axes_of(transformer(batch_first=True)).check((4, 4, WIDTH), frozenset({4}))
    # Outside of the blocks, a model has the batch first.
    outside = nn.Sequential(nn.Linear(3, WIDTH), Permuted(Attention(), (1, 0, 2)))
    axes_of(outside, "0").check((4, 4, WIDTH), frozenset({4}))


def of_transformers(kind: str, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers", reason="needs transformers")
        config = getattr(transformers, f"{kind}Config")(**settings)
        return getattr(transformers, f"{kind}Model")(config)

    return make


def of_timm(module: str, kind: str, **settings: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        try:
            import timm.models
        except (ImportError, RuntimeError) as error:  # torchvision of another torch
            pytest.skip(f"needs timm, and a torchvision of this torch: {error}")
        return getattr(getattr(timm.models, module), kind)(**settings)

    return make


TEXT = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
VISION = {name: value for name, value in TEXT.items() if name != "vocab_size"}
STAGES = {"hidden_sizes": [24, 40], "depths": [1, 1], "num_stages": 2}
AUDIO = TEXT | {
    "conv_dim": (24, 40),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def ids(batch: int, size: int) -> Tensor:
    return torch.randint(0, 30, (batch, size))


def waves(batch: int, size: int) -> Tensor:
    return torch.randn(batch, size)


def squares(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


# A model, its inputs by batch and size, 2 sizes, and what its modules' outputs are.
MODELS = {
    "Bert": (of_transformers("Bert", **TEXT), ids, (9, 13), {"tokens"}),
    "GPT2": (
        of_transformers("GPT2", vocab_size=30, n_embd=24, n_layer=2, n_head=2),
        *(ids, (9, 13), {"tokens"}),
    ),
    "XLNet": (
        of_transformers("XLNet", vocab_size=30, d_model=24, n_layer=2, n_head=2, d_inner=40),
        *(ids, (9, 13), {"tokens first", "tokens"}),
    ),
    "Mamba": (
        of_transformers("Mamba", vocab_size=30, hidden_size=24, num_hidden_layers=2),
        *(ids, (9, 13), {"tokens"}),
    ),
    "Wav2Vec2": (
        of_transformers("Wav2Vec2", **AUDIO, feat_extract_norm="layer"),
        *(waves, (800, 1100), {"tokens", "(batch, C, L)"}),
    ),
    "Wav2Vec2Conformer": (
        of_transformers("Wav2Vec2Conformer", **AUDIO),
        *(waves, (800, 1100), {"tokens", "(batch, C, L)"}),
    ),
    "ConvNext": (
        of_transformers("ConvNext", **STAGES),
        *(squares, (32, 48), {"image", "channels last"}),
    ),
    "ConvNextV2": (
        of_transformers("ConvNextV2", **STAGES),
        *(squares, (32, 48), {"image", "channels last"}),
    ),
    "ResNet": (
        of_transformers("ResNet", embedding_size=24, hidden_sizes=[24, 40], depths=[1, 1]),
        *(squares, (48, 80), {"image"}),
    ),
    "Swin": (
        of_transformers("Swin", embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=3),
        *(squares, (48, 96), {"image", "tokens"}),
    ),
    "FocalNet": (
        of_transformers("FocalNet", embed_dim=24, depths=[1, 1], focal_levels=[2, 2]),
        *(squares, (48, 80), {"image", "tokens", "channels last"}),
    ),
    "Segformer": (
        of_transformers(
            *("Segformer",),
            **{"num_encoder_blocks": 2, "hidden_sizes": [24, 40], "depths": [1, 1]},
            **{"num_attention_heads": [2, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]},
            **{"patch_sizes": [7, 3], "strides": [4, 2]},
        ),
        *(squares, (64, 96), {"image", "tokens"}),
    ),
    "Cvt": (
        of_transformers(*("Cvt",), embed_dim=[24, 40, 56], num_heads=[1, 2, 2], depth=[1, 2, 3]),
        *(squares, (64, 96), {"image", "tokens"}),
    ),
    "Swin of timm": (
        of_timm(
            *("swin_transformer", "SwinTransformer"),
            **{"img_size": 64, "strict_img_size": False, "window_size": 4},
            **{"embed_dim": 40, "depths": (1, 1), "num_heads": (2, 2)},
        ),
        *(squares, (64, 96), {"image", "channels last", "no batch"}),
    ),
    "ConvNeXt of timm": (
        of_timm("convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(24, 40, 56, 72)),
        *(squares, (64, 96), {"image", "channels last"}),
    ),
}


def meaning(small: Tensor, large: Tensor, batches: tuple[int, int]) -> str:
    """What the axes are, by how they grow with the batch and with the size of a sample."""
    grows = [one != other for one, other in zip(small.shape, large.shape, strict=True)]
    if (len(small), len(large)) != batches:
        is_second = len(grows) == 3 and (small.shape[1], large.shape[1]) == batches
        return "tokens first" if is_second else "no batch"
    meanings = {
        (True, False): "tokens",
        (False, True): "(batch, C, L)",
        (False, True, True): "image",
        (True, True, False): "channels last",
    }
    return meanings.get(tuple(grows[1:]), "unknown")


ERRORS = {
    "tokens first": "tokens, batch, D",
    "no batch": "first axis is not the batch",
    "(batch, C, L)": "batch, C, L",
    "channels last": "channels in the last axis",
}


@pytest.mark.parametrize("name", MODELS)
def test_every_output_of_a_model(name) -> None:
    make, inputs, sizes, expected = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    batches = (3, 4)
    small, large = (outputs(model, inputs(*each)) for each in zip(batches, sizes, strict=True))
    axes = layer_axes(small, modules_by_name(model))
    meanings = set()
    for layer in small.keys() & large.keys():
        meant = meaning(small[layer], large[layer], batches)
        for output, batch in ((small, batches[0]), (large, batches[1])):
            try:
                axes[layer].check(tuple(output[layer].shape), frozenset({batch}))
                error = ""
            except ValueError as raised:
                error = str(raised)
            wanted = ERRORS.get(meant, "")
            assert meant == "unknown" or (wanted in error if wanted else not error), (layer, meant)
        meanings.add(meant)
    assert expected <= meanings


def test_widths_outlive_no_module() -> None:
    """A hook that keeps these axes keeps no model alive."""
    axes = axes_of(convnext(WIDTH), "1")
    assert not any(isinstance(value, nn.Module) for value in vars(axes).values())
