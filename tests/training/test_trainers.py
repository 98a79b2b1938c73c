"""RIFT in Hugging Face's Trainer, in Lightning and with Accelerate equals a plain loop."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support.tiny_models import bart, perturbed, t5

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

RATE, ROWS = 0.1, 12


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


class Plain(nn.Module):
    """A plain module, because the Trainer cannot load the names under which it saves a ViT."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 3))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixel_values.flatten(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4 * ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3}


def regulariser(model: nn.Module, **settings: Any) -> rk.RIFTRegularizer:
    return rk.RIFTRegularizer(model, perturbed(model), layers="*layers.1", weight=3.0, **settings)


def batches(rows: int = ROWS) -> list[dict[str, Tensor]]:
    return list(torch.utils.data.DataLoader(Images(), rows))


def trained_by_hand(
    steps: int, accumulate: int = 1, rift: bool = True, **settings: Any
) -> dict[str, Tensor]:
    """The weights after a plain loop with SGD."""
    model = vit().train()
    regularizer = regulariser(model, **settings) if rift else None
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    stream = iter(batches())
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            batch = next(stream)
            loss = model(**batch).loss
            if regularizer is not None:
                loss = loss + regularizer(**batch)
            (loss / accumulate).backward()
        optimizer.step()
    return model.state_dict()


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def rift_trainer(folder: Path, model: nn.Module | None, rift: Any, **settings: Any) -> Any:
    """A trainer; ``model_init`` and ``eval_dataset`` are its own arguments."""
    from rift_kernels.integrations.transformers import RIFTTrainer

    own = {name: settings.pop(name) for name in ("model_init", "eval_dataset") if name in settings}

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": ROWS,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **settings,
        },
    )

    class InOrder(RIFTTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(model=model, args=args, train_dataset=Images(), rift=rift, **own)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers_trainer(tmp_path, accumulate) -> None:
    model = vit()
    rift = regulariser(model)
    trainer = rift_trainer(
        tmp_path, model, rift, gradient_accumulation_steps=accumulate, max_steps=2
    )
    trainer.train()
    assert_same_weights(model, trained_by_hand(2, accumulate))
    plain = trained_by_hand(2, accumulate, rift=False)
    with pytest.raises(AssertionError):
        assert_same_weights(model, plain)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert all({"rift/weight", "rift/similarity/vit.layers.1"} <= set(line) for line in logged)
    assert rift.step == 2 * accumulate


def test_transformers_evaluation_is_unchanged(tmp_path) -> None:
    model = vit()
    trainer = rift_trainer(tmp_path, model, regulariser(model))
    metrics = trainer.evaluate(Images())
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(**batch).loss for batch in batches()]).mean()
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert trainer.rift.step == 0


def test_transformers_checkpoints_have_the_regularisers_state(tmp_path) -> None:
    """An adaptive weight and a schedule resume."""

    def start() -> Any:
        model = Plain()
        weight = rk.AdaptiveWeight(0.999, rate=5.0)
        rift = rk.RIFTRegularizer(model, perturbed(model), layers="layers.1", weight=weight)
        return rift_trainer(tmp_path, model, rift, max_steps=3, save_strategy="steps", save_steps=1)

    whole = start()
    whole.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.rift.step == 3
    assert torch.equal(resumed.rift.loss.weight.value, whole.rift.loss.weight.value)
    assert_same_weights(resumed.model, whole.model.state_dict())
    (tmp_path / "checkpoint-2" / "rift.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"rift\.pt is missing"):
        start().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_transformers_teacher_runs_under_the_trainings_autocast(tmp_path) -> None:
    model = Plain()
    teacher = perturbed(model)
    dtypes: list[torch.dtype] = []
    teacher.layers[1].register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    rift = rk.RIFTRegularizer(model, teacher, layers="layers.1")
    rift_trainer(tmp_path, model, rift, bf16=True, max_steps=1).train()
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("each_node", [False, True])
def test_transformers_checkpoints_of_a_second_node(tmp_path, monkeypatch, each_node) -> None:
    """Nodes without a shared folder each resume from their own."""
    model = Plain()
    rift = rk.RIFTRegularizer(model, perturbed(model), layers="layers.1")
    trainer = rift_trainer(tmp_path, model, rift, save_on_each_node=each_node)
    trainer.state.is_world_process_zero = False
    monkeypatch.setattr(transformers.TrainingArguments, "process_index", 1)
    trainer.save_model(str(tmp_path / "checkpoint-0"), _internal_call=True)
    assert (tmp_path / "checkpoint-0" / "rift.pt").exists() == each_node


def test_transformers_trains_a_learned_rotation(tmp_path) -> None:
    model = vit()
    widths = {"student_width": 16, "teacher_width": 16}
    rift = regulariser(model, measure="covariance", rotation="learned", **widths)
    before = rift.loss.rotation.weight.detach().clone()
    rift_trainer(tmp_path, model, rift).train()
    assert not torch.equal(rift.loss.rotation.weight, before)


def test_transformers_with_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    rift = rk.RIFTRegularizer(model, layers="*layers.1", weight=1.0)
    trainer = rift_trainer(tmp_path, model, rift)
    trainer.train()
    similarity = trainer.state.log_history[0]["rift/similarity/vit.layers.1"]
    # Before the first step the adapters have no effect.
    assert similarity == pytest.approx(1.0, abs=1e-5)


def test_transformers_errors(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"must be a RIFTRegularizer or a function .*; got float"):
        rift_trainer(tmp_path, vit(), 0.3)


def test_transformers_processes_that_would_diverge_raise() -> None:
    from rift_kernels.integrations.transformers import _check_shared

    for settings in (
        {"weight": rk.AdaptiveWeight(0.9)},
        {
            "measure": "covariance",
            "rotation": "learned",
            "student_width": 16,
            "teacher_width": 16,
        },
    ):
        model = vit()
        with rk.RIFTRegularizer(model, perturbed(model), layers="*layers.1", **settings) as rift:
            _check_shared(rift, 1)  # fine in a single process
            with pytest.raises(ValueError, match="must have group='world' for an adaptive weight"):
                _check_shared(rift, 2)
        model = vit()
        settings |= {"group": "world"}
        with rk.RIFTRegularizer(model, perturbed(model), layers="*layers.1", **settings) as rift:
            _check_shared(rift, 2)


def test_transformers_runs_the_student_once_a_step(tmp_path) -> None:
    """A loss is asked for outputs only where the Trainer needs them."""
    model = vit()
    trainer = rift_trainer(tmp_path, model, regulariser(model))
    asked: list[bool] = []

    class Base(transformers.Trainer):
        def compute_loss(self, *args: Any, return_outputs: bool = False, **keywords: Any) -> Any:
            asked.append(return_outputs)
            return super().compute_loss(*args, return_outputs=return_outputs, **keywords)

    kind = type(trainer)
    trainer.__class__ = type("Trainer", (kind.__mro__[0], kind.__mro__[1], Base), {})
    trainer.train()
    assert asked == [False, False]
    trainer.prediction_step(model, batches()[0], prediction_loss_only=False)
    assert asked[2:] == [True]


def test_transformers_refuses_a_regulariser_of_another_model(tmp_path) -> None:
    model, other = vit(), vit()
    with pytest.raises(ValueError, match="of the ViTForImageClassification that is trained"):
        rift_trainer(tmp_path, model, regulariser(other))
    with pytest.raises(ValueError, match="got one of another Optimized"):
        rift_trainer(tmp_path, model, regulariser(torch.compile(model)))
    with pytest.raises(TypeError, match="rift must return a RIFTRegularizer; got NoneType"):
        rift_trainer(tmp_path, model, lambda _: None)
    inner = rk.RIFTRegularizer(model.vit, perturbed(model.vit), layers="layers.1")
    rift_trainer(tmp_path, model, inner).train()
    assert inner.step == 2


def test_transformers_makes_a_regulariser_of_each_trials_model(tmp_path, monkeypatch) -> None:
    made: list[rk.RIFTRegularizer] = []

    def make(model: Plain) -> rk.RIFTRegularizer:
        assert type(model) is Plain
        made.append(rk.RIFTRegularizer(model, perturbed(model), layers="layers.1"))
        return made[-1]

    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = rift_trainer(tmp_path, None, make, model_init=Plain, **saving)
    # What hyperparameter_search does for each trial, without Optuna.
    monkeypatch.setattr(transformers.integrations, "hp_params", vars)
    trainer.hp_search_backend = transformers.trainer_utils.HPSearchBackend.OPTUNA
    trainer.hp_space = lambda _: {"learning_rate": 0.01}
    for number in (0, 1):
        trainer.train(trial=SimpleNamespace(number=number, params={}))
    assert [rift.step for rift in made] == [0, 2, 2]
    assert trainer.rift is made[-1]
    assert trainer.rift.student is trainer.model
    assert [len(rift.student.layers[1]._forward_hooks) for rift in made] == [0, 0, 1]
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("rift.pt")}
    assert folders == {f"run-{run}/checkpoint-{step}" for run in (0, 1) for step in (1, 2)}
    with pytest.raises(ValueError, match=r"rift must be a function with model_init, .* got a RIFT"):
        rift_trainer(tmp_path, None, regulariser(vit()), model_init=vit)


def test_transformers_checkpoints_of_a_preempted_job_have_the_regularisers_state(tmp_path) -> None:
    """They are saved without the event on_save."""
    model = Plain()
    rift = rk.RIFTRegularizer(model, perturbed(model), layers="layers.1")
    trainer = rift_trainer(tmp_path, model, rift)
    trainer.train()
    trainer._save_checkpoint(model, trial=None)
    assert torch.load(tmp_path / "checkpoint-2" / "rift.pt")["steps"] == 2


def test_transformers_resumes_where_another_library_loads_the_model(tmp_path, monkeypatch) -> None:
    """With DeepSpeed, the Trainer does not load the model itself."""

    def start() -> Any:
        model = Plain()
        rift = rk.RIFTRegularizer(model, perturbed(model), layers="layers.1")
        saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return rift_trainer(tmp_path, model, rift, **saving)

    start().train()
    resumed = start()
    monkeypatch.setattr(type(resumed), "_load_from_checkpoint", lambda *_: None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.rift.step == 3


def test_transformers_begins_again_with_smaller_batches(tmp_path) -> None:
    """A pass that did not fit into memory is neither kept nor compared."""
    model = Plain()
    rift = rk.RIFTRegularizer(model, perturbed(model), layers="layers.1")
    trainer = rift_trainer(tmp_path, model, rift, auto_find_batch_size=True, max_steps=1)
    sizes: list[int] = []

    def fail_once(_: nn.Module, __: Any, output: Any) -> None:
        sizes.append(len(output["logits"]))
        if len(sizes) == 1:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_hook(fail_once)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the student ran more than once")
        trainer.train()
    assert sizes[0] == ROWS > sizes[1]
    assert rift.step == 1


def test_transformers_needs_a_learned_rotation_in_the_optimizer(tmp_path) -> None:
    model = vit()
    widths = {"student_width": 16, "teacher_width": 16}
    rift = regulariser(model, measure="covariance", rotation="learned", **widths)
    trainer = rift_trainer(tmp_path, model, rift)
    trainer.optimizer = torch.optim.SGD(model.parameters(), RATE)
    with pytest.raises(ValueError, match="optimizers must have the parameters of rift"):
        trainer.train()


class Pairs(torch.utils.data.Dataset):
    """Inputs and labels with padding."""

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids, labels = torch.randint(3, 32, (2, 7), generator=generator)
        mask = torch.arange(7) < 4 + i % 4
        labels = labels.masked_fill(torch.arange(7) > 3 + i % 3, -100)
        return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (t5, ["encoder.block.1", "decoder.block.1"]),
        (bart, ["model.encoder.layers.1", "model.decoder.layers.1"]),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_transformers_sequence_to_sequence(tmp_path, build, layers, smoothing) -> None:
    """The decoder's inputs are made of labels, by the model or by the collator."""
    from rift_kernels.integrations.transformers import RIFTTrainer

    class Both(RIFTTrainer, transformers.Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    model = build()
    rift = rk.RIFTRegularizer(model, copy.deepcopy(model), layers=layers, pooling="mean")
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=ROWS,
        logging_steps=1,
        learning_rate=1e-2,
        label_smoothing_factor=smoothing,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = torch.utils.data.default_collate(rows)
        made = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch | ({"decoder_input_ids": made} if smoothing else {})

    trainer = Both(model=model, args=args, train_dataset=Pairs(), rift=rift, data_collator=collate)
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "loss" in line)
    similarities = [f"rift/similarity/{layer}" for layer in layers]
    assert [first[name] for name in similarities] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(second[name] < 1 - 1e-6 for name in similarities)


class Texts(torch.utils.data.Dataset):
    """Token ids, and which are valid by a name that no library has."""

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        valid = torch.arange(7) < 3 + i % 5
        return {"ids": torch.randint(16, (7,), generator=generator), "valid": valid}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
        tokens = self.layer(self.embedding(ids))
        return {"loss": tokens[valid].square().mean(), "logits": tokens}


def masked_regulariser(model: Tagger, mask: Any) -> rk.RIFTRegularizer:
    return rk.RIFTRegularizer(
        model, perturbed(model), layers="layer", pooling="mean", token_mask=mask
    )


def tagged_by_hand() -> dict[str, Tensor]:
    """The weights after a step with features that are averaged by hand."""
    model = Tagger()
    batch = next(iter(torch.utils.data.DataLoader(Texts(), ROWS)))
    keep = batch["valid"][..., None]
    student, teacher = (
        (each(**batch)["logits"] * keep).sum(1) / keep.sum(1) for each in (model, perturbed(model))
    )
    (model(**batch)["loss"] + rk.RIFTLoss("cka")(student, teacher.detach())).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    return model.state_dict()


MASKS = {"name": "valid", "function": lambda call: call["valid"], "by layer": {"layer": "valid"}}


@pytest.mark.parametrize("mask", MASKS)
def test_transformers_takes_the_regularisers_mask(tmp_path, mask) -> None:
    model = Tagger()
    trainer = rift_trainer(tmp_path, model, masked_regulariser(model, MASKS[mask]), max_steps=1)
    trainer.train_dataset = Texts()
    trainer.train()
    assert_same_weights(model, tagged_by_hand())


@pytest.mark.parametrize("how", ["offloaded", "dispatched"])
def test_a_dispatched_teacher_stays(how) -> None:
    import accelerate

    model = vit()
    teacher = perturbed(model)
    if how == "offloaded":  # its parameters are on meta until a layer runs
        accelerate.cpu_offload(teacher, "cpu")
    else:
        accelerate.dispatch_model(teacher, {"": "cpu"}, force_hooks=True)
    places = [parameter.device.type for parameter in teacher.parameters()]
    expected = regulariser(model)
    rift = rk.RIFTRegularizer(model, teacher, layers="*layers.1", weight=3.0)
    rift.move_teacher("cpu")
    assert [parameter.device.type for parameter in teacher.parameters()] == places
    model(**batches()[0])
    torch.testing.assert_close(rift(), expected())


class Quantised(nn.Linear):
    """Refuses to be moved, as some quantised models do."""

    def to(self, *_: Any, **__: Any) -> Any:
        raise ValueError(".to is not supported for 8-bit models")


def test_a_quantised_teacher_is_moved_only_if_need_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with rk.RIFTRegularizer(model, Quantised(4, 4), layers={"0": ""}) as rift:
        rift.move_teacher("cpu")
        with pytest.raises(
            ValueError,
            match=r"teacher must be on meta, .* got one on cpu whose .to\('meta'\) raises",
        ):
            rift.move_teacher("meta")


def test_accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = vit().train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    loader = torch.utils.data.DataLoader(Images(), ROWS)
    student, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    rift = regulariser(student)
    rift.move_teacher(accelerator.device)
    for batch, _ in zip(loader, range(2), strict=False):
        loss = student(**batch).loss + rift(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(model, trained_by_hand(2))


lightning = pytest.importorskip("lightning", reason="needs lightning")


class Module(lightning.LightningModule):
    def __init__(self, as_mapping: bool = False) -> None:
        super().__init__()
        self.model = vit()
        self.as_mapping = as_mapping

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:  # noqa: ARG002
        loss = self.model(**batch).loss
        return {"loss": loss} if self.as_mapping else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), RATE)


def fit(module: Module, callbacks: Any, folder: Path, data: Any = None, **settings: Any) -> Any:
    settings = {"max_steps": 2, **settings}
    checkpoint = settings.pop("ckpt_path", None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(data or Images(), ROWS)
        trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_lightning(tmp_path, accumulate, as_mapping) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Module(as_mapping)
    callback = RIFTCallback(regulariser(module.model))
    trainer = fit(module, callback, tmp_path, accumulate_grad_batches=accumulate)
    assert_same_weights(module.model, trained_by_hand(2, accumulate))
    assert "rift/similarity/vit.layers.1" in trainer.callback_metrics
    assert "training_step" not in vars(module)


def test_lightning_checkpoints_have_the_regularisers_state(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    def start() -> tuple[Module, Any]:
        module = Module()
        weight = rk.AdaptiveWeight(0.999, rate=5.0)
        rift = rk.RIFTRegularizer(
            module.model, perturbed(module.model), layers="*layers.1", weight=weight
        )
        return module, RIFTCallback(rift)

    module, callback = start()
    # Epochs of one batch, because Lightning restarts the epoch in which it was stopped.
    limit = {"limit_train_batches": 1}
    fit(module, callback, tmp_path, max_steps=1, **limit).save_checkpoint(tmp_path / "one.ckpt")
    resumed, second = start()
    fit(resumed, second, tmp_path, max_steps=3, **limit, ckpt_path=tmp_path / "one.ckpt")
    whole, third = start()
    fit(whole, third, tmp_path, max_steps=3, **limit)
    assert second.rift.step == third.rift.step == 3
    assert torch.equal(second.rift.loss.weight.value, third.rift.loss.weight.value)
    assert_same_weights(resumed.model, whole.model.state_dict())


class Troubled(Module):
    """Fails in its first step, or skips batches before or after running the model."""

    trouble = ""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        if self.trouble == "fails":
            raise RuntimeError("out of luck")
        if self.trouble == "skips before":
            return None
        loss = super().training_step(batch, batch_idx)
        return None if self.trouble == "skips after" else loss


def test_lightning_fits_again_after_an_error(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Troubled()
    callback = RIFTCallback(regulariser(module.model))
    module.trouble = "fails"
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, callback, tmp_path)
    assert "training_step" not in vars(module)
    module.trouble = ""
    fit(module, callback, tmp_path)
    assert_same_weights(module.model, trained_by_hand(2))


@pytest.mark.parametrize("trouble", ["skips before", "skips after"])
def test_lightning_skips_batches_that_the_step_skips(tmp_path, trouble) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Troubled()
    callback = RIFTCallback(regulariser(module.model))
    module.trouble = trouble
    fit(module, callback, tmp_path, max_steps=-1, max_epochs=1)
    assert callback.rift.step == 0


class Tagging(Module):
    def __init__(self, in_parts: bool = False) -> None:
        super().__init__()
        self.model = Tagger()
        self.in_parts = in_parts

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        if self.in_parts:
            tokens = self.model.layer(self.model.embedding(batch["ids"]))
            return tokens[batch["valid"]].square().mean()
        return self.model(**batch)["loss"]


def test_lightning_takes_the_regularisers_mask(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Tagging()
    callback = RIFTCallback(masked_regulariser(module.model, "valid"))
    fit(module, callback, tmp_path, Texts(), max_steps=1)
    assert_same_weights(module.model, tagged_by_hand())


INPUTS = {
    "a mapping": lambda batch: {"ids": batch["ids"], "valid": batch["valid"]},
    "a pair": lambda batch: ((batch["ids"],), {"valid": batch["valid"]}),
    "a tuple": lambda batch: (batch["ids"], batch["valid"]),
    "a list": lambda batch: [batch["ids"], batch["valid"]],
}


@pytest.mark.parametrize("inputs", INPUTS)
def test_lightning_calls_the_teacher_with_other_inputs(tmp_path, inputs) -> None:
    """The student is called in parts, so that its own arguments are not known."""
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Tagging(in_parts=True)
    callback = RIFTCallback(masked_regulariser(module.model, "valid"), INPUTS[inputs])
    fit(module, callback, tmp_path, Texts(), max_steps=1)
    assert_same_weights(module.model, tagged_by_hand())


def test_lightning_calls_the_teacher_with_a_tensor(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Module()
    callback = RIFTCallback(regulariser(module.model), lambda batch: batch["pixel_values"])
    fit(module, callback, tmp_path)
    assert_same_weights(module.model, trained_by_hand(2))
    wrong = RIFTCallback(regulariser(module.model), lambda _: 3)
    with pytest.raises(TypeError, match=r"inputs must return a mapping, a pair .*; got int"):
        fit(module, wrong, tmp_path)


def test_lightning_with_two_regularisers(tmp_path) -> None:
    """Of one student, in two callbacks with states and metrics of their own."""
    from rift_kernels.integrations.lightning import RIFTCallback

    def pair(model: nn.Module) -> list[rk.RIFTRegularizer]:
        teacher = perturbed(model)
        return [rk.RIFTRegularizer(model, teacher, layers=f"*layers.{i}") for i in (0, 1)]

    module = Module()
    callbacks = [
        RIFTCallback(rift, name=name)
        for rift, name in zip(pair(module.model), ("low", "high"), strict=True)
    ]
    trainer = fit(module, callbacks, tmp_path, max_steps=1)
    model = vit().train()
    both = pair(model)
    batch = batches()[0]
    (model(**batch).loss + both[0]() + both[1]()).backward()
    for parameter in model.parameters():
        parameter.data -= RATE * parameter.grad
    assert_same_weights(module.model, model.state_dict())
    assert {"rift/low/weight", "rift/high/similarity/vit.layers.1"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=False)["callbacks"]
    assert [state["steps"] for state in states.values()] == [1, 1]
    assert "training_step" not in vars(module)


def test_lightning_fits_a_compiled_module_twice(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Module()
    callback = RIFTCallback(regulariser(module.model))
    compiled = torch.compile(module, backend="eager")
    fit(compiled, callback, tmp_path, max_steps=1)
    step = vars(module)["training_step"]  # Lightning's own compiled one
    assert not hasattr(step, "is_rift")
    fit(module, callback, tmp_path, max_steps=1)
    assert vars(module)["training_step"] is step
    assert callback.rift.step == 2


def test_lightning_in_spawned_processes(tmp_path) -> None:
    """The module and the callback are pickled together."""
    from rift_kernels.integrations.lightning import RIFTCallback

    module = Module()
    callback = RIFTCallback(regulariser(module.model, group="world"))
    trainer = fit(module, callback, tmp_path, max_steps=1, strategy="ddp_spawn", devices=1)
    assert "rift/similarity/vit.layers.1" in trainer.callback_metrics


def test_lightning_errors(tmp_path) -> None:
    from rift_kernels.integrations.lightning import RIFTCallback

    with pytest.raises(TypeError, match="rift must be a RIFTRegularizer; got int"):
        RIFTCallback(1)
    module = Module()
    with pytest.raises(TypeError, match="inputs must be callable or None; got str"):
        RIFTCallback(regulariser(module.model), "pixel_values")
    with pytest.raises(ValueError, match="rift must be of the Module that is trained"):
        fit(module, RIFTCallback(regulariser(vit())), tmp_path)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimisation"):
        fit(module, RIFTCallback(regulariser(module.model)), tmp_path)
    module = Module()
    widths = {"student_width": 16, "teacher_width": 16}
    learned = regulariser(module.model, measure="covariance", rotation="learned", **widths)
    with pytest.raises(ValueError, match="rift must be an attribute of the LightningModule"):
        fit(module, RIFTCallback(learned), tmp_path)
    module.rift = learned
    fit(module, RIFTCallback(learned), tmp_path)
