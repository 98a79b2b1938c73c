"""The table in docs/status.md of how every kernel was executed, and what it is read from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import files, kernel_tables
from benchmarks.environment import ROOT
from benchmarks.predict import COMPILED, COMPILED_CUDA, STATUS
from benchmarks.schema import Kernels
from tests.support import executed as recorder

pytestmark = pytest.mark.eager_only

TRITON = {"gram_cka_small": {"gram_cka_small": 3}, "gram_cka": {"gram_cka": 1, "raw_moments": 2}}
SOURCE = [
    ("triton", "", TRITON),
    ("cuda", "sm80", {"covariance_cka": {"moments_sm80": 5, "row_terms": 5}}),
    ("cuda", "sm90", {"covariance_cka": {"moments_sm90": 7, "row_terms": 7}}),
]
CONTENT = {
    "source": [
        {"backend": backend, "target": target, "families": families, "missed": []}
        for backend, target, families in SOURCE
    ],
    "compiled": [],
    "versions": {"triton": "1.0"},
}


def test_every_kernel_has_a_row() -> None:
    """Those that compilers have seen are among them; run ``benchmarks.predict`` if a row is not."""
    triton, cuda = (json.loads(p.read_text(encoding="utf-8")) for p in (COMPILED, COMPILED_CUDA))
    names = {
        ("triton", kernel["kernel"].removesuffix("_kernel"))
        for target, cases in triton.items()
        if target not in ("triton", "sources")
        for kernels in cases.values()
        if not isinstance(kernels, str)
        for kernel in kernels
    }
    names |= {
        ("cuda", name.split("<")[0])
        for target, kernels in cuda.items()
        if target != "nvcc"
        for name in kernels
    }
    found = list(kernel_tables.defined())
    assert len(names) > 15
    assert names <= set(found)
    text = (ROOT / STATUS).read_text(encoding="utf-8")
    for backend, name in found:
        assert text.count(f"\n| `{name}` ({backend}) ") == 1, name


def written(folder: Path, **changes: object) -> str:
    """The section of a file."""
    path = folder / "executed.json"
    path.write_text(json.dumps(CONTENT | changes), encoding="utf-8")
    return kernel_tables.executed(path)


def row(section: str, name: str) -> list[str]:
    (line,) = (t for t in section.splitlines() if t.startswith(f"| `{name}` "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_runs_of_compiled_code_are_read(tmp_path: Path) -> None:
    """What missed counts nowhere, and is named."""
    good = {
        "case": "small 16 rows",
        "kernels": {"scale_kernel<Half, float>": {}, "cka_small_kernel<Bf16, Bf16, 16, true>": {}},
    }
    missed = {"case": "small 5 rows", "kernels": {"scale_kernel": {}}, "error": "value 1.0 > 2e-06"}
    runs = []
    for mode in ("exact-late", "truncated-mixed-2"):
        (tmp_path / "runs").mkdir(exist_ok=True)
        path = tmp_path / "runs" / f"cuda-sm90-{mode}.json"
        path.write_text(json.dumps([good, missed, good]), encoding="utf-8")
        runs.append(recorder.compiled_run(path))
    assert runs[0] == {
        "backend": "cuda",
        "target": "sm90",
        "mode": "exact-late",
        "cases": 2,
        "missed": ["small 5 rows: value 1.0 > 2e-06"],
        "kernels": {"cka_small": 2, "scale": 2},
    }
    section = written(tmp_path, compiled=[*runs, runs[0] | {"target": "sm80", "kernels": {}}])
    assert row(section, "cka_small") == [
        kernel_tables.NEVER,
        kernel_tables.NEVER,
        "4",
        kernel_tables.NEVER,
    ]
    assert row(section, "row_terms") == ["12", *[kernel_tables.NEVER] * 3]
    assert "Missed: cuda sm90 exact-late, small 5 rows: value 1.0 > 2e-06." in section


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA H200", {"gram_cka_small", "moments_sm90", "row_terms"}),
        ("NVIDIA A100-SXM4-80GB", {"gram_cka_small", "moments_sm80", "row_terms"}),
        (None, set()),
    ],
)
def test_only_what_agreed_was_on_a_gpu(gpu, expected, tmp_path, monkeypatch) -> None:
    """In every dtype, and of kernels for one architecture only those of this one."""
    answers = [("triton", "gram_cka_small", True), ("cuda", "covariance_cka", True)]
    answers += [("triton", "gram_cka", good) for good in (True, None)]
    check = SimpleNamespace(
        environment=SimpleNamespace(gpu=gpu),
        kernels=[Kernels(backend=b, family=f, dtype="", good=g, seen="") for b, f, g in answers],
    )
    monkeypatch.setattr(files, "newest", lambda *_: {tmp_path: check})
    lines = written(tmp_path).splitlines()
    assert {re.search(r"`(\w+)`", t)[1] for t in lines if gpu and gpu in t} == expected


def test_what_cannot_be_recorded_says_why(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET=1"):
        recorder.main(["source"])
    with pytest.raises(SystemExit, match="compiled FILE"):
        recorder.main(["compiled"])
