"""The package as installed: what importing it imports, who imports whom, and its report."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rift_kernels as rk
from rift_kernels import dispatch
from rift_kernels.backends import cuda

PACKAGE = Path(rk.__file__).parent
# Who may import whom inside the package; what is not listed may import nothing of it.
ALLOWED = {
    "__init__": {
        *("reference", "_version", "capture", "collect", "dispatch", "functional", "losses"),
        *("moments", "regularizer", "statistics", "weighting"),
    },
    "__main__": {"check", "dispatch"},
    "check": {"_version", "dispatch", "known_answers", "self_test", "verdicts"},
    "self_test": {"known_answers", "verdicts"},
    "trial": {"known_answers", "ops", "verdicts"},
    "known_answers": {"verdicts"},
    "verdicts": {"_version"},
    "capture": {"checks"},
    "losses": {"checks", "dispatch", "distributed", "functional", "matching", "weighting"},
    "weighting": {"checks"},
    "regularizer": {"capture", "losses", "models", "statistics", "weighting"},
    "collect": {
        *("capture", "checks", "distributed", "models", "statistics", "statistics_files"),
    },
    "statistics": {"checks", "features", "statistics_files"},
    "functional": {"checks", "dispatch", "distributed", "matching", "ops"},
    "matching": {
        *("checks", "dispatch", "distributed", "features", "matrix_functions", "moments", "ops"),
        "statistics",
    },
    "moments": {"checks", "dispatch", "distributed", "ops"},
    "distributed": {"checks"},
    "integrations/transformers": {"regularizer", "weighting"},
    "integrations/lightning": {"models", "regularizer"},
    "ops": {"dispatch", "distributed", "measures", "operators"},
    "operators": {
        *("backends", "distributed", "failures", "features", "hsic", "long_rows", "measures"),
        "precision",
    },
    "measures": {"features", "hsic", "long_rows", "matrix_functions"},
    "hsic": {"features", "long_rows"},
    "long_rows": {"features"},
    "dispatch": {
        *("_version", "backends", "failures", "known_answers", "self_test", "traced", "trust"),
        "verdicts",
    },
    "trust": {"self_test", "verdicts"},
    "traced": {"trust"},
    "tune": {"backends", "dispatch", "functional"},
    # Kernels import one another where one reads what the other leaves.
    "backends/triton/__init__": {
        *("covariance_form", "gram_form", "interpreter", "launch", "layers", "products"),
    },
    "backends/triton/launch": {"blocks", "config", "device", "layers", "tiles"},
    "backends/triton/covariance_form": {
        *("backward", "cka", "cka_head", "config", "covariance", "device", "launch", "layers"),
        "longest",
    },
    "backends/triton/gram_form": {
        *("config", "gram", "gram_backward", "launch", "layers", "small_gram"),
    },
    "backends/triton/config": {"layers"},
    "backends/triton/tiles": {"columns", "device"},
    "backends/triton/columns": {"device"},
    "backends/triton/longest": {"columns", "device", "energies"},
    "backends/triton/cka": {"cka_head", "device", "energies", "tiles"},
    "backends/triton/energies": {"device"},
    "backends/triton/covariance": {"cka", "cka_head", "device"},
    "backends/triton/gram": {"device"},
    "backends/triton/small_gram": {"device", "gram"},
    "backends/triton/gram_backward": {"device", "gram"},
    "backends/triton/blocks": {"device", "tiles"},
    "backends/triton/backward": {"cka_head", "device"},
    "backends/triton/products": {"device"},
}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        check=False,
    )


def test_import_leaves_triton_and_extras_alone() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import rift_kernels; "
        "extras = {'sklearn', 'matplotlib', 'rich', 'scipy', 'pytest', 'safetensors'}; "
        "print(sorted(extras & {name.split('.')[0] for name in sys.modules}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert "'triton'" not in python("import sys, rift_kernels; print(list(sys.modules))").stdout


def module(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module)
def test_imports_run_one_way(path) -> None:
    allowed = ALLOWED.get(module(path), set())
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            imported |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(str(name).startswith("rift_kernels") for name in names)
    assert imported <= allowed


def test_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rift_kernels"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == rk.backend_report().strip()
    assert "eager    ready" in result.stdout
    for backend in dispatch.BACKENDS:
        assert (dispatch.reason_against(backend) or "ready") in result.stdout


def test_public_names() -> None:
    assert set(rk.__all__) <= set(dir(rk))
    for name in rk.__all__:
        if name != "__version__":
            assert getattr(rk, name).__doc__, name


def test_eager_on_a_gpu_warns_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(dispatch, "_warned", False)
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        dispatch,
        "reason_against",
        lambda backend, *_: None if backend == "eager" else "the reason",
    )
    with pytest.warns(UserWarning, match="eager backend on this GPU: the reason"):
        assert dispatch.choose_backend("auto", gpu) == "eager"
    assert dispatch.choose_backend("auto", gpu) == "eager"
    monkeypatch.setattr(dispatch, "_warned", False)
    # An explicit choice is not worth a warning, and while torch.compile traces none is possible.
    assert dispatch.choose_backend("eager", gpu) == "eager"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.choose_backend("auto", gpu) == "eager"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("measure", "gram", "covariance"),
    [
        ("cka", (64, 768, 768), (4096, 768, 768)),
        ("cka", (1000, 768, 768), (2000, 768, 768)),
        ("procrustes", (64, 768, 768), (1024, 256, 256)),
        ("procrustes", (64, 64, 768), (150, 64, 768)),
        ("bures", (64, 768, 768), (1024, 256, 256)),
        ("bures", (256, 256, 256), (300, 256, 256)),
        ("covariance", (64, 768, 768), (512, 768, 768)),
    ],
)
def test_cheaper_form(measure, gram, covariance) -> None:
    assert dispatch.use_gram(measure, *gram)
    assert not dispatch.use_gram(measure, *covariance)


def test_reasons_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "float64" in dispatch.reason_against("triton", gpu, (torch.float64, torch.float32))
    assert "features on a GPU; got cpu" in dispatch.reason_against("triton", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in dispatch.reason_against("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "capability 8.0; got 7.5" in dispatch.reason_against("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert dispatch.reason_against("triton", gpu, (torch.bfloat16,)) is None
    with monkeypatch.context() as patch:
        # Nobody looks for modules then: torch 2.11 cannot trace that.
        patch.delattr(importlib.util, "find_spec")
        assert dispatch.choose_backend("auto", gpu, (torch.bfloat16,)) == "triton"
    assert dispatch.choose_backend("auto", cpu) == "eager"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.reason_against("triton", cpu) is None
    # Not unasked: the interpreter is slow.
    assert dispatch.choose_backend("auto", cpu) == "eager"
    assert dispatch.choose_backend("triton", cpu) == "triton"
    monkeypatch.setitem(dispatch.INSTALLED, "triton", False)
    assert dispatch.reason_against("triton", cpu) == "triton is not installed"


def test_reasons_against_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str | None = "cuda", **problem: object) -> str | None:
        asked = {"measure": "cka", "gram": (True,), "rows": 64, "width": 768, **problem}
        where = None if device is None else torch.device(device)
        dtypes = asked.pop("dtypes", (torch.bfloat16,))
        return dispatch.reason_against("cuda", where, dtypes, dispatch.Problem(**asked))

    monkeypatch.setitem(dispatch.INSTALLED, "rift_kernels._C", False)
    assert "installed without its CUDA kernels: put" in reason()
    monkeypatch.setitem(dispatch.INSTALLED, "rift_kernels._C", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "need a GPU" in reason(None)
    assert "features on a GPU; got cpu" in reason("cpu")
    assert "float64" in reason(dtypes=(torch.float64, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "capability 8.0; got 7.5" in reason()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    built = SimpleNamespace(architectures="80;90a;100a")
    monkeypatch.setattr(cuda, "extension", lambda: built)
    assert reason() is None
    assert "linear CKA; got bures" in reason(measure="bures")
    assert "up to 128 rows; got 129" in reason(rows=129)
    assert "not both in one call" in reason(gram=(True, False))
    many = {"gram": (False,), "rows": 4096}
    assert reason(**many) is None
    assert "take no mask" in reason(**many, masked=True)
    assert "up to 28928 columns on this GPU; got 30000" in reason(**many, width=30000)
    assert "bfloat16; got torch.float32" in reason(**many, dtypes=(torch.float32,))
    assert "64 rows of 100000 columns do not fit" in reason(width=100000)
    gpu, asked = torch.device("cuda"), dispatch.Problem("cka", (True,), 64, 768)
    assert dispatch.choose_backend("auto", gpu, (torch.bfloat16,), asked) == "cuda"
    # Not before it is measured.
    most = asked._replace(rows=4096, gram=(False,))
    assert dispatch.choose_backend("auto", gpu, (torch.bfloat16,), most) == "triton"
    assert dispatch.choose_backend("cuda", gpu, (torch.bfloat16,), most) == "cuda"
    built.architectures = "80;90"
    assert reason(**many) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert reason(**many, width=12544) is None
    assert "up to 12544 columns" in reason(**many, width=12545)
    built.architectures = "90a;100a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "not compiled for compute capability 8.0" in reason()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert reason(**{"gram": (False,), "rows": 4096}) is None
    many = asked._replace(rows=256)
    assert dispatch.choose_backend("auto", gpu, (torch.bfloat16,), many) == "triton"
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .* up to 128 rows"):
        dispatch.choose_backend("cuda", gpu, (torch.bfloat16,), many)


@pytest.mark.parametrize(
    ("architectures", "runs", "not_on"),
    [
        ("80;90a;100a", [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)], []),
        ("80", [(8, 0), (8, 9), (9, 0), (12, 0)], []),
        ("90a", [(9, 0), (10, 0)], [(8, 0), (8, 9)]),
        ("86;90a", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
    ],
)
def test_what_an_extension_was_compiled_for(architectures, runs, not_on, monkeypatch) -> None:
    built = SimpleNamespace(architectures=architectures)
    monkeypatch.setattr(cuda, "extension", lambda: built)
    assert all(cuda.compiled_for(capability) for capability in runs)
    assert not any(cuda.compiled_for(capability) for capability in not_on)
    assert cuda.compiled_for((9, 0), True) == ("90a" in architectures)
    assert not cuda.compiled_for((10, 0), True)


def test_the_oldest_versions_tested_are_those_declared() -> None:
    root = PACKAGE.parent
    declared = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (root / "pyproject.toml").read_text()))
    (pins,) = re.findall(r"^OLDEST := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    tested = dict(pin.split("==") for pin in pins.split())
    assert {name: f"{version}.0" for name, version in declared.items()} == {
        name: tested[name] for name in ("torch", "triton")
    }
