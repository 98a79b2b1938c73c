"""The documents show what the result files say: tables, pictures, and the tables of the design."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import files, pictures, predict, report, tables
from benchmarks.schema import Errors, Outcome, Quantiles, Result

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib"
)


@pytest.fixture
def pages(tmp_path: Path) -> SimpleNamespace:
    """Pages with empty sections, and how to report there."""
    runs = [
        {
            **{"way": "plain", "weight": 0.0, "rate": 1e-3, "seed": seed},
            **{"new_accuracy": 80.0 + seed, "old_accuracy": 90.0},
            **{"similarity": 0.5, "step_ms": 1.0},
        }
        for seed in range(2)
    ]
    about = {"hardware": "a machine", "versions": {"torch": "2"}, "commit": "abc", "seconds": 3.0}
    demo, results = tmp_path / "demo.txt", tmp_path / "results"
    demo.write_text(json.dumps({"runs": runs, **about}))
    results.mkdir()
    options = ["--root", str(tmp_path), "--results", str(results), "--demo", str(demo)]
    places = {name: section.page for name, section in report.SECTIONS.items()}
    paths = {page: tmp_path / page for page in (*places.values(), report.EXAMPLES)}
    for page, path in paths.items():
        names = [name for name, place in places.items() if place == page] or ["demo"]
        sections = "\n\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in names)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# Title\n\n{sections}\n\nThe rest.\n")
    return SimpleNamespace(
        **{"measured": paths[report.MEASURED], "readme": paths[report.README]},
        examples=paths[report.EXAMPLES],
        report=lambda *more: report.main([*options, *more]),
    )


def test_report(pages, written, capsys) -> None:
    path = written("run")
    result = files.read(path)
    assert pages.report("--check") == 1
    assert "README.md names no result for speed" in capsys.readouterr().err
    assert pages.report() == 0
    assert pages.report("--check") == 0
    measured, readme, examples = (
        path.read_text() for path in (pages.measured, pages.readme, pages.examples)
    )
    for text in (measured, readme, examples):
        assert text.startswith("# Title\n")
        assert text.endswith("The rest.\n")
    assert result.environment.commit[:12] in measured
    assert "biased, 16 x 8 float32" in measured
    assert "80.5 ± 0.7" in examples
    assert "as fast as naive code. The worst is " in readme

    later = dataclasses.replace(result.environment, date="2099-01-01", cores=99)
    newer = files.write(dataclasses.replace(result, environment=later), path.parent)
    assert pages.report("--check") == 0
    assert pages.report() == 0
    assert newer.name in pages.measured.read_text()
    assert newer.name in pages.readme.read_text()
    newer.unlink()
    assert pages.report("--check") == 1
    assert f"{newer}, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "old", "new"),
    [("measured", "16 x 8", "16 x 9"), ("readme", "as fast", "as slow"), ("examples", "0.5", "6")],
)
def test_what_a_page_says_otherwise(page, old, new, pages, written, capsys) -> None:
    written("run")
    assert pages.report() == 0
    path = getattr(pages, page)
    path.write_text(path.read_text().replace(old, new))
    assert pages.report("--check") == 1
    assert capsys.readouterr().out.endswith(f"{path} is not what the results say: run python -m "
                                            "benchmarks.report\n")  # fmt: skip
    path.write_text("# Title\n")
    assert pages.report() == 1
    assert "needs the markers" in capsys.readouterr().err


def test_best_and_worst_leave_out_what_is_wrong(smoke) -> None:
    """By hand: naive code that is wrong is no measure of speed, nor is a wrong answer of ours."""
    result = smoke("run")
    result.environment.device = "a machine"
    numbers = ((0.5, False, False), (0.1, False, False), (0.01, False, True), (9.0, True, False),
               (4.0, False, False))  # fmt: skip
    for workload, (seconds, naive_wrong, wrong) in zip(result.workloads, numbers, strict=True):
        workload.results = {
            name: Outcome(seconds={"both": Quantiles(0, s, 0)}, wrong=is_wrong)
            for name, s, is_wrong in (
                ("naive eager", 1.0, naive_wrong),
                ("rift_kernels eager", seconds, wrong),
            )
        }
    assert tables.best_and_worst(result) == (
        "On a machine, the best of 3 workloads is debiased CKA, 16 x 8 float32: **10.0x** as fast "
        "as naive code. The worst is Bures, 16 x 8 float32: **0.250x**."
    )
    del result.workloads[:2], result.workloads[-1]
    assert tables.best_and_worst(result) == "On a machine, no workload was measured."


def test_the_documents_are_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0
    assert predict.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("page", "word"),
    [(predict.KERNELS, "GFLOP"), (predict.DISTRIBUTED, "GB/s"), (predict.STATUS, "not yet")],
)
def test_the_tables_of_what_is_not_measured(page, word, tmp_path, capsys) -> None:
    texts = {
        name: (predict.DOCS / name).read_text(encoding="utf-8")
        for name in (predict.KERNELS, predict.DISTRIBUTED, predict.STATUS)
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    marked = texts[page].index(":begin -->")
    wrong = texts[page][:marked] + texts[page][marked:].replace(word, "?", 1)
    (tmp_path / page).write_text(wrong, encoding="utf-8")
    assert predict.main(["--check", "--docs", str(tmp_path)]) == 1
    assert f"{page} differs" in capsys.readouterr().out
    assert predict.main(["--docs", str(tmp_path)]) == 0
    for name, text in texts.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("name", "profile", "shown"),
    [("step", "cpu", "| tokens, 136 x 16 float32"), ("step", "smoke", ""), ("lora", "cpu", ""),
     ("lora", "full", "| + RIFT, tokens, 136 x 16 float32")],
)  # fmt: skip
def test_a_section(name, profile, shown, written) -> None:
    """It shows the newest result, but not of the reduced profiles."""
    page = f"<!-- {name}:begin -->\n<!-- {name}:end -->"
    path = written(name, profile)
    results, text = report.section(name, page, path.parent, check=False)
    assert list(results) == ([path] if shown else [])
    if shown:
        assert f"From `{path.name}`." in text
        assert shown in text
    else:
        assert text == report.pending(name)
        assert f"benchmarks.{report.SECTIONS[name].command}`" in text
    again = report.section(name, report.updated(page, name, text), path.parent, check=True)
    assert again == (results, text)


@needs_matplotlib
def test_report_draws_and_checks(pages, written, capsys, monkeypatch) -> None:
    path = written("frontier")
    assert pages.report() == 0
    assert pages.report("--check") == 0
    text = pages.measured.read_text()
    assert "Not measured yet: `python -m benchmarks.scaling`" in text
    folder = pages.measured.parent / "pictures"
    for link in re.findall(r'(?:srcset|src)="([^"]+)"', text):
        assert (pages.measured.parent / link).parent == folder
    shown = sorted(folder.iterdir())
    assert [file.name.rsplit("-", 1)[1] for file in shown] == ["dark.svg", "light.svg"]

    capsys.readouterr()
    # Nothing to draw, so it takes no matplotlib.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pages.report() == 0
    shown[0].unlink()
    assert pages.report("--check") == 1
    assert f"{shown[0]} is not what the results say" in capsys.readouterr().out
    assert pages.report() == 1
    assert "which cannot be imported" in capsys.readouterr().err

    before = pages.measured.read_text()
    path.unlink()
    assert pages.report() == 1
    assert "no result of the kind 'rift_kernels frontier 1'" in capsys.readouterr().err
    assert pages.measured.read_text() == before


def _changed(result: Any) -> None:
    """Another number than the one that is shown."""
    if hasattr(result, "pairs"):
        result.curves[0].results["rift_kernels eager"].errors[0].max *= 1.01
    else:
        result.workloads[0].results["rift_kernels eager"].seconds["both"].q80 *= 1.01


@needs_matplotlib
@pytest.mark.parametrize("command", ["frontier", "scaling"])
def test_a_picture_is_of_its_result(command, smoke, tmp_path, monkeypatch) -> None:
    result = smoke(command)
    (picture,) = pictures.of(result)
    for theme in pictures.THEMES:
        assert not picture.is_current(tmp_path, theme)
        before = picture.write(tmp_path, theme).read_bytes()
        assert picture.is_current(tmp_path, theme)
        assert picture.write(tmp_path, theme).read_bytes() == before
    # Another number, or the other theme's.
    _changed(result)
    assert not pictures.of(result)[0].is_current(tmp_path, "light")
    dark = tmp_path / picture.file("dark")
    (tmp_path / picture.file("light")).write_bytes(dark.read_bytes())
    assert not picture.is_current(tmp_path, "light")
    dark.write_text("<svg>")
    assert not picture.is_current(tmp_path, "dark")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pictures.NoMatplotlibError, match="matplotlib, which cannot be imported"):
        picture.write(tmp_path, "light")


def _crosses(result: Result) -> int:
    from matplotlib.figure import Figure

    (picture,) = pictures.of(result)
    figure = Figure()
    picture.draw(figure)
    lines = (line for axes in figure.axes for line in axes.lines)
    crosses = sum(len(line.get_xdata()) for line in lines if line.get_marker() == "x")
    assert ("Crosses" in picture.note) == (crosses > 0)
    return crosses


@needs_matplotlib
def test_what_is_nan_or_wrong_is_drawn(smoke) -> None:
    errors, times = smoke("frontier"), smoke("scaling")
    assert [_crosses(errors), _crosses(times)] == [0, 0]
    results = errors.curves[0].results
    for point in results["naive eager"].errors[1:]:
        point.median = point.max = None
    results["ckatorch"] = Errors(reason="it failed")
    assert _crosses(errors) == 2
    assert "naive eager NaN" in pictures.of(errors)[0].alt
    missing = "Not measured:\n- ckatorch, biased, bfloat16, 16 x 8: it failed"
    assert pictures.missing(errors) == [missing]
    assert pictures.summary(errors).endswith(missing)
    times.workloads[0].results["naive eager"].wrong = True
    # It lies on three curves.
    assert _crosses(times) == 3


def test_alt_texts_have_the_numbers(smoke) -> None:
    errors, times = smoke("frontier"), smoke("scaling")
    (picture,) = pictures.of(errors)
    last = errors.curves[0].results["rift_kernels eager"].errors[-1].median
    text = f"{last:.0e}".replace("e-0", "e-")
    expected = rf"^[^.]*\. biased, bfloat16, [^.]*rift_kernels eager {text}[,.]"
    assert re.search(expected, picture.alt)
    (picture,) = pictures.of(times)
    at = times.curves[0].workloads[-1]
    last = times.workloads[at].results["rift_kernels eager"].seconds["both"].q50
    (text,) = re.findall(r"At rows N = 16: .*?rift_kernels eager ([0-9.]+) ms", picture.alt)
    assert float(text) == pytest.approx(1e3 * last, rel=6e-3)
    assert 'alt="' + picture.alt + '"' in picture.markup()


def test_predicted_floors() -> None:
    """By hand, of the largest: 4 N D^2 operations each way, as many tiles as the triangle has."""
    columns, tiles, head, backward = predict.launches(predict.Shape(65536, 4096, 1, None))
    assert columns.bytes == 2 * 2 * 65536 * 4096
    assert tiles.flops == 2 * (32 * 65) * 128**2 * 65536
    assert backward.flops == 4 * 65536 * 4096**2
    assert head.flops == 0
    assert tiles.seconds == pytest.approx(tiles.flops / 790e12 + 1e-6)
