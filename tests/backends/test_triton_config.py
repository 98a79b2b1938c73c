"""The table of configurations: complete, checked when it is read, with an entry for every GPU."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from rift_kernels.backends.triton import config
from rift_kernels.backends.triton.config import CLASSES, ConfigError
from rift_kernels.backends.triton.layers import pack

LARGE = "covariance large bf16"
SMALL = "covariance small bf16"
GRAM = "gram small split"


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(config.ENVIRONMENT_VARIABLE, raising=False)
    config.forget()
    yield
    config.forget()


def shipped(arch: str, shapes: str) -> dict:
    """An entry as the file has it."""
    content = json.loads(config.SHIPPED.read_text())
    return dict(content[arch][shapes])


def test_shipped_table_is_complete() -> None:
    table = config.read(config.SHIPPED)
    for arch in ("cpu", "sm80", "sm90", "sm100", "sm120", "gfx942"):
        assert tuple(sorted(table[arch])) == tuple(sorted(CLASSES))


@pytest.mark.parametrize(
    ("arch", "like"),
    [
        ("sm86", "sm80"),
        ("sm89", "sm80"),
        ("sm103", "sm100"),
        ("sm120", "sm80"),
        ("sm121", "sm80"),
        ("sm75", "sm80"),
        ("gfx90a", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_unknown_architectures_take_the_closest(arch: str, like: str) -> None:
    for shapes in CLASSES:
        assert config.lookup(arch, shapes) == config.lookup(like, shapes)


@pytest.mark.parametrize(
    ("form", "rows", "width", "dtype", "shapes"),
    [
        ("covariance", 4096, 64, torch.bfloat16, "covariance small bf16"),
        ("covariance", 4096, 65, torch.float16, "covariance medium split"),
        ("covariance", 32, 768, torch.float32, "covariance large split"),
        ("gram", 64, 768, torch.bfloat16, "gram small bf16"),
        ("gram", 128, 32, torch.float32, "gram medium split"),
        ("gram", 129, 32, torch.float32, "gram large split"),
    ],
)
def test_class_of_a_call(form, rows, width, dtype, shapes, monkeypatch) -> None:
    calls, entry = [], config.lookup("sm90", shapes)
    monkeypatch.setattr(config, "lookup", lambda *call: (calls.append(call), entry)[1])
    x = torch.zeros(rows, width, dtype=dtype)
    layers = pack([x[:2, :2], x], [x, x[:2, :2]], [])
    config.configuration(layers, form)
    assert calls == [("cpu", shapes)]


@pytest.mark.parametrize(("width", "step"), [(64, 1), (72, 1), (63, 1), (64, 2)])
def test_rows_without_alignment_take_half_as_much_at_a_time(width, step) -> None:
    """Registers hold an address for each of their elements."""
    x = torch.zeros(8, width * step, dtype=torch.bfloat16)[:, ::step]
    layers = pack([x], [x], [])
    usual = config.lookup("cpu", "covariance medium bf16" if width > 64 else SMALL)
    is_aligned = width % 8 == 0 and step == 1
    assert layers.vector == (8 if is_aligned else 2 - step)
    assert config.configuration(layers, "covariance").block_k == usual.block_k // (2 - is_aligned)


def test_an_entry_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8, 8)
    layers = pack([x], [x], [])
    first = config.configuration(layers, "gram")
    monkeypatch.setattr(config, "lookup", None)
    assert config.configuration(layers, "gram") is first


def write(path: Path, arch: str, shapes: str, **changes: object) -> Path:
    values = {**shipped("sm90", shapes), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    path.write_text(json.dumps({arch: {shapes: values}}))
    return path


def test_a_file_overrides_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.json", "sm89", LARGE, stages=2)
    monkeypatch.setenv(config.ENVIRONMENT_VARIABLE, str(path))
    assert config.lookup("sm89", LARGE).stages == 2
    assert config.lookup("sm90", LARGE).stages != 2
    assert config.lookup("sm89", GRAM) == config.lookup("sm80", GRAM)
    config.forget()
    monkeypatch.setenv(config.ENVIRONMENT_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"none\.json"):
        config.lookup("sm90", LARGE)


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        (LARGE, {"block": 96}, "block must be a power of two, not 96"),
        (LARGE, {"block_k": 8}, "block_k must be an integer from 16 on, not 8"),
        (LARGE, {"block_k": "64"}, "block_k must be an integer from 16 on, not '64'"),
        (LARGE, {"warps": 3}, "warps must be a power of two, not 3"),
        (LARGE, {"backward_warps": 32}, "backward_warps must be at most 16, not 32"),
        (LARGE, {"stages": 0}, "stages must be an integer from 1 on, not 0"),
        (LARGE, {"backward": [128, 128]}, "backward must be three numbers"),
        (LARGE, {"backward": [128, 64, 256]}, "backward's depth, 256, must divide block, 128"),
        (LARGE, {"sub": 256}, "sub, 256, must divide block, 128"),
        (LARGE, {"sub": None}, "unknown or missing: sub"),
        (LARGE, {"small_k": 32}, "unknown or missing: small_k"),
        (GRAM, {"gram_backward": [64, 64, 8]}, "gram_backward must be an integer from 16 on"),
    ],
)
def test_bad_entries(shapes: str, changes: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json", "sm90", shapes, **changes)
    with pytest.raises(ConfigError) as error:
        config.read(path)
    assert str(error.value).startswith(f"{path}: sm90: {shapes}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "must hold an object"),
        ('{"sm90": 3}', "sm90: 3 is neither"),
        ('{"sm90": "sm80"}', "sm90: 'sm80' is neither"),
        ('{"sm90": {"gram tiny bf16": {}}}', "no such class"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.read(path)
