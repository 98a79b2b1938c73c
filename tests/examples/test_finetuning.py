"""The modules that the finetuning examples share: atomic files, weights, processes."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

pytest.importorskip("tqdm", reason="needs tqdm")

import rift_kernels as rk
from examples.finetuning import checkpoints, pretrained
from examples.finetuning import trainer as training
from examples.finetuning.logs import summary
from examples.finetuning.options import make_parser, rift_settings
from examples.finetuning.processes import UserError, World, report_errors


class Blobs(training.Examples):
    """Points around two centres."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 2
        self.points = torch.randn(count, 6, generator=draw) + 2 * self.labels[:, None]
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.epochs.append(self.epoch)
        return self.points[index], self.labels[index]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def compute_losses(model: nn.Module, batch: tuple[Tensor, Tensor], rift: object) -> training.Losses:
    logits = model(batch[0])
    task = cross_entropy(logits, batch[1])
    total = task if rift is None else task + rift(batch[0])
    return training.Losses(total, task, logits, batch[1])


def trainer(
    out: Path, *options: str, rift: bool = False, count: int = 40, rank: int = 0
) -> training.Trainer:
    arguments = ["--out", str(out), "--workers", "0", "--batch-size", "8", *options]
    parsed = make_parser("test", "", pooling="cls").parse_args(arguments)
    model = Model()
    regulariser = None
    if rift:
        settings = rift_settings(parsed)
        regulariser = rk.RIFTRegularizer(model, Model(), layers="blocks.1", **settings)
    data = training.Data(Blobs(count), Blobs(18, 1))

    def save(model: nn.Module, path: Path) -> None:
        torch.save(model.state_dict(), path)

    world = World(torch.device("cpu"), rank, rank + 1)
    return training.Trainer(model, regulariser, data, compute_losses, save, parsed, world)


def test_rate_rises_and_falls(tmp_path) -> None:
    run = trainer(tmp_path, "--epochs", "4", "--warmup", "0.25", "--lr", "0.5")
    assert run.steps == 5
    rates = []
    for _ in range(20):
        rates.append(run.scheduler.get_last_lr()[0])
        run.optimiser.step()
        run.scheduler.step()
    assert rates[:6] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5 + 5] == pytest.approx(0.5 * (0.5 + 0.5 * math.cos(math.pi / 3)))
    assert run.scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_only_matrices_decay(tmp_path) -> None:
    run = trainer(tmp_path, "--weight-decay", "0.3")
    decayed, not_decayed = run.optimiser.param_groups
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.3, 0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in not_decayed["params"]} == {1}
    assert len(decayed["params"]) == len(not_decayed["params"]) == 3


def test_passes_of_a_step_are_one_batch(tmp_path) -> None:
    """The mean gradient of the passes is that of all their examples at once."""
    four_passes = trainer(tmp_path / "a", "--accumulate", "4", "--epochs", "2", "--lr", "0.1")
    one_pass = trainer(tmp_path / "b", "--batch-size", "32", "--epochs", "2", "--lr", "0.1")
    # 40 examples give one step of 32; the remaining pass of 8 is skipped.
    assert [run.fit().step for run in (four_passes, one_pass)] == [2, 2]
    weights = [run.unwrapped.state_dict() for run in (four_passes, one_pass)]
    torch.testing.assert_close(*weights)


def test_gradients_are_clipped(tmp_path, monkeypatch) -> None:
    norms = []
    step = torch.amp.GradScaler.step

    def spy(self, optimiser):
        grads = [p.grad for group in optimiser.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm(grads)))
        return step(self, optimiser)

    monkeypatch.setattr(torch.amp.GradScaler, "step", spy)
    trainer(tmp_path / "a", "--epochs", "1", "--clip", "0").fit()
    unclipped = norms[0]
    norms.clear()
    trainer(tmp_path / "b", "--epochs", "1", "--clip", str(unclipped / 2)).fit()
    assert norms[0] == pytest.approx(unclipped / 2, rel=1e-3)
    norms.clear()
    # Half precision scales gradients; they are unscaled before clipping.
    trainer(tmp_path / "c", "--epochs", "1", "--clip", "1e3", "--amp", "fp16").fit()
    assert norms[0] == pytest.approx(unclipped, rel=0.05)


def test_steps_skipped_for_an_overflow_do_not_lower_the_rate(tmp_path) -> None:
    run = trainer(tmp_path, "--epochs", "2", "--amp", "fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    assert run.fit().step == 10
    skipped = 22 - math.log2(run.scaler.get_scale())
    assert 0 < skipped < 10
    assert run.scheduler.last_epoch == 10 - skipped


def test_options_become_settings() -> None:
    def settings(*options: str) -> dict[str, Any]:
        return rift_settings(make_parser("", "", "mean").parse_args(["--out", "x", *options]))

    assert settings() == {"measure": "cka", "weight": 1.0, "pooling": "mean", "group": "world"}
    actual = settings("--margin", "0.2", "--measure", "bures", "--pooling", "cls", "--weight", "3")
    expected = {"measure": "bures", "weight": 3.0, "pooling": "cls", "group": "world"}
    assert actual == {**expected, "margin": 0.2}
    assert settings("--weight", "auto:0.8")["weight"].target_similarity == 0.8


def test_epochs_have_each_example_once_in_different_orders(tmp_path) -> None:
    run = trainer(tmp_path)
    epochs = [run.epoch_batches(epoch) for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    for batches in epochs:
        assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert trainer(tmp_path, "--seed", "1").epoch_batches(0) != epochs[0]


def test_processes_share_an_epoch_and_differ_in_dropout(tmp_path) -> None:
    second = trainer(tmp_path, rank=1).epoch_batches(3)
    assert torch.initial_seed() == 0 + 1 + 1
    alone = trainer(tmp_path).epoch_batches(3)
    assert torch.initial_seed() == 0 + 1
    assert [i for batch in second for i in batch] == [i for batch in alone for i in batch][1:32:2]


def test_data_know_their_epoch(tmp_path) -> None:
    run = trainer(tmp_path, "--epochs", "3")
    run.fit()
    assert run.data.train.epochs == [0] * 40 + [1] * 40 + [2] * 40
    assert run.data.val.epochs == [0] * 18 * 3


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_mixed_precision_in_training_and_validation(amp, tmp_path) -> None:
    run = trainer(tmp_path, "--epochs", "1", "--amp", amp, rift=True)
    dtypes, modes = [], []

    def spy(model: nn.Module, *arguments: Any) -> training.Losses:
        losses = compute_losses(model, *arguments)
        dtypes.append(losses.logits.dtype)
        modes.append(model.training)
        return losses

    run.compute_losses = spy
    run.fit()
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert dtypes == [dtype] * (5 + 3)
    assert modes == [True] * 5 + [False] * 3
    assert run.scaler.is_enabled() == (amp == "fp16")
    assert {p.dtype for p in run.unwrapped.parameters()} == {torch.float32}


def test_validation_uses_every_example(tmp_path) -> None:
    """The 18 examples are two batches of 8, and a batch of 2, which is too small to compare."""
    run = trainer(tmp_path, rift=True)
    with torch.no_grad():
        for parameter in run.unwrapped.blocks.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    metrics = run.validate()
    data = run.data.val
    with torch.no_grad():
        logits = run.unwrapped(data.points)
        assert metrics["val_loss"] == pytest.approx(float(cross_entropy(logits, data.labels)))
        hits = (logits.argmax(1) == data.labels).double()
        assert metrics["val_accuracy"] == pytest.approx(float(hits.mean()))
        similarities = [
            float(rk.linear_cka(run.unwrapped.blocks(x), Model().blocks(x)))
            for x in (data.points[:8], data.points[8:16])
        ]
    assert metrics["val_similarity/blocks.1"] == pytest.approx(sum(similarities) / 2, abs=1e-5)
    assert set(metrics) == {"val_loss", "val_accuracy", "val_similarity/blocks.1"}
    # Validation does not advance the schedule.
    assert run.rift.step == 0


def test_weight_warms_up_over_steps(tmp_path, monkeypatch) -> None:
    options = ("--accumulate", "2", "--warmup-rift", "2", "--weight", "3", "--epochs", "2")
    run = trainer(tmp_path, *options, rift=True)
    factors = []
    schedule = run.rift.schedule
    monkeypatch.setattr(
        run.rift, "schedule", lambda step: factors.append(schedule(step)) or factors[-1]
    )
    run.fit()
    passes = [0, 0.25, 0.5, 0.75]  # two steps in an epoch, two passes in a step
    validation = [1.0, 1.0]
    assert factors == [*passes, *validation, *[1.0] * 4, *validation]


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    """The loss was finite in the step before."""
    run = trainer(tmp_path)
    run._check_finite([1.0])
    with torch.no_grad():
        run.unwrapped.head.bias[0] = math.nan
    with pytest.raises(UserError, match="the loss or the weights are not finite"):
        run._save()
    assert checkpoints.newest(tmp_path / "checkpoints") is None


def test_another_number_of_examples_is_another_run(tmp_path) -> None:
    trainer(tmp_path, "--epochs", "1").fit()
    with pytest.raises(UserError, match=r"--resume needs examples 40, as in .*; got 41"):
        trainer(tmp_path, "--epochs", "1", "--resume", count=41).fit()
    other = trainer(tmp_path, "--epochs", "1", "--resume")
    other.unwrapped.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"another model: only one of them has 'extra\.bias'"):
        other.fit()


def test_summary(tmp_path) -> None:
    run = trainer(tmp_path, "--epochs", "3", "--lr", "0.05", rift=True)
    progress = run.fit()
    text = summary(progress, tmp_path)
    best = max(row["val_accuracy"] for row in progress.history)
    assert "3 epochs, 15 steps" in text
    assert f"accuracy {100 * best:.1f}%" in text
    best_row = progress.history[progress.best_epoch - 1]
    assert best_row["val_accuracy"] == best
    assert f"similarity/blocks.1: {best_row['val_similarity/blocks.1']:.3f}" in text


def test_writes_are_atomic(tmp_path) -> None:
    def write_half(path: Path) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        raise KeyboardInterrupt

    def write_folder(path: Path) -> None:
        path.mkdir()
        (path / "new").write_text("whole")

    for write in (lambda path: path.write_text("old"), write_folder):
        is_folder = write is write_folder
        target = tmp_path / f"target {is_folder}"
        checkpoints.write(target, write)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write(target, write_half)
        file = target / "new" if is_folder else target
        assert file.read_text() == ("whole" if is_folder else "old")
        checkpoints.write(target, write)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert (target / "new").read_text() == "whole"


def test_the_newest_checkpoint_has_the_last_step(tmp_path) -> None:
    assert checkpoints.newest(tmp_path / "none") is None
    for step in (2, 10, 9):
        checkpoints.save({"step": step}, tmp_path, step, keep=2)
    (tmp_path / ".step-000000099.pt.part").write_text("not whole")
    (tmp_path / "step-x.pt").write_text("another file")
    path = checkpoints.newest(tmp_path)
    assert checkpoints.load(path) == {"step": 10}
    assert sorted(p.name for p in tmp_path.glob("step-0*")) == [
        "step-000000009.pt",
        "step-000000010.pt",
    ]


def test_random_state_is_restored() -> None:
    state = checkpoints.random_state()
    first = torch.rand(3)
    checkpoints.set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_last_block_is_in_the_outermost_stack() -> None:
    model = Model()
    assert pretrained.last_block(model) == "blocks.1"
    with pytest.raises(ValueError, match=r"Linear has no stack of blocks .* with --layers"):
        pretrained.last_block(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["finetune_vit", "finetune_text"])
def test_documented_commands_parse(name) -> None:
    """The commands are parsed, not run."""
    module = importlib.import_module(f"examples.{name}")
    table = (Path(module.__file__).parent / "README.md").read_text()
    text = (module.__doc__ + table).replace("\\\n", " ")
    commands = re.findall(rf"-m examples\.{name} ([^`\n]*--out [\w/]+)", text)
    assert len(commands) == 3 + 1
    for command in commands:
        options = module.parse(shlex.split(command))
        assert options.out.parts[0] == "runs"
        assert options.model in table + "tiny-random"


def test_errors_are_reported_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"^error: wrong$"), report_errors():
        raise UserError("wrong")
    with pytest.raises(SystemExit, match=r"^error: missing$"), report_errors(OSError):
        raise FileNotFoundError("missing")
    with pytest.raises(ValueError, match="a bug"), report_errors(OSError):
        raise ValueError("a bug")


class Timm(Model):
    """Like timm's models: get_classifier returns the head, and the output is only logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)[:, :6])


@pytest.mark.parametrize("lora", [False, True])
def test_timm(lora, tmp_path, monkeypatch) -> None:
    """Uses a stand-in for timm, which itself needs torchvision."""
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow")
    pytest.importorskip("safetensors", reason="needs safetensors")
    if lora:
        pytest.importorskip("peft", reason="needs peft")
    from examples import finetune_vit

    requested = {}

    def create_model(name: str, **settings: object) -> nn.Module:
        requested.update(settings, name=name)
        return Timm(settings["num_classes"])

    preprocessing = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    data = SimpleNamespace(resolve_model_data_config=lambda _: preprocessing)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, data=data))
    for part in ("train", "val"):
        for shade, name in ((40, "dark"), (200, "light"), (120, "middle")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                image = image_module.new("RGB", (9, 9), (shade + i, shade, shade))
                image.save(tmp_path / part / name / f"{i}.png")
    options = [str(tmp_path), "--model", "timm:vit_small", "--out", str(tmp_path / "out")]
    options += ["--workers", "0", "--device", "cpu", "--batch-size", "4", "--epochs", "1"]
    assert (
        finetune_vit.main([*options, *(("--lora", "2", "--lora-target", "1") if lora else ())]) == 0
    )
    assert requested == {"name": "vit_small", "pretrained": True, "num_classes": 3}
    weights = checkpoints.load(checkpoints.newest(tmp_path / "out/checkpoints"))["model"]
    saved = {path.name for path in (tmp_path / "out/best").iterdir()}
    if lora:
        assert {"adapter_model.safetensors", "classes.json"} <= saved
        assert all("lora" in name or "head.modules_to_save" in name for name in weights)
    else:
        assert saved == {"model.safetensors", "classes.json"}
        assert set(weights) == set(Timm(3).state_dict())
