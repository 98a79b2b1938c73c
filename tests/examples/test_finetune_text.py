"""examples.finetune_text end to end, on generated texts and untrained models."""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("tqdm", reason="needs tqdm")

import rift_kernels as rk  # noqa: E402
from examples import finetune_text  # noqa: E402
from examples.finetuning import texts  # noqa: E402
from tests.support.finetuned import QUICK, assert_resumes, column, command, rows, state  # noqa: E402

WORDS = {"good": ("fine", "great", "lovely"), "bad": ("poor", "awful", "sad")}
FILLER = "the a film of with and it was"
TINY = ("--model", "tiny-random", "--batch-size", "8", *QUICK)


def lines(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of different lengths, each with words of its label."""
    draw = random.Random(seed)
    pairs = []
    for i in range(count):
        label = list(WORDS)[i % 2]
        words = draw.choices(FILLER.split(), k=draw.randint(1, 8)) + draw.choices(WORDS[label], k=4)
        draw.shuffle(words)
        pairs.append((" ".join(words), label))
    return pairs


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps({"text": t, "label": y}) + "\n\n" for t, y in pairs)
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("text", "label"), *pairs])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    train = write(folder / "train.csv", lines(64, 0))
    val = write(folder / "val.jsonl", lines(18, 1))
    return ["--train", str(train), "--val", str(val)]


def run(files: list[str], out: Path, *options: str) -> Path:
    assert finetune_text.main([*files, *TINY, "--out", str(out), *options]) == 0
    return out


def test_learns_stays_similar_and_writes(files, tmp_path, capsys) -> None:
    strong = run(files, tmp_path / "strong", "--epochs", "4", "--weight", "3")
    assert column(strong, "val_accuracy")[-1] >= 0.9
    assert column(strong, "train_task_loss")[-1] < 0.8 * column(strong, "train_task_loss")[0]
    weak = run(files, tmp_path / "weak", "--epochs", "4", "--weight", "0.01")
    similar = "val_similarity/bert.encoder.layer.1"
    assert rows(strong)[-1][similar] > rows(weak)[-1][similar] + 0.05
    assert "epoch 4/4: loss" in capsys.readouterr().out
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(strong / "best")
    assert saved.config.id2label == {0: "bad", 1: "good"}


def test_padding_is_not_compared(files, tmp_path, monkeypatch) -> None:
    masks = []
    pooled = rk.FeatureCapture.pooled

    def spy(self, outputs, mask=None):
        masks.extend(mask.values())
        return pooled(self, outputs, mask)

    monkeypatch.setattr(rk.FeatureCapture, "pooled", spy)
    run(files, tmp_path, "--epochs", "1")
    # Two models, in eight training passes and two full validation batches.
    assert len(masks) == 2 * (8 + 2)
    # A start token, one to eight filler words, and four words of the label.
    words = torch.cat([mask.sum(1) for mask in masks])
    assert set(words.tolist()) == set(range(6, 14))
    assert sum(int((~mask).sum()) for mask in masks) > 100


def test_plain_finetuning_has_no_teacher(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(rk, "RIFTRegularizer", None)
    monkeypatch.setattr(finetune_text, "copy", None)
    out = run(files, tmp_path, "--epochs", "2", "--weight", "0")
    assert not [name for name in rows(out)[0] if "similarity" in name or "rift" in name]


def test_with_adapters_the_student_is_its_own_teacher(files, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft", reason="needs peft")
    monkeypatch.setattr(finetune_text, "copy", None)
    out = run(files, tmp_path, "--epochs", "4", "--lora", "8", "--lr", "2e-2")
    assert column(out, "val_accuracy")[-1] >= 0.9
    assert 0 < column(out, "val_similarity")[-1] < 0.9999
    names = list(state(out)["model"])
    assert "base_model.model.classifier.modules_to_save.default.weight" in names
    trained = {"lora_A", "lora_B", "modules_to_save"}
    assert all(trained & set(name.split(".")) for name in names if "position_ids" not in name)
    assert (out / "best/adapter_model.safetensors").exists()


SETTINGS = {
    "full": ("--accumulate", "2", "--batch-size", "4", "--weight", "auto:0.95", "--amp", "bf16"),
    "tokens": ("--pooling", "tokens", "--measure", "procrustes", "--warmup-rift", "5"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_resumed_run_equals_an_uninterrupted_one(files, tmp_path, settings) -> None:
    options = [*files, *TINY, "--epochs", "2", *settings]
    assert_resumes(finetune_text.main, options, tmp_path, stops=(3, 9, 13))


def test_stops_early(files, tmp_path) -> None:
    assert len(rows(run(files, tmp_path, "--epochs", "9", "--patience", "1", "--lr", "1e-9"))) == 2


def test_a_model_and_its_tokenizer_from_a_folder(files, tmp_path) -> None:
    """The best model of that run can be loaded in the same way."""
    folder = tmp_path / "pretrained"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER.split()]
    words += [word for label_words in WORDS.values() for word in label_words]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = transformers.DistilBertConfig(
        vocab_size=len(words), max_position_embeddings=32, initializer_range=0.1, **sizes
    )
    torch.manual_seed(0)
    transformers.DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = run(
        files, tmp_path / "first", "--model", str(folder), "--epochs", "4", "--max-tokens", "9"
    )
    assert column(out, "val_accuracy")[-1] >= 0.9
    best = transformers.AutoTokenizer.from_pretrained(out / "best")
    assert best("lovely film").input_ids == [2, words.index("lovely"), words.index("film"), 3]
    options = ("--model", str(out / "best"), "--epochs", "1", "--lr", "1e-9", "--max-tokens", "9")
    second = run(files, tmp_path / "second", *options)
    # Head and tokenizer are restored, so the accuracy is that of the first run.
    assert column(second, "val_accuracy") == [max(column(out, "val_accuracy"))]


def test_help() -> None:
    process = command("examples.finetune_text", "--help")
    assert process.returncode == 0, process.stderr
    for words in ("one GPU:", "torchrun --nproc-per-node 4", "CPU:", "(default: mean)"):
        assert words in process.stdout


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_reads_every_format(suffix, tmp_path) -> None:
    pairs = [('a "quoted", text', "yes"), ("two\nlines\tand a tab", "no")]
    read = texts.read_lines(write(tmp_path / f"x{suffix}", pairs), "text", "label")
    assert [(line.text, line.label) for line in read] == pairs
    assert read[0].place.endswith("line 1" if suffix == ".jsonl" else "line 2")


def test_class_names_in_order() -> None:
    def names(*labels: str) -> list[str]:
        return texts.class_names([texts.Line("", label, "") for label in labels])

    assert names("10", "9", "2", "9") == ["2", "9", "10"]
    assert names("b", "10", "a") == ["10", "a", "b"]


def test_a_word_has_the_same_number_in_every_process() -> None:
    tokenizer = texts.HashTokenizer(512)
    inputs = tokenizer(["one two one", "", "three " * 9], max_length=4)
    ids = inputs["input_ids"]
    assert ids.shape == (3, 4)
    assert ids[0, 1] == ids[0, 3] != ids[0, 2]
    assert ids[0].tolist() == [1, 97, 206, 97]
    assert inputs["attention_mask"].sum(1).tolist() == [4, 1, 4]


def test_batches_are_cut_and_padded() -> None:
    collate = texts.Collate(texts.HashTokenizer(512), 3)
    inputs, labels = collate([("one two one", 1), ("one", 0)])
    assert inputs["input_ids"].tolist() == [[1, 97, 206], [1, 97, 0]]
    assert labels.tolist() == [1, 0]


WRONG = (
    ("train.csv", "text,kind\na,b\n", "train.csv, line 2 must have 'label'; got 'text'"),
    ("train.csv", "text,label\na,1\nb,1\n", "--train must have at least two labels; got"),
    ("train.csv", "text,label\n", "train.csv must have at least one text; got none"),
    ("train.txt", "a", r"train.txt must end with .csv, .tsv, .jsonl, .json; got '.txt'"),
    ("train.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "train.jsonl, line 2 is not JSON"),
    ("train.jsonl", "[1]\n", r"train.jsonl, line 1 must be an object; got \[1\]"),
    (
        "train.csv",
        "text,label\na,1\nb,2\n",
        "val.jsonl, line 1: label must be one of the training labels",
    ),
)


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_wrong_files(name, content, words, files, tmp_path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        run(["--train", str(tmp_path / name), *files[2:]], tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^error: there is no file .*nothing.csv"):
        run(["--train", str(tmp_path / "nothing.csv"), *files[2:]], tmp_path / "out")


def test_impossible_settings(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=r"^error: .*/no/such/model"):
        run(files, tmp_path, "--model", "/no/such/model")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"^error: --lora needs peft.*pip install peft"):
        run(files, tmp_path, "--lora", "2")
