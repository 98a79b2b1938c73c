"""examples.finetune_vit end to end, on images of two colours and an untrained model."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="needs pillow")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("tqdm", reason="needs tqdm")

import rift_kernels as rk  # noqa: E402
from examples import finetune_vit  # noqa: E402
from examples.finetuning import images  # noqa: E402
from tests.support.finetuned import (  # noqa: E402
    QUICK,
    assert_resumes,
    assert_same,
    column,
    command,
    rows,
    state,
)

COLOURS = {"blue": (60, 60, 190), "red": (190, 60, 60)}
TINY = ("--model", "tiny-random", "--batch-size", "8", *QUICK)


def write_images(folder: Path, count: int, seed: int) -> None:
    """Images of noise around a colour, wider than high."""
    draw = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(colour + draw.normal(0, 50, (18, 22, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    write_images(path / "train", 16, 0)
    write_images(path / "val", 9, 1)
    return path


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, with another number of classes and no dropout."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, intermediate_size=32, num_labels=5, **sizes
    )
    path = tmp_path_factory.mktemp("pretrained")
    transformers.ViTForImageClassification(config).save_pretrained(path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"height": 12}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def run(folder: Path, out: Path, *options: str) -> Path:
    assert finetune_vit.main([str(folder), *TINY, "--out", str(out), *options]) == 0
    return out


def test_learns_and_writes(folder, tmp_path, capsys) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    options = ("--epochs", "3", "--tensorboard", "--log-every", "2")
    out = run(folder, tmp_path / "strong", *options, "--weight", "10")
    accuracy = column(out, "val_accuracy")
    assert accuracy[-1] >= 0.9
    assert column(out, "train_task_loss")[-1] < 0.5 * column(out, "train_task_loss")[0]
    assert [row["epoch"] for row in rows(out)] == [1, 2, 3]
    assert rows(out)[-1]["step"] == 3 * 4
    # The loss shows the weight; the similarity of features of noise after 12 steps would not.
    weak = run(folder, tmp_path / "weak", "--epochs", "1", "--weight", "0.01")
    strong_loss, weak_loss = (
        rows(path)[0]["train_loss"] - rows(path)[0]["train_task_loss"] for path in (out, weak)
    )
    assert strong_loss > 100 * weak_loss > 0
    output = capsys.readouterr().out
    assert f"best: epoch {1 + accuracy.index(max(accuracy))}, accuracy" in output
    assert "epoch 3/3: loss" in output
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("task")] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Scalars("val_accuracy")] == [4, 8, 12]
    assert "rift/similarity/vit.layers.1" in events.Tags()["scalars"]
    # The newest two checkpoints, and no partial files.
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-000000008.pt", "step-000000012.pt"]
    assert not list(out.rglob(".*"))


def test_the_best_model_is_saved_for_its_library(folder, pretrained, tmp_path) -> None:
    """A model from a folder gets a new head, its own preprocessing, and its last block."""
    options = ("--model", str(pretrained), "--epochs", "2", "--amp", "bf16", "--pooling", "mean")
    out = run(folder, tmp_path / "out", *options, "--margin", "0.1", "--measure", "procrustes")
    assert "val_similarity/vit.layers.2" in rows(out)[0]
    saved = transformers.ViTForImageClassification.from_pretrained(out / "best")
    assert saved.config.id2label == {0: "blue", 1: "red"}
    assert saved.classifier.weight.shape == (2, 16)
    assert saved.dtype == torch.float32
    settings = json.loads((out / "best/preprocessor_config.json").read_text())
    assert settings["image_std"] == [0.5, 0.6, 0.7]
    assert settings["size"] == {"height": 12, "width": 12}
    assert json.loads((out / "best/classes.json").read_text()) == ["blue", "red"]
    # The saved model has the best accuracy.
    preprocessing = images.Preprocessing(12, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    data = images.Images(folder / "val", ["blue", "red"], preprocessing, 0)
    pixels, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    with torch.no_grad():
        hits = saved(torch.stack(pixels)).logits.argmax(-1) == torch.tensor(labels)
    assert float(hits.float().mean()) == pytest.approx(max(column(out, "val_accuracy")))


def test_plain_finetuning_has_no_teacher(folder, tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(rk, "RIFTRegularizer", refuse)
    monkeypatch.setattr(finetune_vit, "copy", None)
    out = run(folder, tmp_path, "--epochs", "2", "--weight", "0", "--from-scratch", "--clip", "0")
    assert not [name for name in rows(out)[0] if "similarity" in name or "rift" in name]
    assert column(out, "train_loss") == column(out, "train_task_loss")
    assert column(out, "val_accuracy")[-1] >= 0.9


def test_with_adapters_the_student_is_its_own_teacher(folder, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft", reason="needs peft")
    teachers = []
    init = rk.RIFTRegularizer.__init__

    def spy(self, student, teacher, **settings):
        teachers.append(teacher)
        init(self, student, **settings)

    monkeypatch.setattr(rk.RIFTRegularizer, "__init__", spy)
    out = run(folder, tmp_path, "--epochs", "4", "--lora", "4", "--lr", "1e-2")
    assert teachers == [None]
    assert column(out, "val_accuracy")[-1] >= 0.9
    assert 0 < column(out, "val_similarity")[-1] < 0.9999
    # Checkpoints hold only trained tensors, which are few.
    names = list(state(out)["model"])
    assert len(names) == 2 * 2 * 2 + 2
    assert all("lora" in name or "classifier.modules_to_save" in name for name in names)
    assert (out / "best/adapter_model.safetensors").exists()
    assert not (out / "best/model.safetensors").exists()


SETTINGS = {
    "full": ("--accumulate", "2", "--batch-size", "4", "--weight", "auto:0.95"),
    "lora": ("--lora", "2", "--warmup-rift", "5"),
    "fp16": ("--amp", "fp16", "--measure", "covariance"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, settings) -> None:
    """The model has dropout, and each epoch augments images differently."""
    if "--lora" in settings:
        pytest.importorskip("peft", reason="needs peft")
    # Within the first epoch, at its end, and within the second.
    options = [str(folder), *TINY, "--epochs", "2", *settings]
    assert_resumes(finetune_vit.main, options, tmp_path, stops=(3, 5, 8))


def test_resuming_a_finished_run_changes_nothing(folder, tmp_path) -> None:
    out = run(folder, tmp_path, "--epochs", "1")
    before = state(out)
    assert before["progress"]["best"] > 0
    run(folder, tmp_path, "--epochs", "1", "--resume")
    assert_same(state(out), before)


def test_stops_early(folder, tmp_path, capsys) -> None:
    out = run(folder, tmp_path, "--epochs", "9", "--patience", "2", "--lr", "1e-9")
    assert len(rows(out)) == 3  # the first is the best
    assert "3 epochs, 12 steps" in capsys.readouterr().out


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
import pytest
from examples import finetune_vit  # noqa: E402
from examples.finetuning import trainer
from tests.support.finetuned import stop_in_step
torch.set_num_threads(1)
dist.destroy_process_group = lambda: None  # torch cannot create a second one in this process
folder, *options = sys.argv[1:]
fit = trainer.Trainer.fit
def spy(self):
    progress = fit(self)
    torch.save(self.unwrapped.state_dict(), Path(folder, f"{self.world.rank}.pt"))
    return progress
trainer.Trainer.fit = spy
extra = "--weight", "3", "--save-every", "1"
finetune_vit.main([*options, *extra, "--out", f"{folder}/two"])
extra = "--model", "tiny-random", "--lr", "3e-3", "--save-every", "1"
finetune_vit.main([*options, *extra, "--out", f"{folder}/whole"])
with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    stop_in_step(patch, 3)
    finetune_vit.main([*options, *extra, "--out", f"{folder}/parts"])
finetune_vit.main([*options, *extra, "--out", f"{folder}/parts", "--resume"])
"""


def test_two_processes(folder, pretrained, tmp_path) -> None:
    """They compare their batch as one, so results equal those of one process with all of it."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs a torch with gloo")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    options = [str(folder), "--model", str(pretrained), "--epochs", "2", *QUICK, "--lr", "1e-3"]
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    process = command(*launch, str(tmp_path), *options, "--batch-size", "4", "--weight", "3")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch 2/2") == 3, process.stdout  # once for each run
    single = run(folder, tmp_path / "one", *options[1:], "--batch-size", "8", "--weight", "3")
    double = tmp_path / "two"
    assert all(math.isfinite(value) for row in rows(double) for value in row.values())
    torch.testing.assert_close(rows(double), rows(single), rtol=1e-3, atol=1e-4)
    # The gradient of a key's bias is only rounding error, which Adam scales up to a normal step.
    weights = [
        {name: t for name, t in state(out)["model"].items() if not name.endswith("k_proj.bias")}
        for out in (double, single)
    ]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-4)
    # After the last run, both ranks have the saved weights.
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0], state(tmp_path / "parts")["model"], rtol=0, atol=0)
    # That run was interrupted and resumed, including the dropout of each rank.
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_help() -> None:
    process = command("examples.finetune_vit", "--help")
    assert process.returncode == 0, process.stderr
    for words in ("one GPU:", "torchrun --nproc-per-node 4", "CPU:", "auto:0.9", "(default: cka)"):
        assert words in process.stdout


def make_broken_folder(path: Path, fault: str) -> None:
    write_images(path / "train", 4, 0)
    write_images(path / "val", 4, 1)
    if fault == "no val":
        (path / "val").rename(path / "validation")
    elif fault == "an empty class":
        (path / "train/green").mkdir()
        (path / "train/green/notes.txt").write_text("no image")
    elif fault == "an unknown class":
        (path / "val/red").rename(path / "val/green")
    elif fault == "a damaged image":
        content = (path / "train/red/2.png").read_bytes()
        (path / "train/red/2.png").write_bytes(content[: len(content) // 2])
    elif fault == "one class":
        (path / "train/red").rename(path / "red")


BROKEN = {
    "no val": "got no folder .*val",
    "an empty class": "train/green must have images",
    "an unknown class": "val/green: there is no class 'green' in train",
    "a damaged image": "cannot read the image .*train/red/2.png",
    "one class": "must have a folder for each of two or more classes; got",
}


@pytest.mark.parametrize(("fault", "words"), BROKEN.items(), ids=BROKEN.keys())
def test_broken_folders(fault, words, tmp_path) -> None:
    make_broken_folder(tmp_path / "data", fault)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        run(tmp_path / "data", tmp_path / "out", "--epochs", "1", "--batch-size", "4")


def test_a_damaged_image_in_a_data_loading_process(tmp_path) -> None:
    make_broken_folder(tmp_path / "data", "a damaged image")
    with pytest.raises(SystemExit, match=r"^error: cannot read the image .*2\.png: [^\n]*$"):
        run(tmp_path / "data", tmp_path / "out", "--batch-size", "8", "--workers", "1")


WRONG = (
    (("--weight", "-1"), "--weight: must be a number, at least 0; got '-1' (or auto:0.9)"),
    (("--weight", "auto:2"), "above 0 and at most 1; got '2'"),
    (("--lr", "nan"), "--lr: must be a number, above 0; got 'nan'"),
    (("--epochs", "0"), "--epochs: must be a whole number, at least 1; got '0'"),
    (("--pooling", "max"), "invalid choice: 'max'"),
)


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options(options, words, folder, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path, *options)
    assert words in capsys.readouterr().err


IMPOSSIBLE = (
    (("--batch-size", "64"), "got a step of 64 examples .* from 32 training examples"),
    (("--batch-size", "3"), "must give RIFT at least 4 examples.*; got 3,"),
    (("--layers", "vit.layer.1"), "'vit.layer.1' matches no module.*'vit.layers.1'"),
    (("--weight", "auto:0.9", "--measure", "bures"), "weight must be a number"),
    (("--lora", "2", "--lora-target", "nothing"), "--lora-target from 'vit.layers.0.attention.q"),
    (("--model", "timm:vit_tiny"), "--model timm:vit_tiny needs timm.*pip install timm"),
    (("--model", "/no/such/model"), "/no/such/model"),
    (("--tensorboard",), "--tensorboard needs tensorboard"),
    (("--device", "nothing"), "--device must be one that torch can use; got 'nothing'"),
)


@pytest.mark.parametrize(("options", "words"), IMPOSSIBLE)
def test_impossible_settings(options, words, folder, tmp_path, monkeypatch) -> None:
    for module in ("timm", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        run(folder, tmp_path, *options)


def test_image_size(folder, tmp_path) -> None:
    """The model itself rejects a wrong size."""
    with pytest.raises(ValueError, match=r"\(20\*20\)"):
        run(folder, tmp_path, "--image-size", "20")


def test_another_run_is_not_resumed(folder, tmp_path) -> None:
    run(folder, tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit, match=r"unless --resume is given; .* of an earlier run"):
        run(folder, tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit, match=r"--resume needs epochs 1, as in .*; got 2"):
        run(folder, tmp_path, "--epochs", "2", "--resume")
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=f"cannot read the checkpoint {newest}"):
        run(folder, tmp_path, "--epochs", "1", "--resume")


def test_a_loss_that_is_not_finite_is_not_saved(folder, tmp_path) -> None:
    with pytest.raises(
        SystemExit, match="the loss or the weights are not finite in epoch 1, by step"
    ):
        run(folder, tmp_path, "--lr", "1e30", "--clip", "0", "--weight", "0", "--save-every", "1")
    assert not (tmp_path / "checkpoints").exists()


def test_augmentation_depends_on_seed_epoch_and_index(folder) -> None:
    def augmented(seed: int, epoch: int) -> list[torch.Tensor]:
        arguments = (images.Preprocessing(), seed, images.Augmentation(0.3, flip=True))
        data = images.Images(folder / "train", list(COLOURS), *arguments)
        data.epoch = epoch
        return [data[i][0] for i in range(6)]

    torch.testing.assert_close(augmented(0, 1), augmented(0, 1), rtol=0, atol=0)
    for other in (augmented(0, 2), augmented(1, 1)):
        assert not any(torch.equal(a, b) for a, b in zip(augmented(0, 1), other, strict=True))


def test_images_are_cropped_and_normalised(tmp_path) -> None:
    """A wide image is cropped to its centre, and mirrored in about half of all epochs."""
    ramp = np.zeros((8, 24, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 230, 24)
    ramp[..., 1] = 51
    for name in COLOURS:
        (tmp_path / name).mkdir()
        Image.fromarray(ramp).save(tmp_path / name / "0.png")
    preprocessing = images.Preprocessing(4, (0.0, 0.1, 0.5), (1.0, 0.5, 0.25))
    pixels, label = images.Images(tmp_path, list(COLOURS), preprocessing, 0)[1]
    assert label == 1
    box = images.crop_box((24, 8), None, random.Random(0))
    assert box == (12 - 3.5, 4 - 3.5, 12 + 3.5, 4 + 3.5)  # 0.875 of the shorter side
    assert pixels.shape == (3, 4, 4)
    torch.testing.assert_close(pixels[1], torch.full((4, 4), 0.2))
    torch.testing.assert_close(pixels[2], torch.full((4, 4), -2.0))
    assert float(pixels[0].mean()) == pytest.approx(115 / 255, abs=0.02)
    assert 60 / 255 < float(pixels[0].min()) < float(pixels[0].max()) < 170 / 255
    mirrored = []
    augmentation = images.Augmentation(0.5, flip=True)
    for epoch in range(40):
        data = images.Images(tmp_path, list(COLOURS), preprocessing, 0, augmentation)
        data.epoch = epoch
        row = data[0][0][0, 0]
        mirrored.append(bool(row[0] > row[-1]))
    assert 10 < sum(mirrored) < 30
