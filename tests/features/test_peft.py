"""A student with adapters is its own teacher: no second copy of the weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support import cases

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, intermediate_size=32, **SIZES)
    return transformers.ViTModel(config, add_pooling_layer=False)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=r".*\.(q_proj|query)", lora_dropout=0.1)


def with_peft(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, lora())


def with_transformers(model: nn.Module) -> nn.Module:
    model.add_adapter(lora())
    return model


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip transformers' version check: it may demand a newer peft, but works with this one."""
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def with_trained_adapters(model: nn.Module) -> nn.Module:
    """The model with adapters that have an effect, as after some steps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("adapt", [with_peft, with_transformers])
@pytest.mark.parametrize("wrap", ["alone", "DDP"])
@pytest.mark.usefixtures("one_process")
def test_is_the_loss_to_a_copy_made_before(adapt: Callable, wrap) -> None:
    model = vit()
    teacher = copy.deepcopy(model).eval()
    student = with_trained_adapters(adapt(model)).eval()
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    run = nn.parallel.DistributedDataParallel(student) if wrap == "DDP" else student
    results = []
    for choice in (teacher, None):
        run.zero_grad()
        with rk.RIFTRegularizer(run, choice, layers="*layers.1", weight=2.0) as rift:
            run(pixel_values=images())
            loss = rift(pixel_values=images())
            loss.backward()
            results.append((loss.detach(), gradients(student)))
            assert rift.distances[rift.layers[0]] > 1e-4
    (expected, expected_gradients), (loss, actual_gradients) = results
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(actual_gradients, expected_gradients, strict=True):
        assert cases.relative_error(gradient, expected_gradient) < 1e-5
    # The adapters still have an effect, and the same parameters are trained.
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trained
    again = run(pixel_values=images()).last_hidden_state
    with pytest.raises(AssertionError):
        torch.testing.assert_close(again, teacher(pixel_values=images()).last_hidden_state)


def test_before_the_first_step_student_and_teacher_agree() -> None:
    student = with_peft(vit())
    rift = rk.RIFTRegularizer(student.eval(), layers="layers.1")
    student(pixel_values=images())
    assert float(rift(pixel_values=images()).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("one_process")
def test_adapters_are_found_in_wrappers() -> None:
    student = with_peft(vit())
    wrapped = nn.parallel.DistributedDataParallel(student)
    for run in (torch.compile(student), torch.compile(wrapped)):
        rk.RIFTRegularizer(run, layers="*layers.1").remove()


def test_a_mask_by_position_is_found_in_wrappers() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, intermediate_size=32, **SIZES)
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    target = peft.LoraConfig(r=2, target_modules=["query", "value"])
    student = with_trained_adapters(peft.get_peft_model(bert, target)).eval()
    rift = rk.RIFTRegularizer(student, layers="*layer.1", pooling="mean")
    ids = torch.randint(0, 30, (6, 7))
    mask = (torch.arange(7) < torch.arange(2, 8)[:, None]).long()
    losses = []
    for inputs, keywords in (((ids, mask), {}), ((ids,), {"attention_mask": mask})):
        student(*inputs, **keywords)
        losses.append(rift(*inputs, **keywords).detach())
    assert torch.equal(*losses)


def test_virtual_tokens_are_not_the_teachers() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)
    base = transformers.GPT2LMHeadModel(config)
    teacher = copy.deepcopy(base)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    student = peft.get_peft_model(base, prompts)
    for pooling in ("cls", "mean", "tokens"):
        with pytest.raises(ValueError, match=r"'last' or a function .* 3 virtual tokens.*got"):
            rk.RIFTRegularizer(student, teacher, layers="*h.1", pooling=pooling)
    rift = rk.RIFTRegularizer(student, teacher, layers="*h.1", pooling="last")
    student(input_ids=torch.randint(0, 30, (6, 7)))
    loss = rift()
    loss.backward()
    assert loss > 1e-4


@pytest.mark.parametrize("adapt", [with_peft, with_transformers])
def test_frozen_parameters_stay_frozen(adapt: Callable) -> None:
    """PEFT unfreezes an adapter that it enables again, after the teacher's pass or an error."""
    model = adapt(vit())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    rift = rk.RIFTRegularizer(model, layers="*layers.1")
    model(images())
    rift(images())
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    model(images())
    with pytest.raises(AttributeError):
        rift("no images")
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]


def test_there_is_no_second_copy_of_the_weights() -> None:
    """No tensor that the steps leave alive is a copy of a weight."""
    earlier = live_tensors()  # alive until the end, so that no id is reused
    earlier_ids = {id(tensor) for tensor in earlier}
    student = with_peft(vit())
    rift = rk.RIFTRegularizer(student, layers="*layers.1")
    pointers = {parameter.data_ptr() for parameter in student.parameters()}
    shapes = {tuple(p.shape) for p in student.parameters() if p.dim() == 2 and not p.requires_grad}
    for _ in range(2):
        student(pixel_values=images())
        rift(pixel_values=images()).backward()
    weights = [
        tensor.data_ptr()
        for tensor in live_tensors()
        if id(tensor) not in earlier_ids and tuple(tensor.shape) in shapes
    ]
    assert len(set(weights) & pointers) > 10
    assert set(weights) <= pointers
    assert not list(rift.parameters())


def test_the_teacher_draws_no_dropout() -> None:
    student = with_trained_adapters(with_peft(vit())).train()
    rift = rk.RIFTRegularizer(student, layers="*layers.1")
    torch.manual_seed(3)
    student(pixel_values=images())
    state = torch.get_rng_state()
    rift(pixel_values=images())
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
