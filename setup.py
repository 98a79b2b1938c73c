"""Builds the CUDA C++ extension ``rift_kernels._C`` with nvcc and ninja; asks for no torch, no GPU.

Everything else is declared in pyproject.toml. Environment variables:

- ``RIFT_KERNELS_CUDA``: 1 builds the extension or fails, 0 leaves it out; unset, it is built where
  there is an nvcc.
- ``RIFT_KERNELS_CUDA_ARCHS``: the architectures, as nvcc's ``sm_90a`` has them; "80;90a;100a".
- ``RIFT_KERNELS_STRICT``: 1 makes every warning an error.
- ``NVCC``: the compiler, if not the nvcc on PATH.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ARCHITECTURES = "80;90a;100a"
FLAGS = shlex.split("-std=c++17 -O3 -Xcompiler -fPIC,-Wall,-Wextra,-fvisibility=hidden")
# A newer compiler warns of more, which is no reason for an installation to fail.
STRICT_FLAGS = shlex.split("-Xcompiler -Werror -Werror all-warnings")
# A spilled register is a warning; a thread an architecture.
KERNEL_FLAGS = shlex.split("-Xptxas -warn-spills --threads 0")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The nvcc to build with, None to leave the extension out; SystemExit where neither goes."""
    choice = environment.get("RIFT_KERNELS_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(
            "RIFT_KERNELS_CUDA must be 1 (build the CUDA kernels), 0 (leave them out) or unset "
            f"(build them where there is an nvcc); got {choice!r}"
        )
    if choice == "0":
        return None
    named = environment.get("NVCC")
    nvcc = shutil.which(named or "nvcc", path=environment.get("PATH", ""))
    if named and nvcc is None:
        raise SystemExit(f"NVCC must be an nvcc that can be run, or unset; got {named!r}")
    if choice == "1" and nvcc is None:
        raise SystemExit(
            "RIFT_KERNELS_CUDA=1 needs nvcc, and PATH has none: install the CUDA toolkit and put "
            "nvcc on PATH, or set RIFT_KERNELS_CUDA=0 to leave the CUDA kernels out"
        )
    return nvcc


def parse_architectures(environment: Mapping[str, str]) -> list[str]:
    """What to compile for, ["80", "90a", "100a"]; SystemExit where the text is no such list."""
    text = environment.get("RIFT_KERNELS_CUDA_ARCHS") or ARCHITECTURES
    names = [name.strip() for name in re.split("[;,]", text)]
    for name in names:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", name):
            raise SystemExit(
                f'RIFT_KERNELS_CUDA_ARCHS must be architectures as in "{ARCHITECTURES}", with ; '
                f"or , between them; got {name!r} in {text!r}"
            )
    return list(dict.fromkeys(names))


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


def build_ninja(
    compiler: list[str],
    architectures: Sequence[str],
    sources: list[Path],
    includes: list[str],
    target: Path,
) -> str:
    """The text of a build.ninja that compiles ``sources`` and links ``target``, all absolute."""
    own = f'-DRIFT_ARCHS="{";".join(architectures)}"'
    flags = {
        ".cu": [*KERNEL_FLAGS, *gencode(architectures)],
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
        nvcc, architectures = find_nvcc(os.environ), parse_architectures(os.environ)
        compiler = [nvcc, *flags_of(os.environ)]
        text = build_ninja(compiler, architectures, sources, includes, target)
        (folder / "build.ninja").write_text(text)
        run = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder], check=False)
        if run.returncode:
            raise SystemExit(
                "The CUDA kernels do not compile, see above. RIFT_KERNELS_CUDA_ARCHS "
                f'("{ARCHITECTURES}") names the architectures, NVCC another nvcc; '
                "RIFT_KERNELS_CUDA=0 leaves the CUDA kernels out"
            )


class LeaveOut(build_py):
    """Installs the Python files alone, and says so."""

    def run(self) -> None:
        """Also removes what an earlier editable build left: it would be imported."""
        off = os.environ.get("RIFT_KERNELS_CUDA") == "0"
        reason = "RIFT_KERNELS_CUDA=0" if off else "there is no nvcc on PATH"
        print(f"rift_kernels: the CUDA kernels are left out ({reason}), the rest is installed")
        for stale in Path("rift_kernels").glob("_C*.so") if self.editable_mode else ():
            stale.unlink()
        super().run()


if __name__ == "__main__":
    if find_nvcc(os.environ):
        parse_architectures(os.environ)  # now rather than after pip has fetched torch
        sources = [*map(str, sorted(Path("csrc").glob("*.cu"))), "csrc/bindings.cpp"]
        setup(
            ext_modules=[Extension("rift_kernels._C", sources)],
            cmdclass={"build_ext": BuildExtension},
        )
    else:
        setup(cmdclass={"build_py": LeaveOut})
