"""Result files are read back as they were written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import environment, files, schema


@pytest.mark.parametrize("command", ["run", "scaling", "frontier", "step"])
def test_what_is_written_is_read(command, smoke) -> None:
    result = smoke(command)
    assert type(result) is schema.KINDS[result.schema]
    assert schema.parse(json.loads(json.dumps(dataclasses.asdict(result)))) == result


@pytest.mark.parametrize("path", sorted(files.RESULTS.glob("amd*.json")), ids=lambda p: p.stem)
def test_earlier_results_are_read(path: Path) -> None:
    result = files.read(path)
    assert schema.parse(dataclasses.asdict(result)) == result
    assert result.environment.date == json.loads(path.read_text())["environment"]["date"]


@pytest.mark.parametrize("change", [{"speed": 1}, {"schema": "y"}])
def test_other_forms_are_refused(change, smoke) -> None:
    content = dataclasses.asdict(smoke("run")) | change
    with pytest.raises((TypeError, KeyError), match="|".join(map(str, (*change, "y")))):
        schema.parse(content)


def test_results_are_never_overwritten(smoke, tmp_path) -> None:
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
    assert environment.describe(torch.device("cpu")).clocks.startswith("load ")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(environment, "_output", lambda *_: "1980 MHz, 120 W\nanother GPU")
    clocks = environment.describe(torch.device("cuda")).clocks
    assert "clocks.sm" in clocks
    assert clocks.endswith(": 1980 MHz, 120 W")
