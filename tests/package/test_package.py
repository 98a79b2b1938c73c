"""The installed package: what importing it imports, which room imports which, and its report."""

import ast
import graphlib
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
from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability, plan

PACKAGE = Path(rk.__file__).parent
# The rooms that each room may import; "" is what users import. Within a room, modules import what
# they need, without cycles.
ALLOWED = {
    "": {"dispatch", "features", "commands"},
    "commands": {"", "dispatch", "trust", "backends"},
    "integrations": {"", "features"},
    "features": {"dispatch", "measures"},
    "dispatch": {"measures", "backends", "trust"},
    "measures": set(),
    "trust": set(),
    "backends": set(),
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
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    """The folder of a module of the package, "" for the package itself."""
    parts = name.split(".")[1:]
    return parts[0] if parts and f"rift_kernels.{parts[0]}" in ROOMS else ""


ROOMS = {f"rift_kernels.{name}" for name in ALLOWED if name}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, at import or later."""
    package = module(path) if path.stem == "__init__" else module(path).rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            # `from` shows what is used.
            assert not any(alias.name.startswith("rift_kernels") for alias in node.names)
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level <= 1, "rooms import one another by their full names"
        source = ".".join(filter(None, (package if node.level else "", node.module)))
        if source.split(".")[0] == "rift_kernels":
            candidates = (f"{source}.{alias.name}" for alias in node.names)
            names |= {name if name in MODULES else source for name in candidates}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_one_way(name) -> None:
    rooms = {room(other) for other in imported(MODULES[name]) if not other.endswith("._version")}
    assert rooms <= ALLOWED[room(name)] | {room(name)}


def test_every_folder_is_a_room() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ALLOWED) - {""}


def test_imports_have_no_cycle() -> None:
    graph = {
        name: {other for other in imported(path) if other != "rift_kernels"}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rift_kernels"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == rk.backend_report().strip()
    assert "eager    ready" in result.stdout
    for backend in availability.BACKENDS:
        assert (availability.reason_against(backend) or "ready") in result.stdout


def test_public_names() -> None:
    assert set(rk.__all__) <= set(dir(rk))
    for name in rk.__all__:
        if name != "__version__":
            assert getattr(rk, name).__doc__, name


def test_eager_on_a_gpu_warns_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(plan, "_warned", False)
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        availability,
        "reason_against",
        lambda backend, *_: None if backend == "eager" else "the reason",
    )
    with pytest.warns(UserWarning, match="eager backend on this GPU: triton: the reason"):
        assert plan.choose_backend("auto", gpu) == "eager"
    assert plan.choose_backend("auto", gpu) == "eager"
    monkeypatch.setattr(plan, "_warned", False)
    # An explicit choice needs no warning, and torch.compile cannot trace one.
    assert plan.choose_backend("eager", gpu) == "eager"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plan.choose_backend("auto", gpu) == "eager"
    assert not recwarn.list


@pytest.mark.parametrize("measure", [rk.linear_cka, rk.RIFTLoss()])
def test_a_warning_points_at_the_line_of_the_user(measure, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_warned", False)
    monkeypatch.setattr(plan, "_has_kernels", lambda _: True)
    x = torch.randn(8, 4)
    with pytest.warns(UserWarning, match="eager backend on this GPU") as caught:
        measure(x, x)
    assert [warning.filename for warning in caught] == [__file__]


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
    assert plan.use_gram(measure, *gram)
    assert not plan.use_gram(measure, *covariance)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("backend", "measure", "gram", "dtypes", "fused", "student_alone"),
    [
        ("eager", "cka", (False,), (BF16, BF16), False, (False, False)),
        ("triton", "procrustes", (False,), (BF16, BF16), False, (False, False)),
        ("triton", "moments", (False,), (BF16, BF16), False, (False, False)),
        # The gradient in covariance form multiplies both sides.
        ("triton", "cka", (False,), (BF16, BF16), True, (True, True)),
        ("triton", "cka", (True, False), (BF16, BF16), True, (True, True)),
        ("triton", "cka", (True,), (BF16, BF16), True, (True, False)),
        # Two dtypes are computed in a third, which one side does not tell.
        ("triton", "cka", (True,), (BF16, FP32), True, (True, True)),
        ("triton", "covariance", (False,), (BF16, BF16), True, (True, False)),
        ("triton", "covariance", (True,), (BF16, BF16), False, (False, False)),
        # The kernel of few rows has computed the gradients already.
        ("cuda", "cka", (True,), (BF16, BF16), True, (False, False)),
        ("cuda", "cka", (False,), (BF16, BF16), True, (True, True)),
    ],
)
def test_what_a_plan_keeps(backend, measure, gram, dtypes, fused, student_alone) -> None:
    problem = availability.Problem(measure, gram, 300, 64)
    made = plan.with_backend(backend, dtypes, problem)
    assert made.fused == fused
    assert made.kept_sides((True, False)) == student_alone
    assert made.kept_sides((False, False)) == (False, False)
    assert made.on_eager() == plan.Plan("eager", gram)


def test_reasons_against_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "float64" in availability.reason_against("triton", gpu, (torch.float64, torch.float32))
    assert "features on a GPU; got cpu" in availability.reason_against("triton", cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in availability.reason_against("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "capability 8.0; got 7.5" in availability.reason_against("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert availability.reason_against("triton", gpu, (torch.bfloat16,)) is None
    with monkeypatch.context() as patch:
        # A call does not look for modules, which torch 2.11 cannot trace.
        patch.delattr(importlib.util, "find_spec")
        assert plan.choose_backend("auto", gpu, (torch.bfloat16,)) == "triton"
    assert plan.choose_backend("auto", cpu) == "eager"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert availability.reason_against("triton", cpu) is None
    # Only on request: the interpreter is slow.
    assert plan.choose_backend("auto", cpu) == "eager"
    assert plan.choose_backend("triton", cpu) == "triton"
    monkeypatch.setitem(availability.INSTALLED, "triton", False)
    assert availability.reason_against("triton", cpu) == "triton is not installed"


def test_reasons_against_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str | None = "cuda", **problem: object) -> str | None:
        fields = {"measure": "cka", "gram": (True,), "rows": 64, "width": 768, **problem}
        place = None if device is None else torch.device(device)
        dtypes = fields.pop("dtypes", (torch.bfloat16,))
        return availability.reason_against("cuda", place, dtypes, availability.Problem(**fields))

    monkeypatch.setitem(availability.INSTALLED, "rift_kernels._C", False)
    assert "installed without its CUDA kernels: put" in reason()
    monkeypatch.setitem(availability.INSTALLED, "rift_kernels._C", True)
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
    assert "up to 32768 columns; got 40000" in reason(**many, width=40000)
    assert "bfloat16; got torch.float32" in reason(**many, dtypes=(torch.float32,))
    assert "64 rows of 100000 columns do not fit" in reason(width=100000)
    gpu, few_rows = torch.device("cuda"), availability.Problem("cka", (True,), 64, 768)
    assert plan.choose_backend("auto", gpu, (torch.bfloat16,), few_rows) == "cuda"
    # Only an explicit choice takes kernels that are not measured.
    many_rows = few_rows._replace(rows=4096, gram=(False,))
    assert plan.choose_backend("auto", gpu, (torch.bfloat16,), many_rows) == "triton"
    assert plan.choose_backend("cuda", gpu, (torch.bfloat16,), many_rows) == "cuda"
    built.architectures = "80;90"
    assert reason(**many) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert reason(**many, width=32768) is None
    built.architectures = "90a;100a"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "not compiled for compute capability 8.0" in reason()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert reason(**{"gram": (False,), "rows": 4096}) is None
    more_rows = few_rows._replace(rows=256)
    assert plan.choose_backend("auto", gpu, (torch.bfloat16,), more_rows) == "triton"
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .* up to 128 rows"):
        plan.choose_backend("cuda", gpu, (torch.bfloat16,), more_rows)


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
