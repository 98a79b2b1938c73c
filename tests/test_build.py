"""How the CUDA C++ extension is built: setup.py's choices, and the extension where it was built."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rift_kernels
from tests import cuda_resources

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools", reason="needs setuptools")


specification = importlib.util.spec_from_file_location("rift_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


@pytest.fixture
def nvcc(tmp_path: Path) -> Path:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    return compiler


def test_nvcc_is_found(nvcc: Path, tmp_path: Path) -> None:
    with_nvcc = {"PATH": str(nvcc.parent)}
    for choice in ({}, {"RIFT_KERNELS_CUDA": ""}, {"RIFT_KERNELS_CUDA": "1"}):
        assert build.find_nvcc({**with_nvcc, **choice}) == str(nvcc)
    assert build.find_nvcc({**with_nvcc, "RIFT_KERNELS_CUDA": "0"}) is None
    assert build.find_nvcc({"PATH": str(tmp_path)}) is None
    assert build.find_nvcc({}) is None
    other = nvcc.rename(nvcc.with_name("nvcc-13"))
    assert build.find_nvcc({"PATH": "", "NVCC": str(other)}) == str(other)
    assert build.find_nvcc({**with_nvcc, "NVCC": other.name}) == str(other)
    assert build.find_nvcc({"NVCC": "/nowhere", "RIFT_KERNELS_CUDA": "0"}) is None


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"RIFT_KERNELS_CUDA": "yes"}, r"RIFT_KERNELS_CUDA must be 1 .*, 0 .* or unset .*'yes'"),
        ({"RIFT_KERNELS_CUDA": "1"}, r"install the CUDA toolkit .*, or set RIFT_KERNELS_CUDA=0"),
        ({"NVCC": "/nowhere/nvcc"}, r"NVCC must be .*; got '/nowhere/nvcc'"),
    ],
)
def test_no_nvcc(environment: dict[str, str], text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=text):
        build.find_nvcc({"PATH": str(tmp_path), **environment})


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        (None, ["80", "90a", "100a"]),
        ("", ["80", "90a", "100a"]),
        ("80,90a", ["80", "90a"]),
        (" 90a ; 100f;90a", ["90a", "100f"]),
    ],
)
def test_architectures(text: str | None, architectures: list[str]) -> None:
    environment = {} if text is None else {"RIFT_KERNELS_CUDA_ARCHS": text}
    assert build.parse_architectures(environment) == architectures


def test_readme_names_the_architectures() -> None:
    assert f'`"{build.ARCHITECTURES}"`' in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", ["sm_80", "8.0", "80;", "80 90a", "9", "native", "90b"])
def test_wrong_architectures(text: str) -> None:
    with pytest.raises(SystemExit, match="RIFT_KERNELS_CUDA_ARCHS must be") as error:
        build.parse_architectures({"RIFT_KERNELS_CUDA_ARCHS": text})
    assert repr(text) in str(error.value)
    assert build.ARCHITECTURES in str(error.value)


def test_gencode() -> None:
    assert build.gencode(["80", "90a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_build_ninja() -> None:
    folder = Path("/a b$")
    text = build.build_ninja(
        ["/my tools/nvcc", *build.flags_of({})],
        ["80", "90a"],
        [folder / "scale.cu", folder / "bindings.cpp"],
        ["/py thon/include"],
        folder / "_C.so",
    )
    kernel, bindings = re.findall(r"  flags = (.*)", text)
    assert "'/my tools/nvcc' -std=c++17" in text
    assert "build scale.cu.o: compile /a$ b$$/scale.cu\n" in text
    assert "build /a$ b$$/_C.so: link scale.cu.o bindings.cpp.o\n" in text
    assert kernel.split() == [*build.KERNEL_FLAGS, *build.gencode(["80", "90a"])]
    assert bindings == """'-DRIFT_ARCHS="80;90a"' -isystem '/py thon/include'"""


@pytest.fixture
def extension():
    """``rift_kernels._C``: may be missing only where nothing could have built it."""
    if importlib.util.find_spec("rift_kernels._C") is None:
        if os.environ.get("RIFT_KERNELS_CUDA") == "0":
            pytest.skip("needs rift_kernels._C, which RIFT_KERNELS_CUDA=0 leaves out")
        if shutil.which(os.environ.get("NVCC") or "nvcc") is None:
            pytest.skip("needs rift_kernels._C, and there is no nvcc on PATH to build it")
        pytest.fail("there is an nvcc, but no rift_kernels._C: pip install --editable .")
    return importlib.import_module("rift_kernels._C")


def test_warnings_are_errors_where_asked_for() -> None:
    assert "all-warnings" in build.flags_of({"RIFT_KERNELS_STRICT": "1"})
    assert "all-warnings" not in build.flags_of({})


def test_extension(extension) -> None:
    given = {"RIFT_KERNELS_CUDA_ARCHS": extension.architectures}
    assert ";".join(build.parse_architectures(given)) == extension.architectures
    # Nothing to do needs no GPU.
    extension.scale([], 2, 2, 0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("call", "launcher"),
    [("scale([(16, 16, 1, 1, 16)], 2, 2, 0)", "scale"), ("cka_small_plan(4, 4)", "cka_small_plan")],
)
def test_launch_without_a_gpu(call, launcher) -> None:
    code = (
        "import rift_kernels._C as extension\n"
        f"try: extension.{call}\n"
        "except RuntimeError as error: print(error)"
    )
    parent = Path(rift_kernels.__file__).parent.parent
    # No device, whatever the machine.
    environment = {**os.environ, "PYTHONPATH": str(parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    name, error, text = result.stdout.strip().split(": ", 2)
    assert name == launcher
    assert error in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
    assert "CUDA" in text


@pytest.fixture(scope="session")
def compiled() -> cuda_resources.Resources:
    if importlib.util.find_spec("rift_kernels._C") is None:
        # Whether it may be missing, the fixture above says.
        pytest.skip("needs rift_kernels._C, which was not built")
    if cuda_resources.cuobjdump() is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump and c++filt")
    origin = importlib.util.find_spec("rift_kernels._C").origin
    return cuda_resources.measured(Path(origin))


def test_what_the_kernels_compile_to(compiled) -> None:
    """Everything in registers; products on tensor cores; clusters where there are any."""
    for arch, kernels in compiled.items():
        assert any("cka_small" in name for name in kernels)
        has_clusters = int(re.search(r"\d+", arch)[0]) >= 90
        for name, needs in kernels.items():
            assert needs["stack"] == 0, (arch, name)
            assert needs["local"] == 0, (arch, name)
            if name.startswith("cka_small"):
                assert needs["products"] > 0, (arch, name)
                assert (needs["clusters"] > 0) == has_clusters, (arch, name)
        anywhere = [needs for name, needs in kernels.items() if "sm80" in name]
        assert len(anywhere) == 2
        assert all(needs["products"] and needs["copies"] for needs in anywhere)
        # Hopper's own kernels are there, on its own instructions, and nowhere else.
        hopper = [needs for name, needs in kernels.items() if "sm90" in name]
        assert bool(hopper) == (arch == "sm_90a")
        assert all(needs["bulk"] and needs["multicast"] for needs in hopper)
        # Four products at least for every wait: the compiler has not put them one after another.
        assert all(needs["warpgroup"] > 2 * needs["waits"] for needs in hopper)
        assert len(hopper) in (0, 2)


def test_table_is_current(compiled) -> None:
    """Run ``python -m tests.cuda_resources`` where this fails, and look at the difference."""
    expected = json.loads(cuda_resources.RESULT.read_text(encoding="utf-8"))
    nvcc = shutil.which(os.environ.get("NVCC") or "nvcc")
    release = expected.pop("nvcc")
    if nvcc is None or cuda_resources.release(nvcc) != release:
        pytest.skip(f"needs nvcc {release}, which the table is of")
    if not compiled.keys() <= expected.keys():
        pytest.skip(f"needs a build for none but {', '.join(expected)}, which the table is of")
    assert compiled == {arch: expected[arch] for arch in compiled}
