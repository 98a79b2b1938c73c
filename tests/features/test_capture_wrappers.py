"""FeatureCapture on wrapped models: checkpoints, compilers, DDP, FSDP, PEFT.

Gradients through captured features are compared with those of the unwrapped model.
"""

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

import rift_kernels as rk
from tests.support.captured import net, tokens

LAYERS = ["embed", "blocks.*"]


def gradients(model, capture, x) -> dict:
    """Gradients of a loss of the captured features and the output, in parameter order."""
    model.zero_grad()
    output = model(x)
    features = capture.features()
    assert list(features) == ["embed", "blocks.0", "blocks.1", "blocks.2"]
    loss = output.square().sum() + sum(f.square().sum() for f in features.values())
    loss.backward()
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def expected_gradients(x) -> dict:
    model = net()
    with rk.FeatureCapture(model, LAYERS, "mean") as capture:
        return gradients(model, capture, x)


def assert_captures(model) -> None:
    """Two steps on a wrapped ``net()`` give the gradients of ``net()``."""
    with rk.FeatureCapture(model, LAYERS, "mean") as capture:
        for inputs in (tokens(), tokens(seed=2)):
            actual = gradients(model, capture, inputs)
            expected = expected_gradients(inputs)
            assert len(actual) == len(expected)
            for gradient, name in zip(actual.values(), expected, strict=True):
                torch.testing.assert_close(gradient.view_as(expected[name]), expected[name])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend) -> None:
    torch.compiler.reset()
    assert_captures(torch.compile(net(), backend=backend, fullgraph=True))
    torch.compiler.reset()
    model = net()
    model.compile(backend=backend)
    assert_captures(model)


def test_a_model_compiled_before_the_capture() -> None:
    torch.compiler.reset()
    model = net()
    compiled = torch.compile(model, backend="eager")
    # The compiled model runs hooks on the original model, too.
    first = rk.FeatureCapture(model, "embed", "tokens")
    compiled(tokens())
    before = first.features()["embed"]
    with first.paused():
        compiled(tokens(seed=2))
    assert torch.equal(first.features()["embed"], before)
    with first.fresh(), torch.no_grad():
        compiled(tokens(seed=2))
        inner = first.features()["embed"]
        assert torch.equal(inner, model.embed.forward(tokens(seed=2)).flatten(0, 1))
    assert torch.equal(first.features()["embed"], before)
    first.remove()
    compiled(tokens(seed=2))
    assert torch.equal(first.features()["embed"], before)
    late = rk.FeatureCapture(compiled, "embed", "tokens")
    compiled(tokens())
    with pytest.raises(RuntimeError, match=r"compiled and called before .*torch\.compiler\.reset"):
        late.features()
    torch.compiler.reset()
    compiled(tokens())
    assert torch.equal(late.features()["embed"], before)


@pytest.mark.usefixtures("one_process")
def test_ddp() -> None:
    assert_captures(nn.parallel.DistributedDataParallel(net()))
    # A model that is wrapped after the capture.
    model = net()
    with rk.FeatureCapture(model, "embed") as capture:
        nn.parallel.DistributedDataParallel(model)(tokens())
    assert capture.features()["embed"].requires_grad


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fsdp1() -> None:
    model = net()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = FullyShardedDataParallel(
            block, device_id=torch.device("cpu"), use_orig_params=True
        )
    assert_captures(
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    )


@pytest.mark.usefixtures("one_process")
def test_fsdp2() -> None:
    model = net()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    assert_captures(model)


@pytest.mark.usefixtures("one_process")
def test_names_within_nested_wrappers() -> None:
    model = net()
    model.blocks[1] = checkpoint_wrapper(torch.compile(model.blocks[1], backend="eager"))
    model = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    inner = "_orig_mod.module.blocks.1._checkpoint_wrapped_module._orig_mod.attn"
    assert inner in dict(model.named_modules())
    for name in ("blocks.1.attn", inner, "module.blocks.1.attn"):
        assert rk.FeatureCapture(model, name).layers == ["blocks.1.attn"]
    # A wrapper and its module share one clean name, which means the wrapper.
    capture = rk.FeatureCapture(model, ["", "blocks.1"])
    assert capture.layers == ["", "blocks.1"]
    for name in ("", "_orig_mod.module.blocks.1"):
        assert next(iter(model.get_submodule(name)._forward_hooks.values())) in capture._layers


@pytest.mark.parametrize("implementation", ["NO_REENTRANT", "REENTRANT"])
def test_checkpoint_wrapper(implementation) -> None:
    model = net()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, getattr(CheckpointImpl, implementation))
    assert_captures(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_are_captured_once(use_reentrant) -> None:
    model = net(use_reentrant=use_reentrant)
    calls = SimpleNamespace(attn=0)
    model.blocks[1].attn.register_forward_hook(lambda *_: setattr(calls, "attn", calls.attn + 1))
    capture = rk.FeatureCapture(model, ["blocks.1", "blocks.1.attn"], "mean")
    model(tokens())
    outputs = list(capture.outputs().values())
    outputs[0].mean(1).sum().backward()
    assert calls.attn == 2
    assert all(a is b for a, b in zip(capture.outputs().values(), outputs, strict=True))
    plain = net()
    with rk.FeatureCapture(plain, "blocks.1", "mean") as expected:
        plain(tokens())
    expected.features()["blocks.1"].sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, plain.embed.weight.grad)


def test_a_part_in_a_reentrant_checkpoint_is_a_pass_with_gradients() -> None:
    """Though its forward runs without them, a pass that has none does not replace it."""
    model, x = net(), tokens().requires_grad_()
    capture = rk.FeatureCapture(model, "blocks.1.attn", "mean")
    checkpoint(model.blocks[1], x, use_reentrant=True)
    before = capture.outputs()["blocks.1.attn"]
    with torch.no_grad():
        model.blocks[1](2 * x)
    assert capture.outputs()["blocks.1.attn"] is before


def test_features_detached_by_a_checkpoint_warn_once() -> None:
    model, x = net(use_reentrant=True), tokens()
    capture = rk.FeatureCapture(model, ["blocks.*", "*.attn"], "mean")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the features of")
        with torch.no_grad():
            model(x)
            capture.features()
        model.eval()
        capture.features()
    model.train()
    model(x)
    names = "'blocks.0.attn', 'blocks.1.attn', 'blocks.2.attn'"
    with pytest.warns(UserWarning, match=f"^the features of {names} have .*use_reentrant=False"):
        features = capture.features()
    assert features["blocks.1"].requires_grad
    assert not features["blocks.1.attn"].requires_grad
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the features of")
        capture.features()
        other = net(use_reentrant=False)
        with rk.FeatureCapture(other, "*.attn", "mean") as capture:
            other(x)
            assert all(x.requires_grad for x in capture.features().values())
        frozen = net(use_reentrant=True).requires_grad_(False)
        with rk.FeatureCapture(frozen, "*.attn", "mean") as capture:
            frozen(x.requires_grad_())
            capture.features()


# --- libraries


def needs(library: str):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"needs {library}")


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert():
    import transformers

    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL)).eval()


IDS = torch.arange(10).view(2, 5)
VALID = torch.tensor([[True, True, True, False, False], [True] * 5])


@needs("transformers")
def test_bert() -> None:
    model = bert()
    with rk.FeatureCapture(model, ["", "encoder.layer.*", "pooler"], "mean") as capture:
        outputs = model(IDS, attention_mask=VALID.long(), output_hidden_states=True)
        features = capture.features(VALID)
    assert list(features) == ["", "encoder.layer.0", "encoder.layer.1", "pooler"]
    for name, hidden in zip(features, (outputs[0], *outputs.hidden_states[1:]), strict=False):
        expected = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
        torch.testing.assert_close(features[name], expected)
    assert torch.equal(features["pooler"], outputs.pooler_output)
    features["encoder.layer.0"].sum().backward()
    weight = model.get_submodule("embeddings.word_embeddings").weight
    assert weight.grad.abs().sum() > 0


@needs("transformers")
def test_vit() -> None:
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    model = transformers.ViTModel(config).eval()
    # The blocks are layers.* in transformers 5, encoder.layer.* in 4.
    blocks = "layers.*" if hasattr(model, "layers") else "encoder.layer.*"
    with rk.FeatureCapture(model, [blocks, "*.projection"], "tokens") as capture:
        outputs = model(torch.rand(2, 3, 16, 16), output_hidden_states=True)
    projection, *layers = capture.features().values()
    assert projection.shape == (2 * 4, 16)
    assert len(layers) == 2
    for features, hidden in zip(layers, outputs.hidden_states[1:], strict=True):
        assert torch.equal(features, hidden.flatten(0, 1))
    layers[1].sum().backward()
    assert model.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


@needs("transformers")
@needs("peft")
def test_peft_teacher_through_the_same_hooks() -> None:
    import peft

    base = bert()
    with rk.FeatureCapture(base, "encoder.layer.1") as capture:
        base(IDS)
    expected = capture.features()["encoder.layer.1"].detach()
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    for name in ("encoder.layer.1", "base_model.model.encoder.layer.1", "*.layer.1"):
        with rk.FeatureCapture(model, name) as capture:
            assert capture.layers == ["encoder.layer.1"]
    capture = rk.FeatureCapture(model, "encoder.layer.*")
    model(IDS)
    with capture.fresh(), torch.no_grad(), model.disable_adapter():
        model(IDS)
        teacher = capture.features()
    student = capture.features()
    torch.testing.assert_close(teacher["encoder.layer.1"], expected)
    assert not torch.allclose(student["encoder.layer.1"], expected, atol=1e-3)
    student["encoder.layer.1"].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@needs("transformers")
@needs("peft")
def test_peft_around_a_model_with_a_submodule_called_model() -> None:
    """A language model's own ``model.`` is distinguished from PEFT's."""
    import peft
    import transformers

    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    for name in ("model.layers.*", "base_model.model.model.layers.*"):
        assert rk.FeatureCapture(model, name).layers == ["model.layers.0", "model.layers.1"]
