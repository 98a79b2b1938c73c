"""The frontier of errors, curves of time, and the pictures that the documents show of them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import charts, files, frontier, pictures, report, scaling, schema
from benchmarks.providers import NAIVE, Provider, providers
from benchmarks.workloads import Inputs, Workload, features

CPU = torch.device("cpu")
OURS = "rift_kernels eager"
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


def _written(module: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    """What its smoke profile writes, as if it were a full one."""
    assert module.main(["--profile", "smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    result = json.loads(path.read_text())
    path.unlink()
    result["profile"] = "cpu"
    return files.write(result, folder), result


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return _written(frontier, tmp_path_factory.mktemp("frontier"))


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return _written(scaling, tmp_path_factory.mktemp("scaling"))


def test_frontier_is_complete(errors: tuple[Path, dict[str, Any]]) -> None:
    _, result = errors
    keys = ("measure", "dtype", "rotated")
    assert {tuple(c[key] for key in keys) for c in result["curves"]} == set(
        itertools.product(("cka_biased", "cka_debiased"), ("bfloat16", "float32"), (False, True))
    )
    for curve in result["curves"]:
        medians = [d["median"] for d in curve["distances"]]
        assert medians == sorted(medians, reverse=True)
        # Rounding features to bfloat16 moves them by about this.
        assert 0.03 < medians[0] < 0.3
        assert 1e-7 < medians[-1] < 3e-5
        ours, floor = curve["results"][OURS]["errors"], curve["rounding"]
        for found, least in zip(ours, floor, strict=True):
            assert least["median"] * 0.99 <= found["median"] <= 1e-2
            assert found["min"] <= found["median"] <= found["max"]


def test_frontier_sees_naive_code_fail(errors: tuple[Path, dict[str, Any]]) -> None:
    """And only in half precision, and only near the teacher."""
    _, result = errors
    for curve in result["curves"]:
        first, *_, last = (e["median"] for e in curve["results"][NAIVE]["errors"])
        if curve["dtype"] == "bfloat16":
            assert last > 1 > first
        else:
            assert last < 0.1


def test_frontier_measures_the_error_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are a tenth too long, NaN, or none at all."""

    def scaled(factor: float, inputs: Inputs) -> Tensor:
        student = inputs.students[0].double()
        student = student.detach() + factor * (student - student.detach())
        return providers(CPU, ())[1].measures["cka_biased"](Inputs([student], inputs.teachers))

    def broken(_: Inputs) -> Tensor:
        raise NotImplementedError("one\ntwo")

    found = {
        "long": lambda inputs: scaled(1.1, inputs).to(torch.float64),
        "nan": lambda inputs: scaled(math.nan, inputs),
        "broken": broken,
    }
    candidates = [Provider(name, {"cka_biased": f}) for name, f in found.items()]
    profile = frontier.Profile(((16, 8),), (0.3, 0.1), pairs=3)
    monkeypatch.setattr(
        frontier, "curves", lambda _: [(Workload("cka_biased", 16, 8, torch.float32), False)]
    )
    result = frontier.run("smoke", profile, CPU, candidates)
    schema.validate(result)
    (curve,) = result["curves"]
    for entry in curve["results"]["long"]["errors"]:
        assert entry["median"] == pytest.approx(0.1, rel=1e-3)
    nothing = {"min": None, "median": None, "max": None}
    assert curve["results"]["nan"]["errors"] == [nothing] * 2
    assert curve["results"]["broken"] == {"reason": "NotImplementedError: one", "errors": []}


def test_one_gradient_of_nan_is_the_worst() -> None:
    numbers = [1.0, math.nan, 3.0]
    for order in itertools.permutations(numbers):
        assert frontier._spread(order) == {"min": 1.0, "median": 3.0, "max": None}


def test_frontier_fails_where_ours_does(errors: tuple[Path, dict[str, Any]]) -> None:
    _, result = errors
    assert frontier.failures(result) == []
    broken = copy.deepcopy(result)
    broken["curves"][0]["results"][OURS]["errors"][1]["max"] = 0.2
    broken["curves"][1]["results"][OURS]["errors"][0]["max"] = None
    assert frontier.failures(broken) == [
        f"{OURS}: biased, 16 x 8 bfloat16: off by 2e-01",
        f"{OURS}: biased, 16 x 8 bfloat16, rotated: off by inf",
    ]


def test_a_rotated_student_is_as_similar() -> None:
    plain, rotated = (
        features(Workload("cka_biased", 16, 8), CPU, rotated=rotated) for rotated in (False, True)
    )
    student, turned = plain.students[0], rotated.students[0]
    assert torch.equal(plain.teachers[0], rotated.teachers[0])
    assert not torch.allclose(student, turned, atol=0.1)
    torch.testing.assert_close(student @ student.T, turned @ turned.T)


def test_scaling_is_a_benchmark_on_curves(times: tuple[Path, dict[str, Any]]) -> None:
    _, result = times
    assert [curve["along"] for curve in result["curves"]] == ["rows", "width", "layers"]
    for curve in result["curves"]:
        workloads = [result["workloads"][i] for i in curve["workloads"]]
        for size in ("rows", "width", "layers"):
            sizes = [w[size] for w in workloads]
            assert (sizes == sorted(set(sizes))) == (size == curve["along"])
    # The smallest lies on all three, and is measured once.
    assert len(result["workloads"]) == 4


@pytest.mark.parametrize("profile", scaling.PROFILES)
def test_along_a_curve_one_size_grows(profile: str) -> None:
    curves, _ = scaling.PROFILES[profile]
    for along, workloads in curves.along.items():
        sizes = [getattr(w, along) for w in workloads]
        assert sizes == sorted(set(sizes))
        assert len({dataclasses.replace(w, **{along: 1}) for w in workloads}) == 1


def test_forms_name_the_place(errors: Any, times: Any) -> None:
    broken = copy.deepcopy(errors[1])
    del broken["curves"][2]["results"][OURS]["errors"][0]
    with pytest.raises(ValueError, match=r"curves\[2\].*errors must be as long as distances, 3"):
        schema.validate(broken)
    broken = copy.deepcopy(times[1])
    broken["curves"][1]["workloads"][0] = 4
    with pytest.raises(ValueError, match=r"curves\[1\]\.workloads must be places among 4"):
        schema.validate(broken)
    broken["curves"][1].update(along="depth", workloads=[])
    with pytest.raises(ValueError, match=r"curves\[1\]\.along must be a size; got 'depth'"):
        schema.validate(broken)


def test_names_do_not_overlap() -> None:
    assert charts.spread([], 10, 100) == []
    assert charts.spread([5, 40, 90], 10, 100) == [5, 40, 90]
    assert charts.spread([50, 50, 50], 10, 100) == [40, 50, 60]
    assert charts.spread([-5, 0, 99, 120], 10, 100) == [0, 10, 90, 100]


@needs_matplotlib
def test_a_picture_is_of_its_result(
    errors: Any, times: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, result in (errors, times):
        (picture,) = pictures.of(path, result)
        for theme in charts.THEMES:
            assert not picture.is_current(tmp_path, theme)
            before = picture.write(tmp_path, theme).read_bytes()
            assert picture.is_current(tmp_path, theme)
            assert picture.write(tmp_path, theme).read_bytes() == before
        # Another number, another file, or the other theme's.
        other = copy.deepcopy(result)
        if result["schema"] == schema.FRONTIER:
            other["curves"][0]["results"][OURS]["errors"][0]["max"] *= 1.01
        else:
            other["workloads"][0]["results"][OURS]["seconds"]["both"]["q80"] *= 1.01
        assert not pictures.of(path, other)[0].is_current(tmp_path, "light")
        assert not pictures.of(path.with_name("x.json"), result)[0].is_current(tmp_path, "light")
        dark = tmp_path / picture.file("dark")
        (tmp_path / picture.file("light")).write_bytes(dark.read_bytes())
        assert not picture.is_current(tmp_path, "light")
        dark.write_text("<svg>")
        assert not picture.is_current(tmp_path, "dark")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(charts.NoMatplotlibError, match="matplotlib, which cannot be imported"):
        picture.write(tmp_path, "light")


@needs_matplotlib
def test_what_is_nan_or_wrong_is_drawn(errors: Any, times: Any) -> None:
    def crosses(figure: Any) -> int:
        return sum(
            len(line.get_xdata())
            for axes in figure.axes
            for line in axes.lines
            if line.get_marker() == "x"
        )

    path, result = errors
    result = copy.deepcopy(result)
    for point in result["curves"][0]["results"][NAIVE]["errors"][1:]:
        point.update(median=None, max=None)
    result["curves"][0]["results"]["ckatorch"] = {"reason": "it failed", "errors": []}
    (picture,) = pictures.of(path, result)
    assert crosses(charts.draw(picture.chart, charts.THEMES["light"])) == 2
    assert f"{NAIVE} NaN" in picture.alt
    assert "Crosses" in picture.chart.note
    assert "Crosses" not in pictures.of(*errors)[0].chart.note
    assert pictures.missing(result) == [
        "Not measured:\n- ckatorch, biased, bfloat16, 16 x 8: it failed"
    ]

    path, result = times
    result = copy.deepcopy(result)
    result["workloads"][0]["results"][NAIVE]["wrong"] = True
    (picture,) = pictures.of(path, result)
    # It lies on three curves.
    assert crosses(charts.draw(picture.chart, charts.THEMES["dark"])) == 3
    assert "Crosses" in picture.chart.note
    assert "Crosses" not in pictures.of(*times)[0].chart.note


def test_alt_texts_have_the_numbers(errors: Any, times: Any) -> None:
    (picture,) = pictures.of(*errors)
    last = errors[1]["curves"][0]["results"][OURS]["errors"][-1]["median"]
    expected = f"{last:.0e}".replace("e-0", "e-")
    assert re.search(rf"^[^.]*\. biased, bfloat16, [^.]*{OURS} {expected}[,.]", picture.alt)
    (picture,) = pictures.of(*times)
    at = times[1]["curves"][0]["workloads"][-1]
    last = times[1]["workloads"][at]["results"][OURS]["seconds"]["both"]["q50"]
    (text,) = re.findall(rf"At rows N = 16: .*?{OURS} ([0-9.]+) ms", picture.alt)
    assert float(text) == pytest.approx(1e3 * last, rel=6e-3)
    assert 'alt="' + picture.alt + '"' in picture.markup()


@needs_matplotlib
def test_report_draws_and_checks(
    errors: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    path, result = errors
    monkeypatch.setattr(
        report, "SECTIONS", {key: report.SECTIONS[key] for key in ("frontier", "scaling")}
    )
    results = tmp_path / "results"
    results.mkdir()
    (results / path.name).write_text(json.dumps(result))
    page = tmp_path / report.MEASURED
    page.parent.mkdir()
    names = ("frontier", "scaling")
    page.write_text("".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in names))
    (tmp_path / report.README).write_text("# Title\n")
    examples = tmp_path / report.EXAMPLES
    examples.parent.mkdir()
    examples.write_text("<!-- demo:begin -->\n<!-- demo:end -->\n")
    options = ["--root", str(tmp_path), "--results", str(results)]
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    text = page.read_text()
    assert "Not measured yet: `python -m benchmarks.scaling`" in text
    folder = tmp_path / "docs" / "pictures"
    for link in re.findall(r'(?:srcset|src)="([^"]+)"', text):
        assert (page.parent / link).parent == folder
    shown = sorted(folder.iterdir())
    assert [file.name.rsplit("-", 1)[1] for file in shown] == ["dark.svg", "light.svg"]

    capsys.readouterr()
    # Nothing to draw, so it takes no matplotlib.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(options) == 0
    shown[0].unlink()
    assert report.main([*options, "--check"]) == 1
    assert f"{shown[0]} is not what the results say" in capsys.readouterr().out
    assert report.main(options) == 1
    assert "which cannot be imported" in capsys.readouterr().err

    before = page.read_text()
    (results / path.name).unlink()
    assert report.main(options) == 1
    assert f"no result of the kind '{schema.FRONTIER}'" in capsys.readouterr().err
    assert page.read_text() == before
