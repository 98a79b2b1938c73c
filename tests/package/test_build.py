"""The build of the CUDA C++ extension: setup.py's choices, and the extension itself."""

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
from tests.support import cuda_resources

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", reason="needs setuptools")


specification = importlib.util.spec_from_file_location("rift_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)


# The architectures that some releases of nvcc list; for older ones, some of them.
LISTS = {
    "11.2": "35 80 86",
    "11.8": "35 80 86 89 90",
    "12.4": "50 80 86 89 90",
    "12.8": "50 80 90 100 101 120",
    "13.0": "75 80 90 100 103 110 120",
}
_NVCC = """\
#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--list-gpu-arch) for name in {names}; do echo "compute_$name"; done ;;
esac
"""


def fake_nvcc(folder: Path, release: str = "13.0") -> Path:
    """An executable with the output of that release, which compiles nothing."""
    compiler = folder / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True, exist_ok=True)
    compiler.write_text(_NVCC.format(release=release, names=LISTS[release]))
    compiler.chmod(0o755)
    return compiler


def test_nvcc_is_found(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path)
    with_nvcc = {"PATH": str(nvcc.parent)}
    for choice in ({}, {"RIFT_KERNELS_CUDA": ""}, {"RIFT_KERNELS_CUDA": "1"}):
        assert build.plan({**with_nvcc, **choice}, "linux").nvcc == str(nvcc)
    other = nvcc.rename(nvcc.with_name("nvcc-13"))
    assert build.find_nvcc({"PATH": "", "NVCC": str(other)}) == str(other)
    assert build.find_nvcc({**with_nvcc, "NVCC": other.name}) == str(other)


def test_order_of_nvccs(tmp_path: Path) -> None:
    """NVCC, CUDA_HOME, CUDA_PATH, PATH; a toolkit without a compiler is skipped."""
    names = ("NVCC", "CUDA_HOME", "CUDA_PATH", "PATH")
    compilers = {name: str(fake_nvcc(tmp_path / name)) for name in names}
    environment = {name: str(tmp_path / name) for name in names}
    environment |= {"NVCC": compilers["NVCC"], "PATH": str(Path(compilers["PATH"]).parent)}
    for name in names:
        assert build.find_nvcc(environment) == compilers[name]
        environment[name] = str(tmp_path / "nothing") if name.startswith("CUDA") else ""
    assert build.find_nvcc(environment) is None


@pytest.mark.parametrize(
    ("environment", "platform", "reason"),
    [
        ({"RIFT_KERNELS_CUDA": "0"}, "linux", "RIFT_KERNELS_CUDA=0"),
        ({"RIFT_KERNELS_CUDA": "0", "NVCC": "/nowhere"}, "linux", "RIFT_KERNELS_CUDA=0"),
        ({}, "darwin", "for Linux, and this is darwin"),
        ({"NVCC": "nvcc.exe", "CUDA_PATH": "C:"}, "win32", "for Linux, and this is win32"),
        ({"PATH": ""}, "linux", "no nvcc in PATH; install the CUDA toolkit"),
        (
            {"PATH": "", "CUDA_HOME": "/toolkit"},
            "linux",
            "no nvcc in CUDA_HOME/bin (/toolkit/bin) and none in PATH",
        ),
    ],
)
def test_what_is_left_out_and_why(environment, platform, reason, tmp_path: Path) -> None:
    path = {"PATH": str(fake_nvcc(tmp_path).parent)}
    plan = build.plan({**path, **environment}, platform)
    assert plan.nvcc is None
    assert "the CUDA kernels are left out" in plan.note
    assert reason in plan.note


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            _NVCC.format(release="11.2", names=""),
            r"nvcc 11\.2 \(.*\) is too old: .* works is 11\.8",
        ),
        ("#!/bin/sh\necho no libraries >&2; exit 127", "cannot run: no libraries"),
        ("#!/nowhere/sh", "cannot run: .*No such file"),
        ("#!/bin/sh\necho hello", "--version names no release: 'hello'"),
    ],
)
def test_an_unusable_compiler(script: str, reason: str, tmp_path: Path) -> None:
    """It is an error only for a user who asks for the kernels."""
    nvcc = fake_nvcc(tmp_path)
    nvcc.write_text(script)
    path = {"PATH": f"{nvcc.parent}:/bin"}
    assert re.search(reason, build.plan(path, "linux").note)
    for request in ({"RIFT_KERNELS_CUDA": "1"}, {"NVCC": str(nvcc)}):
        with pytest.raises(SystemExit, match=reason):
            build.plan({**path, **request}, "linux")


@pytest.mark.parametrize(
    ("environment", "platform", "text"),
    [
        ({"RIFT_KERNELS_CUDA": "yes"}, "linux", r"RIFT_KERNELS_CUDA must be 1 .* unset .*'yes'"),
        ({"RIFT_KERNELS_CUDA": "1"}, "linux", r"no nvcc in PATH; install .* RIFT_KERNELS_CUDA=0"),
        ({"RIFT_KERNELS_CUDA": "1"}, "win32", r"for Linux, and this is win32. RIFT_KERNELS_CUDA=0"),
        ({"NVCC": "/nowhere/nvcc"}, "linux", r"NVCC must be .*; got '/nowhere/nvcc'"),
    ],
)
def test_what_cannot_be_built(environment, platform, text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=text):
        build.plan({"PATH": str(tmp_path), **environment}, platform)


def planned(folder: Path, release: str, text: str | None = None):
    """The plan with that release and this list of architectures."""
    setting = {} if text is None else {"RIFT_KERNELS_CUDA_ARCHS": text}
    return build.plan({"NVCC": str(fake_nvcc(folder, release)), **setting}, "linux")


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        (None, ["80", "90a", "100a"]),
        ("", ["80", "90a", "100a"]),
        ("80,90a", ["80", "90a"]),
        (" 90a ; 100f;90a", ["90a", "100f"]),
    ],
)
def test_architectures(text: str | None, architectures: list[str], tmp_path: Path) -> None:
    plan = planned(tmp_path, "13.0", text)
    assert plan.architectures == architectures
    assert plan.note == ""


@pytest.mark.parametrize(
    ("release", "known", "left_out"),
    [("11.8", "80", "90a, 100a"), ("12.4", "80;90a", "100a"), ("12.8", "80;90a;100a", "")],
)
def test_an_older_compiler_compiles_what_it_knows(release, known, left_out, tmp_path: Path) -> None:
    """It reduces the default; an explicit list is compiled in full, or is an error."""
    plan = planned(tmp_path, release)
    assert plan.architectures == known.split(";")
    assert bool(plan.note) == bool(left_out)
    assert (
        f"for {known} and not for {left_out}, which nvcc {release} (" in plan.note or not left_out
    )
    assert planned(tmp_path, release, known).note == ""
    if left_out:
        with pytest.raises(SystemExit, match="must be architectures that nvcc") as error:
            planned(tmp_path, release, build.ARCHITECTURES)
        assert f"got {left_out} in '{build.ARCHITECTURES}'" in str(error.value)
        assert "80, 86, 89, 90" in str(error.value)


def test_a_newer_compiler_without_the_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LISTS, "13.0", "110 120")
    with pytest.raises(SystemExit, match=r"CUDA_ARCHS must be .* which are 110, 120"):
        planned(tmp_path, "13.0")


def test_the_documents_name_the_architectures() -> None:
    assert f'`"{build.ARCHITECTURES}"`' in (ROOT / "docs" / "kernels.md").read_text()


@pytest.mark.parametrize("text", ["sm_80", "8.0", "80;", "80 90a", "9", "native", "90b"])
def test_wrong_architectures(text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="RIFT_KERNELS_CUDA_ARCHS must be") as error:
        planned(tmp_path, "13.0", text)
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
        ["--threads", "0"],
    )
    kernel, bindings = re.findall(r"  flags = (.*)", text)
    assert "'/my tools/nvcc' -std=c++17" in text
    assert "build scale.cu.o: compile /a$ b$$/scale.cu\n" in text
    assert "build /a$ b$$/_C.so: link scale.cu.o bindings.cpp.o\n" in text
    assert kernel.split() == [
        *build.KERNEL_FLAGS,
        *("--threads", "0"),
        *build.gencode(["80", "90a"]),
    ]
    assert bindings == """'-DRIFT_ARCHS="80;90a"' -isystem '/py thon/include'"""


@pytest.mark.parametrize("jobs", ["0", "-1", "all", "1.5"])
def test_wrong_number_of_jobs(jobs: str) -> None:
    with pytest.raises(SystemExit, match=f"MAX_JOBS must be a number .*; got '{jobs}'"):
        build.jobs_of({"MAX_JOBS": jobs})


NINJA = """\
#!/bin/sh
echo ninja "$@"
exit ${NINJA_FAILS:-0}
"""


@pytest.fixture
def built(tmp_path: Path):
    """Runs setup.py with nvcc 12.4 and a ninja that compiles nothing."""
    project = tmp_path / "project"
    (project / "csrc" / "cka_small").mkdir(parents=True)
    (project / "rift_kernels").mkdir()
    for name in ("setup.py", "csrc/cka_small/scale.cu", "csrc/bindings.cpp"):
        shutil.copy(ROOT / name, project / name)
    (project / "rift_kernels" / "__init__.py").touch()
    (project / "setup.cfg").write_text("[options]\npackages = rift_kernels\n")
    modules, ninja = tmp_path / "modules", tmp_path / "ninja"
    modules.mkdir()
    (modules / "pybind11.py").write_text("get_include = lambda: '/include'\n")
    (modules / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path)!r}\n")
    ninja.write_text(NINJA)
    ninja.chmod(0o755)
    nvcc = fake_nvcc(tmp_path / "toolkit", "12.4")

    def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        variables_of_user = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RIFT_", "NVCC", "CUDA", "MAX_JOBS"))
        }
        home = {"CUDA_HOME": str(nvcc.parent.parent), "PYTHONPATH": str(modules)}
        return subprocess.run(
            [sys.executable, "setup.py", *command.split()],
            cwd=project,
            env={**variables_of_user, **home, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    run.folder = project
    return run


def test_a_build(built) -> None:
    """The compiler of CUDA_HOME compiles for what it knows, and a line says so."""
    run = built("build_ext")
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("rift_kernels:"))
    assert "compiled for 80;90a and not for 100a, which nvcc 12.4" in line
    assert "ninja -C build/temp" in run.stdout
    (path,) = built.folder.glob("build/*/build.ninja")
    text = path.read_text()
    assert "toolkit/bin/nvcc" in text
    assert "code=sm_90a" in text
    assert "100a" not in text
    assert "--threads 0" in text
    assert "ninja -j 3 -C" in built("build_ext", MAX_JOBS="3").stdout
    assert "--threads 1" in path.read_text()


def test_a_build_that_fails(built) -> None:
    run = built("build_ext", NINJA_FAILS="1")
    assert run.returncode != 0
    assert "do not compile with " in run.stderr
    for way_out in ("NVCC", "CUDA_HOME", "-ccbin", "RIFT_KERNELS_CUDA=0"):
        assert way_out in run.stderr


def test_nothing_to_build(built) -> None:
    run = built("build_py", RIFT_KERNELS_CUDA="0", MAX_JOBS="all")
    assert run.returncode == 0, run.stderr
    assert "rift_kernels: the CUDA kernels are left out (RIFT_KERNELS_CUDA=0)" in run.stdout
    wrong = built("build_py", MAX_JOBS="all")
    assert "MAX_JOBS must be" in wrong.stderr


@pytest.fixture
def extension():
    """``rift_kernels._C``, which may be missing only if nothing could have built it."""
    if importlib.util.find_spec("rift_kernels._C") is None:
        plan = build.plan(os.environ)
        if plan.nvcc is None:
            pytest.skip(f"needs rift_kernels._C: {plan.note}")
        pytest.fail("there is an nvcc, but no rift_kernels._C: pip install --editable .")
    return importlib.import_module("rift_kernels._C")


def test_warnings_are_errors_where_asked_for() -> None:
    assert "all-warnings" in build.flags_of({"RIFT_KERNELS_STRICT": "1"})
    assert "all-warnings" not in build.flags_of({})


def test_extension(extension) -> None:
    assert re.fullmatch(r"(\d+[af]?;)*\d+[af]?", extension.architectures)
    # An empty list needs no GPU.
    extension.scale([], 2, 2, 0, 0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "call", ["scale([(16, 16, 1, 1, 16)], 2, 2, 0, 0)", "cka_small_plan(0, 4, 4)"]
)
def test_launch_without_a_gpu(call) -> None:
    code = (
        "import rift_kernels._C as extension\n"
        f"try: extension.{call}\n"
        "except RuntimeError as error: print(error)"
    )
    parent = Path(rift_kernels.__file__).parent.parent
    # No device, even on a machine with GPUs.
    environment = {**os.environ, "PYTHONPATH": str(parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    _, function, error = result.stdout.strip().split(": ", 2)
    assert function.startswith("cu")
    assert re.match("cudaErrorInsufficientDriver|cudaErrorNoDevice|CUDA_ERROR_NO_DEVICE", error)


@pytest.fixture(scope="session")
def compiled() -> cuda_resources.Resources:
    if importlib.util.find_spec("rift_kernels._C") is None:
        # The fixture above fails if it should be there.
        pytest.skip("needs rift_kernels._C, which was not built")
    if cuda_resources.cuobjdump() is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump and c++filt")
    origin = importlib.util.find_spec("rift_kernels._C").origin
    return cuda_resources.kernel_resources(Path(origin))


def test_what_the_kernels_compile_to(compiled) -> None:
    """All values in registers, products on tensor cores, and clusters where the GPU has them."""
    for arch, kernels in compiled.items():
        assert any("cka_small" in name for name in kernels)
        has_clusters = int(re.search(r"\d+", arch)[0]) >= 90
        for name, needs in kernels.items():
            assert needs["stack"] == 0, (arch, name)
            assert needs["local"] == 0, (arch, name)
            if name.startswith("cka_small"):
                assert needs["products"] > 0, (arch, name)
                assert (needs["clusters"] > 0) == has_clusters, (arch, name)
        # Features on their way take no registers, however many are under way.
        assert all(kernels[name]["copies"] for name in ("statistics", "longest", "row_terms"))
        # Weighted columns leave as vectors, not element by element.
        assert kernels["longest"]["vector_stores"]
        anywhere = [needs for name, needs in kernels.items() if "sm80" in name]
        assert len(anywhere) == 2
        assert all(needs["products"] and needs["copies"] for needs in anywhere)
        # Kernels with Hopper's instructions are compiled for Hopper only.
        hopper = [needs for name, needs in kernels.items() if "sm90" in name]
        assert bool(hopper) == (arch == "sm_90a")
        assert all(needs["bulk"] and needs["multicast"] for needs in hopper)
        # At least four products per wait: the compiler has not serialised them.
        assert all(needs["warpgroup"] > 2 * needs["waits"] for needs in hopper)
        # A fence between products would keep the tensor cores waiting for memory.
        assert all(needs["fences_among_products"] == 0 for needs in hopper)
        # Two for each of two barriers of the cluster, and one before the copy engine overwrites.
        assert all(needs["fences"] <= 5 for needs in hopper)
        assert len(hopper) in (0, 2)


def test_table_is_current(compiled) -> None:
    """If this fails, run ``python -m tests.support.cuda_resources`` and look at the difference."""
    expected = json.loads(cuda_resources.RESULT.read_text(encoding="utf-8"))
    nvcc = build.find_nvcc(os.environ)
    release = expected.pop("nvcc")
    if nvcc is None or cuda_resources.release(nvcc) != release:
        pytest.skip(f"needs nvcc {release}, with which the table was made")
    if not compiled.keys() <= expected.keys():
        pytest.skip(f"needs a build for no architecture but {', '.join(expected)}, as in the table")
    assert compiled == {arch: expected[arch] for arch in compiled}
