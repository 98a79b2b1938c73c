"""RIFT in TRL's trainers adds exactly the regulariser's gradient to theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk

transformers = pytest.importorskip("transformers", reason="needs transformers")
datasets = pytest.importorskip("datasets", reason="needs datasets")
peft = pytest.importorskip("peft", reason="needs peft")
trl = pytest.importorskip("trl", reason="needs trl")

from rift_kernels.integrations.transformers import RIFTTrainer  # noqa: E402
from tests.support.trainers import (  # noqa: E402
    VOCABULARY,
    assert_adds_gradient,
    in_order,
    settings,
    texts,
    tokenizer,
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def causal_lm() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def lora() -> Any:
    # Adapters that have an effect from the start, so that the first step has a gradient.
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def adapted(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora())


def regulariser(model: nn.Module) -> rk.RIFTRegularizer:
    """The teacher is another model, or the student without its adapters."""
    torch.manual_seed(5)
    teacher = None if isinstance(model, peft.PeftModel) else type(model)(model.config)
    return rk.RIFTRegularizer(model, teacher, layers="*layers.1", pooling="tokens")


def compare(
    base: type,
    args: Any,
    data: Any,
    model: Any = causal_lm,
    adapters: str = "none",
    **keywords: Any,
) -> None:
    """Train a step with the trainer ``base``, with and without RIFT."""
    keywords |= {"args": args, "train_dataset": data, "processing_class": tokenizer()}
    models = [model() for _ in range(3)]
    if adapters == "of the model":
        models = [adapted(each, seed=0) for each in models]
    student, other, expected = models
    rift: Any = regulariser
    if adapters == "of the trainer":
        keywords["peft_config"] = lora()
        expected = adapted(expected, args.seed)  # as the trainer does
    else:
        rift = regulariser(student)
    trainer = in_order(RIFTTrainer, base)(model=student, rift=rift, **keywords)
    plain = in_order(base)(model=other, **keywords)
    assert_adds_gradient(trainer, plain, expected, regulariser)


LOSSES = {
    "fused": {},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {},
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize(
    ("loss", "adapters"),
    [
        *((loss, "none") for loss in LOSSES),
        ("fused", "of the model"),
        ("compute_loss_func", "of the model"),
        ("fused", "of the trainer"),
        ("label smoothing", "of the trainer"),
    ],
)
def test_sft(tmp_path, loss, adapters) -> None:
    more = {"compute_loss_func": cross_entropy} if loss == "compute_loss_func" else {}
    args = trl.SFTConfig(**settings(tmp_path, **LOSSES[loss]))
    data = datasets.Dataset.from_dict({"text": texts()})
    compare(trl.SFTTrainer, args, data, adapters=adapters, **more)


def test_evaluation_of_sft_has_its_outputs(tmp_path) -> None:
    args = trl.SFTConfig(**settings(tmp_path))
    data = datasets.Dataset.from_dict({"text": texts()})
    keywords = {"args": args, "train_dataset": data, "eval_dataset": data}
    keywords["processing_class"] = tokenizer()
    student = causal_lm()
    rift = regulariser(student)
    trainer = in_order(RIFTTrainer, trl.SFTTrainer)(model=student, rift=rift, **keywords)
    plain = in_order(trl.SFTTrainer)(model=causal_lm(), **keywords)
    trainer.train()
    assert rift.step == 1
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    logits = trainer.predict(trainer.eval_dataset).predictions
    assert logits.shape[-1] == VOCABULARY
    assert rift.step == 1


def preferences() -> Any:
    chosen, rejected = texts(), texts(seed=1)
    prompts = ["w1 w2"] * len(chosen)
    return datasets.Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize("adapters", ["none", "of the trainer"])
def test_dpo(tmp_path, adapters) -> None:
    """Its reference is another pass without gradients, of the same model if that has adapters."""
    args = trl.DPOConfig(**settings(tmp_path))
    more = {} if adapters == "of the trainer" else {"ref_model": causal_lm()}
    compare(trl.DPOTrainer, args, preferences(), adapters=adapters, **more)


def test_reward(tmp_path) -> None:
    def classifier() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SIZES, num_labels=1)
        return transformers.LlamaForSequenceClassification(config)

    args = trl.RewardConfig(**settings(tmp_path))
    compare(trl.RewardTrainer, args, preferences().remove_columns("prompt"), classifier)


def test_a_model_that_the_trainer_wraps_needs_a_function(tmp_path) -> None:
    model = causal_lm()
    args = trl.SFTConfig(**settings(tmp_path))
    data = datasets.Dataset.from_dict({"text": texts()})
    with pytest.raises(
        ValueError, match=r"must be of the Peft\w+ that is trained; got .*rift=lambda model"
    ):
        in_order(RIFTTrainer, trl.SFTTrainer)(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=lora(),
            rift=regulariser(model),
        )
