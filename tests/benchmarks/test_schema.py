"""Result files are read back as they were written, and what has another form is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import environment, files, schema, suite

COMMANDS = {"run": schema.Benchmark, "scaling": schema.Scaling, "frontier": schema.Frontier}
COMMANDS |= {"step": schema.Step, "lora": schema.Lora}


@pytest.mark.parametrize("command", suite.KINDS)
def test_what_is_written_is_read(command, smoke) -> None:
    result = smoke(command)
    assert type(result) is COMMANDS[command]
    assert schema.parse(json.loads(json.dumps(dataclasses.asdict(result)))) == result


@pytest.mark.parametrize("path", sorted(files.RESULTS.glob("amd*.json")), ids=lambda p: p.stem)
def test_earlier_results_are_read(path: Path) -> None:
    """Whatever they have is kept; what they do not have is empty."""

    def check(value, before) -> None:
        if isinstance(before, dict):
            for key, item in before.items():
                check(value[key], item)
        elif isinstance(before, list):
            assert len(value) == len(before)
            for item, item_before in zip(value, before, strict=True):
                check(item, item_before)
        else:
            assert value == before or (before is None and value == {})

    check(dataclasses.asdict(files.read(path)), json.loads(path.read_text()))


def broken(content: dict, path: str, value: object) -> dict:
    """With another value at a path, or without it."""
    *parents, name = path.split("/")
    place = content
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    key = int(name) if isinstance(place, list) else name
    place[key] = value
    if value is None:
        del place[key]
    return content


@pytest.mark.parametrize(
    ("command", "path", "value", "message"),
    [
        ("run", "workloads/1/dtype", None, r"workloads\[1\]: missing keys \['dtype'\], unknown"),
        ("run", "workloads/1/speed", 1, r"workloads\[1\]: missing keys \[\], unknown .*'speed'"),
        ("run", "workloads/0/results/naive eager/seconds/both/q50", "fast",
         r"workloads\[0\]\.results\.naive eager\.seconds\.both\.q50 must be of type float; got 'f"),
        ("run", "workloads/0/results", [], r"results must be of type dict; got \[\]"),
        ("run", "schema", "y", "result.schema must be one of .*; got 'y'"),
        ("step", "ways/1/seconds/wall/q50", "fast", r"ways\[1\]\.seconds\.wall\.q50 must be"),
        ("lora", "ways/1/adds/high", "much", r"ways\[1\]\.adds\.high must be of type float"),
        ("frontier", "curves/2/distances", {}, r"curves\[2\]\.distances must be of type list"),
        ("scaling", "curves/1/workloads/0", "4", r"curves\[1\]\.workloads\[0\] must be of type i"),
    ],
)  # fmt: skip
def test_forms_name_the_place(command, path, value, message, smoke) -> None:
    content = dataclasses.asdict(smoke(command))
    with pytest.raises(ValueError, match=message):
        schema.parse(broken(content, path, value))
    with pytest.raises(ValueError, match="must be one of"):
        schema.parse(None)


def test_results_are_never_overwritten(smoke, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(environment, "slug", lambda _: "same")
    assert len({files.write(smoke("run"), tmp_path) for _ in range(3)}) == 3


def test_the_newest_of_each_device(smoke, tmp_path) -> None:
    result = smoke("run")
    for device, date, profile in (
        ("a", "2030-01-02", "cpu"),
        ("a", "2030-01-01", "cpu"),
        ("a", "2030-01-03", "smoke"),
        ("b", "2029-01-01", "gpu"),
    ):
        where = dataclasses.replace(result.environment, device=device, date=date)
        other = dataclasses.replace(result, profile=profile, environment=where)
        text = json.dumps(dataclasses.asdict(other))
        (tmp_path / f"{device}-{date}.json").write_text(text)
    (tmp_path / "gpu-check.json").write_text("{}")
    assert [path.name for path in files.newest(tmp_path, schema.Benchmark)] == [
        "a-2030-01-02.json",
        "b-2029-01-01.json",
    ]


def test_the_state_of_the_clocks(monkeypatch) -> None:
    gpu = torch.device("cuda")
    assert environment.describe(torch.device("cpu")).clocks.startswith("load average ")
    monkeypatch.setattr(environment, "_output", lambda *_: "1980 MHz, 1980 MHz, 2619 MHz, 120 W")
    assert "clocks.sm" in environment._clocks(gpu)
    assert "1980 MHz" in environment._clocks(gpu)
    monkeypatch.setattr(environment, "_output", lambda *_: environment.UNKNOWN)
    assert environment.UNKNOWN in environment._clocks(gpu)
