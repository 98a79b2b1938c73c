"""The documents show what the result files say: tables, pictures, and the tables of the design."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environment, files, pictures, predict, report, tables
from benchmarks.schema import Errors, Outcome, Quantiles

EAGER = "rift_kernels eager"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of pages with empty sections, and of the demo's results."""
    runs = [
        {
            **{"method": "plain", "weight": 0.0, "rate": 1e-3, "seed": seed},
            **{"new_accuracy": 80.0 + seed, "old_accuracy": 90.0},
            **{"similarity": 0.5, "step_ms": 1.0},
        }
        for seed in range(2)
    ]
    about = {"hardware": "a machine", "versions": {"torch": "2"}, "commit": "abc", "seconds": 3.0}
    demo = tmp_path / "examples" / "results" / "results.json"
    demo.parent.mkdir(parents=True)
    (tmp_path / report.FOLDER).mkdir(parents=True)
    demo.write_text(json.dumps({"runs": runs, **about}))
    sections = [(section.page, section.name) for section in report.SECTIONS]
    for page, name in (*sections, (report.EXAMPLES, "demo")):
        path = tmp_path / page
        path.parent.mkdir(exist_ok=True)
        text = path.read_text() if path.exists() else "# Title\n"
        path.write_text(f"{text}\n<!-- {name}:begin -->\n<!-- {name}:end -->\n\nThe rest.\n")
    return tmp_path


@pytest.fixture
def written(smoke, root):
    """A result file as a full profile leaves it."""

    def write(command: str, profile: str = "cpu", **changes: Any) -> Path:
        result = smoke(command)
        result.profile = profile
        result.environment = dataclasses.replace(result.environment, **changes)
        return files.write(result, root / report.FOLDER)

    return write


def text(root: Path, page: str = report.MEASURED) -> str:
    return (root / page).read_text(encoding="utf-8")


def test_report(root, written) -> None:
    path = written("run", commit="c0ffee")
    assert report.main(["--check"], root) == 1
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    for page in (report.MEASURED, report.README, report.EXAMPLES):
        assert text(root, page).startswith("# Title\n")
        assert text(root, page).endswith("The rest.\n")
    assert "c0ffee" in text(root)
    assert "biased, 16 x 8 float32" in text(root)
    assert f"From `benchmarks/results/{path.name}`." in text(root)
    assert "80.5 ± 0.7" in text(root, report.EXAMPLES)
    assert "as fast. The worst is " in text(root, report.README)
    # A newer result is no error until it is shown.
    newer = written("run", date="2099-01-01")
    assert report.main(["--check"], root) == 0
    assert report.main([], root) == 0
    assert newer.name in text(root)
    assert newer.name in text(root, report.README)


@pytest.mark.parametrize(
    ("page", "name", "old", "new"),
    [
        (report.MEASURED, "benchmarks", "16 x 8", "16 x 9"),
        (report.README, "speed", "as fast", "as slow"),
        (report.EXAMPLES, "demo", "0.5", "6"),
    ],
)
def test_what_a_page_says_otherwise(page, name, old, new, root, written, capsys) -> None:
    written("run")
    assert report.main([], root) == 0
    (root / page).write_text(text(root, page).replace(old, new))
    capsys.readouterr()
    assert report.main(["--check"], root) == 1
    assert capsys.readouterr().out == f"{root / page}: {name} differs\n"
    (root / page).write_text("# Title\n")
    with pytest.raises(ValueError, match="needs the markers"):
        report.main([], root)


def test_best_and_worst_leave_out_what_is_wrong(smoke) -> None:
    """By hand: naive code that is wrong is no measure of speed, nor is a wrong answer of ours."""
    result = smoke("run")
    result.environment.device = "a machine"
    numbers = ((0.5, False, False), (0.1, False, False), (0.01, False, True), (9.0, True, False),
               (4.0, False, False))  # fmt: skip
    for workload, (seconds, naive_wrong, wrong) in zip(result.workloads, numbers, strict=True):
        workload.results = {
            name: Outcome(seconds={"both": Quantiles(0, s, 0)}, wrong=is_wrong)
            for name, s, is_wrong in (("naive eager", 1.0, naive_wrong), (EAGER, seconds, wrong))
        }
    assert tables.best_and_worst(result) == (
        "On a machine, of 3 workloads that naive code gets right, the best is debiased CKA, "
        "16 x 8 float32: **10.0x** as fast. The worst is Bures, 16 x 8 float32, which takes "
        "**4.00x** as long."
    )
    del result.workloads[:2], result.workloads[-1]
    assert tables.best_and_worst(result) == "On a machine, no workload was measured."


def test_the_documents_are_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0
    assert predict.main(["--check"]) == 0


def test_the_tables_of_what_is_not_measured(tmp_path, capsys) -> None:
    page = predict.DISTRIBUTED
    shutil.copytree(environment.ROOT / "docs", tmp_path / "docs")
    right = text(tmp_path, page)
    (tmp_path / page).write_text(right.replace("us a hop", "s a hop"))
    assert predict.main(["--check"], tmp_path) == 1
    assert "differs" in capsys.readouterr().out
    assert predict.main([], tmp_path) == 0
    assert text(tmp_path, page) == right


@pytest.mark.parametrize(
    ("name", "profile", "shown"),
    [
        ("run", "cpu", "biased, 16 x 8 float32"),
        ("run", "smoke", ""),
        ("step", "cpu", ""),
        ("step", "full", "| + rift_kernels eager, tokens, 136 x 16 float32"),
    ],
)
def test_a_section(name, profile, shown, root, written) -> None:
    """It shows the newest result, but not of the reduced profiles."""
    path = written(name, profile)
    assert report.main([], root) == 0
    assert (path.name in text(root)) == bool(shown)
    assert shown in text(root)
    assert report.main(["--check"], root) == 0


def test_report_draws_and_checks(root, written, capsys) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    written("frontier")
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    (link,) = re.findall(r"!\[.*\]\((.*)\)", text(root))
    picture = root / "docs" / link
    picture.unlink()
    assert report.main(["--check"], root) == 1
    assert f"{picture} differs" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["frontier", "scaling"])
def test_a_picture_is_of_its_result(command, smoke, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    result, path = smoke(command), tmp_path / "picture.svg"
    (picture,) = pictures.of(result)
    assert not picture.is_current(path)
    picture.write(path)
    before = path.read_bytes()
    assert picture.is_current(path)
    picture.write(path)
    assert path.read_bytes() == before
    # Another number.
    if command == "frontier":
        result.curves[0].results[EAGER].errors[0].max *= 1.01
    else:
        result.workloads[0].results[EAGER].seconds["both"].q80 *= 1.01
    assert not pictures.of(result)[0].is_current(path)


def _crosses(result: Any) -> int:
    (picture,) = pictures.of(result)
    lines = (line for axes in pictures.draw(picture).axes for line in axes.lines)
    return sum(line.get_marker() == "x" for line in lines)


def test_what_is_nan_or_wrong_is_drawn(smoke) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    errors, times = smoke("frontier"), smoke("scaling")
    assert [_crosses(errors), _crosses(times)] == [0, 0]
    results = errors.curves[0].results
    for point in results["naive eager"].errors[1:]:
        point.median = point.max = None
    results["ckatorch"] = Errors(reason="it failed")
    assert _crosses(errors) == 2
    assert "naive eager nan" in pictures.of(errors)[0].alt
    missing = "Not measured:\n- ckatorch, biased, bfloat16, 16 x 8: it failed"
    assert pictures.summary(errors).endswith(missing)
    times.workloads[0].results["naive eager"].wrong = True
    # It lies on three curves.
    assert _crosses(times) == 3


def test_alt_texts_have_the_numbers(smoke) -> None:
    errors, times = smoke("frontier"), smoke("scaling")
    last = errors.curves[0].results[EAGER].errors[-1].median
    (picture,) = pictures.of(errors)
    assert re.search(rf"biased, bfloat16, at 1 - CKA = .*?: .*?{EAGER} {last:.3g}", picture.alt)
    last = times.workloads[times.curves[0].workloads[-1]].results[EAGER].seconds["both"].q50
    (picture,) = pictures.of(times)
    assert re.search(rf"at rows N = 16: .*?{EAGER} {1e3 * last:.3g}", picture.alt)
    assert f"![{picture.alt}]" in pictures.summary(times)
