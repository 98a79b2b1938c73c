"""Builds the CUDA C++ extension ``rift_kernels._C`` with nvcc and ninja; needs no torch and no GPU.

pyproject.toml declares everything else. Environment variables:

- ``RIFT_KERNELS_CUDA``: 1 builds the extension or fails, 0 leaves it out. By default it is built on
  Linux if there is a suitable nvcc.
- ``RIFT_KERNELS_CUDA_ARCHS``: the architectures, such as 90a for nvcc's ``sm_90a``, all of which
  nvcc must know. By default, those of "80;90a;100a" that it knows.
- ``RIFT_KERNELS_STRICT``: 1 makes every warning an error.
- ``NVCC``: the compiler; by default that of ``CUDA_HOME``, of ``CUDA_PATH``, or on PATH.
- ``MAX_JOBS``: how many compilers run at once; by default one per processor.
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
# Not by default: a newer compiler has more warnings, which must not make an installation fail.
STRICT_FLAGS = shlex.split("-Xcompiler -Werror -Werror all-warnings")
# Warn of spilled registers.
KERNEL_FLAGS = shlex.split("-Xptxas -warn-spills")
# The oldest release that can launch clusters.
OLDEST = (11, 8)
# The oldest release with Hopper's own instructions, which nvcc does not list.
OLDEST_90A = (12, 0)


class Compiler(NamedTuple):
    """An nvcc, its release and its architectures."""

    path: str
    release: tuple[int, int]
    architectures: list[str]  # their numbers, such as 90

    def __str__(self) -> str:
        """The compiler as messages name it."""
        return "nvcc {}.{} ({})".format(*self.release, self.path)

    def knows(self, name: str) -> bool:
        """Whether it compiles for an architecture such as 90a."""
        since = OLDEST_90A if name == "90a" else OLDEST
        return name.rstrip("af") in self.architectures and self.release >= since


class Plan(NamedTuple):
    """What will be built, and a note for the user if that is not everything."""

    nvcc: str | None
    architectures: list[str]
    note: str


def plan(environment: Mapping[str, str], platform: str = sys.platform) -> Plan:
    """What to build with these settings; SystemExit if they require what cannot be built."""
    choice = environment.get("RIFT_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(
            "RIFT_KERNELS_CUDA must be 1 (build the CUDA kernels), 0 (leave them out) or unset "
            f"(build them if there is a suitable nvcc); got {choice!r}"
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
            f"{cause} asks for the CUDA kernels, but they cannot be built: {reason}. "
            "RIFT_KERNELS_CUDA=0 leaves them out"
        )
    return _left_out(reason)


def _left_out(reason: str) -> Plan:
    return Plan(None, [], f"the CUDA kernels are left out ({reason}), the rest is installed")


HOMES = ("CUDA_HOME", "CUDA_PATH")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc named by NVCC if it is set; else the first in CUDA_HOME, CUDA_PATH and PATH."""
    path = environment.get("PATH", "")
    if named := environment.get("NVCC"):
        return shutil.which(named, path=path)
    folders = [f"{environment[home]}/bin" for home in HOMES if environment.get(home)]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, path]))


def _searched(environment: Mapping[str, str]) -> str:
    if named := environment.get("NVCC"):
        return f"NVCC must be an nvcc that can run, or unset; got {named!r}"
    homes = [f"{home}/bin ({environment[home]}/bin)" for home in HOMES if environment.get(home)]
    places = " and none in ".join([*homes, "PATH"])
    return f"there is no nvcc in {places}; install the CUDA toolkit, or set CUDA_HOME to its folder"


def inspected(nvcc: str) -> tuple[Compiler | None, str]:
    """The compiler, or the reason why it cannot be used."""
    try:
        version, listed = _ask(nvcc, "--version"), _ask(nvcc, "--list-gpu-arch")
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{nvcc} cannot run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        return None, f"{nvcc} --version names no release: {version.strip()!r}"
    architectures = re.findall(r"compute_(\d+)", listed)
    compiler = Compiler(nvcc, (int(release[1]), int(release[2])), architectures)
    if compiler.release < OLDEST:
        return None, f"{compiler} is too old: the oldest that works is {OLDEST[0]}.{OLDEST[1]}"
    return compiler, ""


def _ask(nvcc: str, option: str) -> str:
    result = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    if result.returncode and option == "--version":
        text = (result.stderr or result.stdout).strip() or f"exit status {result.returncode}"
        raise subprocess.SubprocessError(text)
    return result.stdout


def parse_architectures(
    environment: Mapping[str, str], compiler: Compiler
) -> tuple[list[str], str]:
    """What to compile for, such as ["80", "90a", "100a"], and a note if the default was reduced.

    SystemExit if the variable is not such a list, or names what the compiler does not know.
    """
    setting = environment.get("RIFT_KERNELS_CUDA_ARCHS")
    text = setting or ARCHITECTURES
    names = list(dict.fromkeys(name.strip() for name in re.split("[;,]", text)))
    for name in names:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", name):
            raise SystemExit(
                f'RIFT_KERNELS_CUDA_ARCHS must be architectures as in "{ARCHITECTURES}", separated '
                f"by ; or ,; got {name!r} in {text!r}"
            )
    known = [name for name in names if compiler.knows(name)]
    missing = ", ".join(name for name in names if name not in known)
    if not missing:
        return known, ""
    if setting or not known:
        raise SystemExit(
            f"RIFT_KERNELS_CUDA_ARCHS must be architectures that {compiler} knows, which are "
            f"{', '.join(compiler.architectures) or 'none'}; got {missing} in {text!r}"
        )
    return known, (
        f"the CUDA kernels are compiled for {';'.join(known)} and not for {missing}, "
        f"which {compiler} does not know; GPUs newer than {known[-1]} compile them when they load"
    )


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX of the last for all later GPUs."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    # Without the "a": PTX of "100a" would run on the same GPUs as its machine code only.
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
    """The flags of ninja and of nvcc for MAX_JOBS compilers at once."""
    jobs = environment.get("MAX_JOBS")
    if not jobs:
        return [], ["--threads", "0"]  # one thread per architecture
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
    """The text of a build.ninja that compiles ``sources`` and links ``target``, absolute paths."""
    define = f'-DRIFT_ARCHS="{";".join(architectures)}"'
    flags = {
        ".cu": [*KERNEL_FLAGS, *threads, *gencode(architectures)],
        # -isystem: the headers of Python and pybind11 may cause warnings.
        ".cpp": [define, *(word for folder in includes for word in ("-isystem", folder))],
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
        try:  # imported here, because only the extension needs them
            import ninja
            import pybind11
        except ImportError as error:
            raise SystemExit(f"there is no {error.name}: pip install pybind11 ninja") from None

        # An editable build gets a new folder each time, where nothing could be reused.
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
                f"The CUDA kernels do not compile with {nvcc}, see above. NVCC or CUDA_HOME sets "
                "another nvcc, NVCC_PREPEND_FLAGS='-ccbin g++-12' another C++ compiler, and "
                f'RIFT_KERNELS_CUDA_ARCHS ("{ARCHITECTURES}") the architectures. '
                "RIFT_KERNELS_CUDA=0 leaves the CUDA kernels out"
            )


class LeaveOut(build_py):
    """Installs only the Python files, and says so."""

    def run(self) -> None:
        """Also removes the extension of an earlier editable build, which would be imported."""
        print(f"rift_kernels: {plan(os.environ).note}")
        for stale in Path("rift_kernels").glob("_C*.so") if self.editable_mode else ():
            stale.unlink()
        super().run()


if __name__ == "__main__":
    if plan(os.environ).nvcc:  # fails now, and not after pip has downloaded torch
        jobs_of(os.environ)
        sources = [*map(str, sorted(Path("csrc").rglob("*.cu"))), "csrc/bindings.cpp"]
        setup(
            ext_modules=[Extension("rift_kernels._C", sources)],
            cmdclass={"build_ext": BuildExtension},
        )
    else:
        setup(cmdclass={"build_py": LeaveOut})
