"""Disabled adapters give the pretrained model, or the student is refused as its own teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from rift_kernels.features import adapters

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

IDS = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj"]
Adapt = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip transformers' version check: it may demand a newer peft, but works with this one."""
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.15)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def disabled_logits(model: nn.Module) -> Tensor:
    with adapters.without_adapters(model):
        return logits(model)


def train(model: nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, 0.5)
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()


def with_config(kind: str, **settings: object) -> Adapt:
    settings.setdefault("target_modules", TARGETS)
    settings.setdefault("task_type", "CAUSAL_LM")
    return lambda model: peft.get_peft_model(model, getattr(peft, kind)(**settings))


def lora(**settings: object) -> Adapt:
    return with_config("LoraConfig", r=4, **settings)


def added(**settings: object) -> Adapt:
    def adapt(model: nn.Module) -> nn.Module:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, **settings))
        return model

    return adapt


def eva(model: nn.Module) -> nn.Module:
    student = lora(init_lora_weights="eva", eva_config=peft.EvaConfig())(model)
    peft.initialize_lora_eva_weights(student, [{"input_ids": IDS}] * 3)
    return student


def two_adapters(model: nn.Module) -> nn.Module:
    student = lora()(model)
    student.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    return student


def wrapped(model: nn.Module) -> nn.Module:
    """Adapters in a part of a student of the user's own."""
    return Wrapper(lora()(model))


class Wrapper(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, **keywords: object) -> object:
        return self.body(**keywords)


ACCEPTED: dict[str, Adapt] = {
    "LoRA": lora(),
    "LoRA, gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, not initialised": lora(init_lora_weights=False),
    "LoRA, eva": eva,
    "LoRA of embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA, modules to save": lora(modules_to_save=["lm_head"]),
    "LoRA, tokens": lora(trainable_token_indices=[1, 2, 3]),
    "LoRA, rank-stabilised, with biases of its own": lora(use_rslora=True, lora_bias=True),
    "DoRA": lora(use_dora=True),
    "LoRA of transformers": added(),
    "LoRA of transformers, modules to save": added(modules_to_save=["lm_head"]),
    "two adapters": two_adapters,
    "in a student of the user's": wrapped,
    "AdaLoRA": with_config("AdaLoraConfig", total_step=10, init_r=4),
    "IA3": with_config("IA3Config", feedforward_modules=[]),
    "LoHa": with_config("LoHaConfig", r=4),
    "LoKr": with_config("LoKrConfig", r=4),
    "OFT": with_config("OFTConfig", oft_block_size=4),
    "BOFT": with_config("BOFTConfig", boft_block_size=4),
    "VeRA": with_config("VeraConfig", r=4),
    "VBLoRA": with_config("VBLoRAConfig", r=4, vector_length=4, num_vectors=20),
    "HRA": with_config("HRAConfig", r=4),
    "FourierFT": with_config("FourierFTConfig", n_frequency=10),
    "layer norms": with_config("LNTuningConfig", target_modules=["input_layernorm"]),
    "tokens": with_config(
        "TrainableTokensConfig", token_indices=[1, 2, 3], target_modules=["embed_tokens"]
    ),
    "adaption prompts": lambda model: peft.get_peft_model(
        model,
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.filterwarnings("ignore")
def test_disabled_adapters_give_the_pretrained_model(name) -> None:
    model = llama()
    before = logits(model)
    student = ACCEPTED[name](model)
    adapters.check_adapters(student)
    assert torch.equal(disabled_logits(student), before)
    initial = logits(student)
    train(student)
    assert not torch.equal(logits(student), initial)
    assert torch.equal(disabled_logits(student), before)
    # No parameter of the teacher is trained.
    hidden = student(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    assert adapters.trained_base_parameters([hidden], student) == []
    assert adapters.virtual_tokens(student) == 0


def lora_ga(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(
        r=4,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.tuners.lora.config.LoraGAConfig(),
    )
    peft.preprocess_loraga(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
    return peft.get_peft_model(model, config)


def second_adapter(model: nn.Module) -> nn.Module:
    student = lora()(model)
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights="pissa")
    student.add_adapter("second", config)
    return student


def kasa(model: nn.Module) -> nn.Module:
    config = getattr(peft.tuners.lora.config, "KasaConfig", None)
    if config is None:
        pytest.skip("needs a peft that has KaSA")
    return lora(kasa_config=config())(model)


REFUSED: dict[str, tuple[Adapt, str]] = {
    "PiSSA": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "fast PiSSA": (lora(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
    "OLoRA": (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "LoRA-GA": (lora_ga, "init_lora_weights='lora_ga'"),
    "PiSSA of transformers": (added(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "PiSSA, second": (second_adapter, "init_lora_weights='pissa'.*got adapter 'second'"),
    "KaSA": (kasa, "kasa_config=KasaConfig"),
    "repeated layers": (lora(layer_replication=[(0, 2), (1, 2)]), r"layer_replication=\[\(0, 2\)"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_an_initialisation_that_rewrites_the_base_is_refused(name) -> None:
    adapt, message = REFUSED[name]
    model = llama()
    before = logits(model)
    student = adapt(model)
    assert not torch.allclose(disabled_logits(student), before, atol=1e-3)
    with pytest.raises(ValueError, match=rf"must not be None .*{message}.*copy\.deepcopy"):
        rk.RIFTRegularizer(student, layers="*layers.1")


def test_corda_is_refused() -> None:
    from peft.tuners.lora.corda import preprocess_corda

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(32, 16)
    before = model(x)
    config = peft.LoraConfig(
        r=4,
        target_modules=["0", "2"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(),
    )
    preprocess_corda(model, config, run_model=lambda: model(x))
    student = peft.get_peft_model(model, config)
    with adapters.without_adapters(student):
        assert not torch.allclose(student(x), before, atol=1e-3)
    with pytest.raises(ValueError, match="init_lora_weights='corda'"):
        adapters.check_adapters(student)


@pytest.mark.parametrize("init", ["loftq", "OLoRA"])
def test_other_initialisations_are_refused_by_name(init) -> None:
    """PEFT ignores the case of some, and needs bitsandbytes for one."""
    student = lora()(llama())
    student.peft_config["default"].init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        adapters.check_adapters(student)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_refused(bias) -> None:
    model = llama()
    before = logits(model)
    student = lora(bias=bias)(model)
    hidden = student(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    found = adapters.trained_base_parameters([hidden], student)
    assert {name.rpartition(".")[2] for name in found} == {"bias"}
    train(student)
    with pytest.warns(UserWarning, match="does not produce the same output"):
        assert not torch.allclose(disabled_logits(student), before, atol=1e-3)
    with pytest.raises(ValueError, match=f"bias='{bias}', which trains the model's own biases"):
        adapters.check_adapters(student)


PROMPTS = {
    "PromptTuningConfig": 3,
    "PromptEncoderConfig": 3,
    "PrefixTuningConfig": 0,
    "CartridgeConfig": 0,
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.filterwarnings("ignore")
def test_prompt_learning_is_refused_and_its_tokens_are_counted(kind) -> None:
    if not hasattr(peft, kind):
        pytest.skip(f"needs a peft that has {kind}")
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    student = peft.get_peft_model(llama(), config)
    tokens = logits(student).shape[1] - IDS.shape[1]
    assert adapters.virtual_tokens(student) == adapters.virtual_tokens(Wrapper(student)) == tokens
    assert tokens == PROMPTS[kind]
    with pytest.raises(
        ValueError, match=r"peft_type='[PC].*virtual tokens .* got adapter 'default'"
    ):
        adapters.check_adapters(student)


def test_a_model_without_adapters_has_no_tokens_and_is_refused() -> None:
    assert adapters.virtual_tokens(llama()) == 0
    with pytest.raises(ValueError, match=r"without adapters .* got None for LlamaForCausalLM"):
        adapters.check_adapters(llama())


def test_frozen_parameters_of_a_part_stay_frozen() -> None:
    student = wrapped(llama())
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with adapters.without_adapters(student):
        pass
    assert all(p.requires_grad == ("lora_B" in n) for n, p in student.named_parameters())


def test_a_trained_parameter_is_found_where_it_affects_the_features() -> None:
    student = lora()(llama())
    layers = student.base_model.model.model.layers
    for module in (layers[0].mlp.up_proj, layers[1].mlp.up_proj, student.base_model.model.lm_head):
        module.weight.requires_grad_()
    first, second = student(input_ids=IDS, output_hidden_states=True).hidden_states[1:]
    name = "base_model.model.model.layers.{}.mlp.up_proj.weight"
    found = adapters.trained_base_parameters([first, first], student)
    assert found == [name.format(0)]
    found = adapters.trained_base_parameters([first.detach(), second], Wrapper(student))
    assert set(found) == {f"body.{name.format(number)}" for number in (0, 1)}


class Outputs(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self[0](x)
        return hidden, self[1](hidden)


def test_compiled_parts_name_no_parameters() -> None:
    """Their graph has one node, which all of their parameters reach."""
    config = peft.LoraConfig(r=2, target_modules=["0"])
    student = peft.get_peft_model(Outputs(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    head = student.base_model.model[1].requires_grad_()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    hidden, output = compiled(torch.randn(5, 4))
    assert len(torch.autograd.grad(output.sum(), list(head.parameters()), retain_graph=True)) == 2
    assert adapters.trained_base_parameters([hidden], compiled) == []


def test_adapters_of_a_sharded_class_are_known() -> None:
    """FSDP2 replaces the class of a module by a subclass."""
    student = lora()(llama())
    for layer in student.base_model.model.model.layers:
        layer.self_attn.q_proj.__class__ = type("FSDPLinear", (type(layer.self_attn.q_proj),), {})
    outputs = student(input_ids=IDS, output_hidden_states=True)
    assert adapters.trained_base_parameters(outputs.hidden_states, student) == []


def test_running_statistics_are_found_while_they_change() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    model = transformers.ResNetModel(config)
    settings = peft.LoraConfig(target_modules=["convolution"], modules_to_save=["encoder.stages.1"])
    student = peft.get_peft_model(model, settings).train()
    found = adapters.running_statistics(student)
    assert "embedder.embedder.normalization" in found
    assert not any("encoder.stages.1" in name for name in found)
    for name in found:
        student.base_model.model.get_submodule(name).eval()
    assert adapters.running_statistics(student) == []
    assert adapters.running_statistics(student.eval()) == []
    untracked = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert adapters.running_statistics(untracked) == []
