"""FeatureCapture: which layers it resolves, what it captures, and how long it keeps that."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import rift_kernels as rk
from tests.support.captured import captured, net, tokens


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


def test_a_submodule_may_be_called_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.module = nn.Linear(4, 2)
    assert rk.FeatureCapture(model, "module").layers == ["module"]


def test_an_unknown_name_error_lists_existing_names() -> None:
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
        ValueError, match=r"'blocks' is a ModuleList: use the modules in it, 'blocks\.\*"
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
    """Like transformers' outputs: a dictionary whose entries are also attributes."""

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
def test_the_first_tensor_of_an_output_is_captured(wrap) -> None:
    x = tokens()
    assert torch.equal(captured(wrap(x), "tokens"), x.flatten(0, 1))


@pytest.mark.parametrize(
    ("output", "name"),
    [({"x": torch.ones(2, 3)}, "dict"), ((), "tuple"), ((1, "a"), "tuple")],
    ids=str,
)
def test_other_outputs_are_refused(output, name) -> None:
    with pytest.raises(TypeError, match=f"output of layer '' must be a tensor, .*; got {name}"):
        captured(output)


def test_layers_that_were_not_called_raise() -> None:
    model = net()
    capture = rk.FeatureCapture(model, ["unused", "embed"])
    with pytest.raises(
        RuntimeError, match="nothing was captured of 'embed', 'unused': there was no pass of the"
    ):
        capture.features()
    model(tokens())
    with pytest.raises(
        RuntimeError,
        match=r"nothing was captured of 'unused': the model ran, but did not call this",
    ):
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
        expected = model.embed.forward(x)  # forward runs no hooks
        assert torch.equal(capture.features()["embed"], expected.flatten(0, 1))


def test_paused_and_fresh() -> None:
    model, other = net(), tokens(seed=2)
    capture = rk.FeatureCapture(model, "blocks.*", "tokens")
    model(tokens())
    before = capture.features()
    with capture.paused():
        with capture.paused():
            model(other)
        model(other)
    assert all(torch.equal(before[name], x) for name, x in capture.features().items())
    with capture.fresh() as same, torch.no_grad():
        assert same is capture
        with pytest.raises(RuntimeError, match="nothing was captured"):
            capture.features()
        y = model(other)
        teacher = capture.features()
    assert torch.equal(teacher["blocks.2"], y.flatten(0, 1))
    with pytest.raises(ZeroDivisionError), capture.fresh():
        raise ZeroDivisionError
    assert all(torch.equal(before[name], x) for name, x in capture.features().items())
    assert not teacher["blocks.2"].requires_grad
    sum(x.sum() for x in capture.features().values()).backward()
    assert model.embed.weight.grad is not None
    model(other)  # no longer paused
    assert torch.equal(capture.features()["blocks.2"], y.flatten(0, 1))


def test_hooks_are_removed_and_features_stay() -> None:
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
    with rk.FeatureCapture(model, "embed"):  # the context alone keeps the hooks alive
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
        references = [weakref.ref(capture), weakref.ref(capture._layers[0])]
        references.append(weakref.ref(capture.outputs()["blocks.0"]))
        del capture
        assert not model.blocks[0]._forward_hooks
        del features
        assert [reference() for reference in references] == [None] * 3
        capture = rk.FeatureCapture(model, "blocks.*", "mean")
        model(tokens())
        references = [weakref.ref(capture), weakref.ref(model), weakref.ref(model.blocks[0])]
        del model
        assert references[1]() is None
        del capture
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "copy_model", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_of_a_hooked_model(copy_model) -> None:
    model = net()
    capture = rk.FeatureCapture(model, "", "tokens")
    model(tokens())
    before = capture.features()[""]
    other = copy_model(model)
    # A shallow copy shares everything with the model, including its hooks.
    assert torch.equal(other(tokens()), model(tokens()))
    model.embed.weight.data += 1
    if copy_model is not copy.copy:
        other(tokens(seed=2))
    assert torch.equal(capture.features()[""], before)
    torch.save(model.state_dict(), io.BytesIO())
    assert list(model.state_dict()) == list(net().state_dict())


@pytest.mark.parametrize(
    "compiled", [lambda model: torch.jit.trace(model, tokens()), torch.jit.script]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(compiled) -> None:
    """It runs no hooks of the modules inside."""
    model = compiled(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    with pytest.raises(TypeError, match=r"layers must not be in a module .* TorchScript"):
        rk.FeatureCapture(model, "0")
