"""Features of inner layers: which layers, how they are pooled, and for how long they are kept."""

import copy
import gc
import io
import pickle
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rift_kernels as rk
from rift_kernels import capture as capture_module


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class Net(nn.Module):
    """Tokens (batch, tokens, 4) through blocks, of which activation checkpoints may forget."""

    def __init__(self, blocks: int = 3, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


class Output(nn.Module):
    """Returns what it is given."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, _=None):
        return self.output


def net(**settings) -> Net:
    torch.manual_seed(0)
    return Net(**settings)


def tokens(batch: int = 2, count: int = 5, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 4, generator=generator)


def captured(output, pooling: str = "cls", mask=None):
    model = Output(output)
    with rk.FeatureCapture(model, "", pooling) as capture:
        model()
    return capture.features(mask)[""]


# --- which layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.1", ["blocks.1"]),
        (["blocks.2", "embed", "blocks.0"], ["embed", "blocks.0", "blocks.2"]),
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.*.mlp.*", [f"blocks.{i}.mlp.{j}" for i in range(3) for j in range(2)]),
        (
            ["*.2", "*.attn", "blocks.2"],
            ["blocks.0.attn", "blocks.1.attn", "blocks.2", "blocks.2."],
        ),
        ("*", ["embed", "blocks.0", "blocks.1", "blocks.2", "unused"]),
        ("", [""]),
        (["", "embed"], ["", "embed"]),
        (("embed", "embed", "emb*"), ["embed"]),
        ("module.blocks._orig_mod.1", ["blocks.1"]),
        ("_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module", ["blocks.0"]),
        ("module.base_model.model.blocks.[01]", ["blocks.0", "blocks.1"]),
        ("base_model.model", [""]),
    ],
    ids=str,
)
def test_layers(layers, expected) -> None:
    expected = [name + "attn" if name.endswith(".") else name for name in expected]
    with rk.FeatureCapture(net(), layers) as capture:
        assert capture.layers == expected
        assert repr(expected) in repr(capture)


def test_features_are_the_layers_outputs_in_order() -> None:
    model, x = net(), tokens()
    with rk.FeatureCapture(model, ["blocks.2", "embed", ""], "tokens") as capture:
        y = model(x)
    features = capture.features()
    assert list(features) == capture.layers == ["", "embed", "blocks.2"]
    assert torch.equal(features["embed"], model.embed(x).flatten(0, 1))
    assert torch.equal(features["blocks.2"], y.flatten(0, 1))
    assert torch.equal(features[""], y.flatten(0, 1))


def test_a_part_named_as_wrappers_name_theirs() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.module = nn.Linear(4, 2)
    assert rk.FeatureCapture(model, "module").layers == ["module"]


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    model = net(blocks=20)
    message = "layers: 'block.11' matches no module of the model; the closest are 'blocks.11', "
    with pytest.raises(ValueError, match=message) as error:
        rk.FeatureCapture(model, ["embed", "block.11"])
    assert str(error.value).endswith("the top level has 'embed', 'blocks', 'unused'")
    with pytest.raises(ValueError, match=r"'\?\?\?' matches no module of the model; the top level"):
        rk.FeatureCapture(model, "???")
    wide = nn.Sequential(*(nn.Identity() for _ in range(30)))
    with pytest.raises(ValueError, match=r"'10', '11' and 18 more$"):
        rk.FeatureCapture(wide, "encoder")
    with pytest.raises(
        ValueError, match=r"'blocks' is a ModuleList: take those in it, 'blocks\.\*"
    ):
        rk.FeatureCapture(model, "blocks")
    assert not model.embed._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x, "a"), TypeError, "model must be an nn.Module; got function"),
        ((nn.ReLU(), 3), TypeError, "layers must be a string or a sequence of strings; got 3"),
        ((nn.ReLU(), ["", 3]), TypeError, "layers must be a string or a sequence of strings"),
        ((nn.ReLU(), []), ValueError, "layers must have at least one name; got an empty sequence"),
        ((nn.ReLU(), "", "max"), ValueError, "pooling must be one of 'cls', 'mean', 'tokens'"),
    ],
)
def test_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        rk.FeatureCapture(*arguments)


# --- what is captured


class ModelOutput(dict):
    """As transformers' outputs are: a dictionary whose entries are attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self):
        return tuple(self.values())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, x + 1),
        lambda x: [None, x, x + 1],
        lambda x: ModelOutput(logits=x + 1, last_hidden_state=x),
        lambda x: ModelOutput(past=None, hidden=(x + 1,), logits=x, loss=x + 2),
    ],
)
def test_first_tensor_of_an_output(wrap) -> None:
    x = tokens()
    assert torch.equal(captured(wrap(x), "tokens"), x.flatten(0, 1))


@pytest.mark.parametrize(
    ("output", "name"),
    [({"x": torch.ones(2, 3)}, "dict"), ((), "tuple"), ((1, "a"), "tuple"), (None, "NoneType")],
    ids=str,
)
def test_other_outputs_are_refused(output, name) -> None:
    with pytest.raises(TypeError, match=f"output of layer '' must be a tensor, .*; got {name}"):
        captured(output)


def test_layers_that_were_not_called() -> None:
    model = net()
    capture = rk.FeatureCapture(model, ["unused", "embed"])
    with pytest.raises(
        RuntimeError, match="nothing was captured of 'embed', 'unused': was the mod"
    ):
        capture.features()
    model(tokens())
    with pytest.raises(RuntimeError, match=r"nothing was captured of 'unused': .*on the path of"):
        capture.features()
    model.unused(tokens())
    capture.features()
    capture.clear()
    with pytest.raises(
        RuntimeError, match=r"nothing was captured of 'embed', 'unused': .*compiled"
    ):
        capture.features()


def test_the_latest_call_wins() -> None:
    model = net()
    capture = rk.FeatureCapture(model, "embed", "tokens")
    for x in (tokens(), tokens(seed=2)):
        model(x)
        expected = model.embed.forward(x)  # forward: no hooks
        assert torch.equal(capture.features()["embed"], expected.flatten(0, 1))


def test_paused_and_fresh() -> None:
    model, inner = net(), tokens(seed=2)
    capture = rk.FeatureCapture(model, "blocks.*", "tokens")
    model(tokens())
    before = capture.features()
    with capture.paused():
        with capture.paused():
            model(inner)
        model(inner)
    assert all(torch.equal(before[name], x) for name, x in capture.features().items())
    with capture.fresh() as same, torch.no_grad():
        assert same is capture
        with pytest.raises(RuntimeError, match="nothing was captured"):
            capture.features()
        y = model(inner)
        teacher = capture.features()
    assert torch.equal(teacher["blocks.2"], y.flatten(0, 1))
    with pytest.raises(ZeroDivisionError), capture.fresh():
        raise ZeroDivisionError
    assert all(torch.equal(before[name], x) for name, x in capture.features().items())
    assert not teacher["blocks.2"].requires_grad
    sum(x.sum() for x in capture.features().values()).backward()
    assert model.embed.weight.grad is not None
    model(inner)  # no longer paused
    assert torch.equal(capture.features()["blocks.2"], y.flatten(0, 1))


def test_hooks_go_and_features_stay() -> None:
    model = net()
    with rk.FeatureCapture(model, "embed") as capture:
        assert len(model.embed._forward_hooks) == 1
        model(tokens())
    before = capture.features()["embed"]
    assert not model.embed._forward_hooks
    model(tokens(seed=2))
    assert torch.equal(capture.features()["embed"], before)
    capture.remove()
    with pytest.raises(RuntimeError, match="hooks of this capture were removed"), capture:
        pass
    with pytest.raises(ZeroDivisionError), rk.FeatureCapture(model, "embed"):
        raise ZeroDivisionError
    assert not model.embed._forward_hooks
    with rk.FeatureCapture(model, "embed"):  # not kept: its hooks stay while the block runs
        assert len(model.embed._forward_hooks) == 1


def test_two_captures_of_a_model() -> None:
    model = net()
    first = rk.FeatureCapture(model, "embed")
    with rk.FeatureCapture(model, "embed", "mean") as second:
        model(tokens())
    assert not torch.equal(first.features()["embed"], second.features()["embed"])
    assert len(model.embed._forward_hooks) == 1


def test_no_reference_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        model = net()
        capture = rk.FeatureCapture(model, "blocks.*", "mean")
        model(tokens())
        features = capture.features()
        sum(x.sum() for x in features.values()).backward()
        gone = [weakref.ref(capture), weakref.ref(capture._slots[0])]
        gone.append(weakref.ref(capture._slots[0].output))
        del capture
        assert not model.blocks[0]._forward_hooks
        del features
        assert [reference() for reference in gone] == [None] * 3
        capture = rk.FeatureCapture(model, "blocks.*", "mean")
        model(tokens())
        gone = [weakref.ref(capture), weakref.ref(model), weakref.ref(model.blocks[0])]
        del model
        assert gone[1]() is None
        del capture
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_of_a_hooked_model(copied) -> None:
    model = net()
    capture = rk.FeatureCapture(model, "", "tokens")
    model(tokens())
    before = capture.features()[""]
    other = copied(model)
    # A shallow copy shares its hooks with the model, as it does everything.
    assert torch.equal(other(tokens()), model(tokens()))
    model.embed.weight.data += 1
    if copied is not copy.copy:
        other(tokens(seed=2))
    assert torch.equal(capture.features()[""], before)
    torch.save(model.state_dict(), io.BytesIO())
    assert list(model.state_dict()) == list(net().state_dict())


# --- pooling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pooling(dtype) -> None:
    x = tokens(3, 5).to(dtype)
    images = torch.randn(3, 4, 2, 5, dtype=torch.float64).to(dtype)
    rows = images.permute(0, 2, 3, 1)
    for output, pooling, expected in (
        (x, "cls", x[:, 0]),
        (x, "mean", x.double().mean(1).to(dtype)),
        (x, "tokens", torch.cat(list(x))),
        *((x[:, 0], pooling, x[:, 0]) for pooling in capture_module.POOLINGS),
        (images, "mean", images.double().mean((2, 3)).to(dtype)),
        (images, "tokens", rows.reshape(-1, 4)),
    ):
        features = captured(output, pooling)
        assert features.dtype == dtype
        torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_means_of_half_precision_are_accumulated_in_float32(masked) -> None:
    x = torch.ones(2, 4096, 3, dtype=torch.bfloat16)
    x[:, 0] = 1000
    mask = torch.ones(2, 4096, dtype=torch.bool) if masked else None
    expected = torch.full((2, 3), (1000 + 4095) / 4096, dtype=torch.float64)
    result = captured(x, "mean", mask)
    torch.testing.assert_close(result.double(), expected, rtol=4e-3, atol=0)


def test_masked_mean_selects() -> None:
    x = tokens(2, 5).requires_grad_()
    mask = torch.tensor([[True, True, False, False, False], [False, True, True, True, True]])
    with torch.no_grad():
        x[~mask] = float("nan")
    features = captured(x, "mean", mask)
    torch.testing.assert_close(features, torch.stack([x[0, :2].mean(0), x[1, 1:].mean(0)]))
    features.sum().backward()
    expected = mask / mask.sum(1, keepdim=True)
    torch.testing.assert_close(x.grad, expected.unsqueeze(-1).expand(2, 5, 4))


def test_mask_of_rows() -> None:
    model, x = net(), tokens()
    mask = torch.tensor([[True, True, False, False, True], [False, True, True, True, True]])
    for pooling in capture_module.POOLINGS:
        with rk.FeatureCapture(model, "embed", pooling) as capture:
            model(x)
            rows, features = capture.mask(mask), capture.features(mask)["embed"]
        assert capture.mask(None) is None
        if pooling == "tokens":
            assert torch.equal(features[rows], model.embed(x)[mask])
        else:
            assert rows is None
            assert len(features) == 2


SOME = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pooling", "output", "mask", "error", "message"),
    [
        ("cls", torch.ones(2, 4, 3, 3), None, ValueError, "must be 'mean' or 'tokens' for"),
        ("mean", torch.ones(2, 5, 4).long(), None, TypeError, "layer '' must be floating point"),
        ("mean", torch.ones(4), None, ValueError, r"layer '' must be \(batch.*; got \(4,\)"),
        ("mean", torch.ones(2, 3, 4, 5, 6), None, ValueError, r"got \(2, 3, 4, 5, 6\)"),
        ("cls", tokens(), [True], TypeError, "mask must be a boolean tensor or None; got list"),
        ("cls", tokens(), SOME.long(), TypeError, r"mask must be boolean, .*int64.*mask\.bool\(\)"),
        ("mean", tokens(), SOME[0], ValueError, r"mask must be \(batch, tokens\); got \(5,\)"),
        ("mean", tokens(), SOME[:, :4], ValueError, r"be \(2, 5\) for layer ''.*; got \(2, 4\)"),
        ("tokens", tokens(), SOME[:1], ValueError, r"be \(2, 5\) for layer ''.*; got \(1, 5\)"),
        ("mean", torch.ones(2, 4, 1, 5), SOME, ValueError, "mask must be None for layer ''"),
        ("mean", tokens(), SOME.to("meta"), ValueError, "on the same device; got meta and cpu"),
        (
            *("mean", tokens(), SOME & torch.tensor([[True], [False]]), ValueError),
            "at least one valid token a row; row 1 has none",
        ),
    ],
)
def test_errors_of_features(pooling, output, mask, error, message) -> None:
    with pytest.raises(error, match=message):
        captured(output, pooling, mask)


def test_a_row_without_tokens_is_an_error_of_means_alone() -> None:
    assert captured(tokens(), "cls", ~SOME).isfinite().all()
    assert captured(tokens()[:, 0], "mean", ~SOME).isfinite().all()
    # As on a GPU, whose masks are not read.
    assert capture_module._mean(tokens(), ~SOME).isnan().all()
    with pytest.raises(TypeError, match="mask must be boolean"):
        rk.FeatureCapture(net(), "embed").mask(SOME.long())
