"""Builds the CUDA C++ extension ``rift_kernels._C`` with nvcc and ninja; asks for no torch, no GPU.

Everything else is declared in pyproject.toml. Environment variables:

- ``RIFT_KERNELS_CUDA``: 1 builds the extension or fails, 0 leaves it out; unset, it is built on
  Linux where there is an nvcc that can.
- ``RIFT_KERNELS_CUDA_ARCHS``: the architectures, as nvcc's ``sm_90a`` has them, all of which nvcc
  must know; unset, those of "80;90a;100a" that it knows.
- ``RIFT_KERNELS_STRICT``: 1 makes every warning an error.
- ``NVCC``: the compiler; else that of ``CUDA_HOME``, else of ``CUDA_PATH``, else the one on PATH.
- ``MAX_JOBS``: how many compilers run at once; unset, as many as there are processors.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ARCHITECTURES = "80;90a;100a"
FLAGS = shlex.split("-std=c++17 -O3 -Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden")
# A newer compiler warns of more, which is no reason for an installation to fail.
STRICT_FLAGS = shlex.split("-Xcompiler -Werror -Werror all-warnings")
# A spilled register is a warning.
KERNEL_FLAGS = shlex.split("-Xptxas -warn-spills")
# Clusters can be launched from here on.
OLDEST = (11, 8)
# What the list of a compiler does not tell: since when it knows Hopper's own instructions.
OLDEST_90A = (12, 0)


class Compiler(NamedTuple):
    """An nvcc, and what it says of itself."""

    path: str
    release: tuple[int, int]
    architectures: list[str]  # their numbers

    def __str__(self) -> str:
        """As messages name it."""
        return "nvcc {}.{} ({})".format(*self.release, self.path)

    def knows(self, name: str) -> bool:
        """Whether it compiles for an architecture such as 90a."""
        since = OLDEST_90A if name == "90a" else OLDEST
        return name.rstrip("af") in self.architectures and self.release >= since


class Plan(NamedTuple):
    """What will be built, and a line for the user where that is less than all."""

    nvcc: str | None
    architectures: list[str]
    note: str


def plan(environment: Mapping[str, str], platform: str = sys.platform) -> Plan:
    """What to build with these settings; SystemExit where they ask for what cannot be built."""
    choice = environment.get("RIFT_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(
            "RIFT_KERNELS_CUDA must be 1 (build the CUDA kernels), 0 (leave them out) or unset "
            f"(build them where there is an nvcc that can); got {choice!r}"
        )
    if choice == "0":
        return _left_out("RIFT_KERNELS_CUDA=0")
    reason = f"they are for Linux, and this is {platform}"
    if platform == "linux":
        nvcc = find_nvcc(environment)
        compiler, reason = inspected(nvcc) if nvcc else (None, _searched(environment))
        if compiler is not None:
            return Plan(compiler.path, *parse_architectures(environment, compiler))
    if choice == "1" or (platform == "linux" and environment.get("NVCC")):
        cause = "RIFT_KERNELS_CUDA=1" if choice == "1" else f"NVCC={environment['NVCC']}"
        raise SystemExit(
            f"{cause} asks for the CUDA kernels, and they cannot be built: {reason}. "
            "RIFT_KERNELS_CUDA=0 leaves them out"
        )
    return _left_out(reason)


def _left_out(reason: str) -> Plan:
    return Plan(None, [], f"the CUDA kernels are left out ({reason}), the rest is installed")


HOMES = ("CUDA_HOME", "CUDA_PATH")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """That of NVCC, which is then the only one; else the first in CUDA_HOME, CUDA_PATH and PATH."""
    path = environment.get("PATH", "")
    if named := environment.get("NVCC"):
        return shutil.which(named, path=path)
    folders = [f"{environment[home]}/bin" for home in HOMES if environment.get(home)]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, path]))


def _searched(environment: Mapping[str, str]) -> str:
    if named := environment.get("NVCC"):
        return f"NVCC must be an nvcc that can be run, or unset; got {named!r}"
    homes = [f"{home}/bin ({environment[home]}/bin)" for home in HOMES if environment.get(home)]
    places = " and none in ".join([*homes, "PATH"])
    return (
        f"there is no nvcc in {places}; install the CUDA toolkit, or set CUDA_HOME to where it is"
    )


def inspected(nvcc: str) -> tuple[Compiler | None, str]:
    """The compiler, or why nothing can be compiled with it."""
    try:
        version, listed = _ask(nvcc, "--version"), _ask(nvcc, "--list-gpu-arch")
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{nvcc} cannot be run: {error}"
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None:
        return None, f"{nvcc} --version names no release: {version.strip()!r}"
    compiler = Compiler(nvcc, (int(found[1]), int(found[2])), re.findall(r"compute_(\d+)", listed))
    if compiler.release < OLDEST:
        return None, f"{compiler} is too old: {OLDEST[0]}.{OLDEST[1]} is the oldest that will do"
    return compiler, ""


def _ask(nvcc: str, question: str) -> str:
    done = subprocess.run([nvcc, question], capture_output=True, text=True, check=False)
    if done.returncode and question == "--version":
        text = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise subprocess.SubprocessError(text)
    return done.stdout


def parse_architectures(
    environment: Mapping[str, str], compiler: Compiler
) -> tuple[list[str], str]:
    """What to compile for, ["80", "90a", "100a"], and a line if that is not all of the default.

    SystemExit where the text is no such list, or has what the compiler does not know.
    """
    given = environment.get("RIFT_KERNELS_CUDA_ARCHS")
    text = given or ARCHITECTURES
    names = list(dict.fromkeys(name.strip() for name in re.split("[;,]", text)))
    for name in names:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", name):
            raise SystemExit(
                f'RIFT_KERNELS_CUDA_ARCHS must be architectures as in "{ARCHITECTURES}", with ; '
                f"or , between them; got {name!r} in {text!r}"
            )
    known = [name for name in names if compiler.knows(name)]
    missing = ", ".join(name for name in names if name not in known)
    if not missing:
        return known, ""
    if given or not known:
        raise SystemExit(
            f"RIFT_KERNELS_CUDA_ARCHS must be architectures that {compiler} knows, which are "
            f"{', '.join(compiler.architectures) or 'none'}; got {missing} in {text!r}"
        )
    return known, (
        f"the CUDA kernels are compiled for {';'.join(known)} and not for {missing}, "
        f"which {compiler} does not know; GPUs newer than {known[-1]} compile them when they load"
    )


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each, and of the last PTX as well, for all GPUs to come."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    # That of "100a" would run on the same GPUs as its machine code, and on no other.
    last = architectures[-1].rstrip("af")
    return [*flags, f"-gencode=arch=compute_{last},code=compute_{last}"]


def command(*words: str) -> str:
    """A command for the shell, as build.ninja writes it."""
    return shlex.join(words).replace("$", "$$")


def path(name: Path) -> str:
    """A path as build.ninja writes it."""
    return re.sub(r"([$ :])", r"$\1", str(name))


def flags_of(environment: Mapping[str, str]) -> list[str]:
    """nvcc's flags for every file."""
    return [*FLAGS, *(STRICT_FLAGS if environment.get("RIFT_KERNELS_STRICT") == "1" else [])]


def jobs_of(environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """ninja's flags, and nvcc's, for so many compilers at once."""
    jobs = environment.get("MAX_JOBS")
    if not jobs:
        return [], ["--threads", "0"]  # one an architecture
    if not re.fullmatch(r"[1-9]\d*", jobs):
        raise SystemExit(f"MAX_JOBS must be a number of compilers, or unset; got {jobs!r}")
    return ["-j", jobs], ["--threads", "1"]


def build_ninja(
    compiler: list[str],
    architectures: Sequence[str],
    sources: list[Path],
    includes: list[str],
    target: Path,
    threads: Sequence[str] = (),
) -> str:
    """The text of a build.ninja that compiles ``sources`` and links ``target``, all absolute."""
    own = f'-DRIFT_ARCHS="{";".join(architectures)}"'
    flags = {
        ".cu": [*KERNEL_FLAGS, *threads, *gencode(architectures)],
        # -isystem: Python's and pybind11's headers may warn.
        ".cpp": [own, *(word for folder in includes for word in ("-isystem", folder))],
    }
    link = [compiler[0], "-shared", "-cudart", "static", *gencode(architectures)]
    text = f"""\
rule compile
  command = {command(*compiler)} $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {command(*link)} $in -o $out
build {path(target)}: link {" ".join(f"{source.name}.o" for source in sources)}
"""
    for source in sources:
        text += f"build {source.name}.o: compile {path(source)}\n"
        text += f"  flags = {command(*flags[source.suffix])}\n"
    return text


class BuildExtension(build_ext):
    """One nvcc call per source file, run by ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Builds ``ext`` where setuptools expects it."""
        try:  # only here: without the extension nobody needs them
            import ninja
            import pybind11
        except ImportError as error:
            raise SystemExit(f"There is no {error.name}: pip install pybind11 ninja") from None

        # An editable build's own folder is a fresh one each time: nothing would be reused.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        sources = [Path(source).absolute() for source in ext.sources]
        includes = [sysconfig.get_path("include"), pybind11.get_include()]
        nvcc, architectures, note = plan(os.environ)
        jobs, threads = jobs_of(os.environ)
        if note:
            print(f"rift_kernels: {note}", flush=True)
        compiler = [str(nvcc), *flags_of(os.environ), "-I", str(Path("csrc").absolute())]
        text = build_ninja(compiler, architectures, sources, includes, target, threads)
        (folder / "build.ninja").write_text(text)
        run = subprocess.run([Path(ninja.BIN_DIR, "ninja"), *jobs, "-C", folder], check=False)
        if run.returncode:
            raise SystemExit(
                f"The CUDA kernels do not compile with {nvcc}, see above. NVCC or CUDA_HOME names "
                "another nvcc, NVCC_PREPEND_FLAGS='-ccbin g++-12' a C++ compiler that it takes, "
                f'RIFT_KERNELS_CUDA_ARCHS ("{ARCHITECTURES}") the architectures; '
                "RIFT_KERNELS_CUDA=0 leaves the CUDA kernels out"
            )


class LeaveOut(build_py):
    """Installs the Python files alone, and says so."""

    def run(self) -> None:
        """Also removes what an earlier editable build left: it would be imported."""
        print(f"rift_kernels: {plan(os.environ).note}")
        for stale in Path("rift_kernels").glob("_C*.so") if self.editable_mode else ():
            stale.unlink()
        super().run()


if __name__ == "__main__":
    if plan(os.environ).nvcc:  # asked now rather than after pip has fetched torch
        jobs_of(os.environ)
        sources = [*map(str, sorted(Path("csrc").rglob("*.cu"))), "csrc/bindings.cpp"]
        setup(
            ext_modules=[Extension("rift_kernels._C", sources)],
            cmdclass={"build_ext": BuildExtension},
        )
    else:
        setup(cmdclass={"build_py": LeaveOut})
