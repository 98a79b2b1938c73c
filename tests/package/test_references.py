"""What pages, comments and docstrings mention exists: files, and names in modules."""

from __future__ import annotations

import ast
import builtins
import importlib
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True, check=False,
).stdout.split()  # fmt: skip
FILES = [name for name in LISTED if (ROOT / name).exists()]
pytestmark = pytest.mark.skipif(not FILES, reason="needs git and its list of files")

PATH = re.compile(r"(?<![\w/.@-])((?:[\w.-]+/)*[\w.-]+\.(?:py|cuh|cu|cpp|h|md|toml|yml|png|svg))\b")
FOLDER = re.compile(
    r"(?<![\w/.@-])((?:csrc|tests|benchmarks|examples|docs|rift_kernels)(?:/[\w-]+)+/?)(?![\w/.*{<-])"
)
DOTTED = re.compile(r"`+~?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`+")
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`~?([\w.]+)`")
COMMAND = re.compile(r"python3? -m ((?:rift_kernels|benchmarks|examples|tests)(?:\.\w+)*)")
# Other people's files, and files that a user or a build makes.
FOREIGN = {"cuda_runtime.h", "cuda.h"}
# Variables in examples of use, fields of result files, and the build's own module: nothing to find.
VARIABLES = {
    *("self", "model", "module", "rift", "regularizer", "statistics", "accelerator", "loader"),
    *("trainer", "capture", "mask", "args", "batch", "student", "teacher", "layer", "mesh"),
    *("base_model", "primitives", "environment", "peaks"),
}
ALIASES = {"rk": "rift_kernels", "nn": "torch.nn", "tl": "triton.language"}
DATA = (".csv", ".json", ".safetensors", ".pt")
INSTRUCTIONS = {"cp", "mma", "wgmma", "mbarrier", "setmaxnreg", "cvt", "ldmatrix", "stmatrix"}


CODE = (".cuh", ".cu", ".cpp", ".h")
PROSE = (".py", *CODE, ".md", ".toml", "Makefile", ".cff", ".yml", ".yaml", ".ci/run")


@cache
def names(module: str) -> set[str]:
    """What a module of this repository defines or imports, members of its classes included."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


MODULES: dict[str, list[str]] = {}
for name in FILES:
    if name.endswith(".py"):
        path = Path(name)
        parts = path.parts[:-1] if path.stem == "__init__" else (*path.parts[:-1], path.stem)
        for start in range(len(parts)):
            MODULES.setdefault(".".join(parts[start:]), []).append(name)


def texts(name: str) -> Iterator[str]:
    """The prose of a file: a page, or comments and docstrings."""
    if not name.endswith(PROSE):
        return
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.string
    elif name.endswith(CODE):
        yield from re.findall(r"//.*", text)
    else:
        yield text


def file_exists(path: str, near: str) -> bool:
    """From the root, from beside the file that says so, or as the end of some path."""
    path = path.removeprefix("./")
    if path.split("/")[-1] in FOREIGN:
        return True
    beside = (ROOT / near).parent / path
    return (
        (ROOT / path).exists()
        or beside.exists()
        or any(other == path or other.endswith(f"/{path}") for other in FILES)
    )


def name_exists(dotted: str) -> bool:
    """A module of this repository with these names, or something that can be imported."""
    first, *rest = dotted.lstrip(".").split(".")
    if first in VARIABLES | INSTRUCTIONS or dotted == "rift_kernels._C":
        return True
    if not rest and first in all_names():
        return True
    parts = [*ALIASES.get(first, first).split("."), *rest]
    for end in range(len(parts), 0, -1):
        for module in MODULES.get(".".join(parts[:end]), []):
            if end == len(parts) or parts[end] in names(module):
                return True
    return is_importable(parts) or is_member(parts)


def is_importable(parts: list[str]) -> bool:
    """Of an installed package."""
    for end in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def is_member(parts: list[str]) -> bool:
    """Of a class of this repository, or of a builtin one."""
    is_class = parts[0][0].isupper() or hasattr(builtins, parts[0])
    known = all_names()
    return is_class and parts[0] in known | set(dir(builtins)) and parts[-1] in known


@cache
def all_names() -> set[str]:
    return {name for module in FILES if module.endswith(".py") for name in names(module)}


# But for the changelog, which speaks of names that are gone.
READ = [n for n in FILES if n != "CHANGELOG.md" and next(texts(n), None) is not None]


@pytest.mark.parametrize("name", READ)
def test_mentions(name: str) -> None:
    missing = set()
    for text in texts(name):
        # Patterns of layers, such as `transformer.h.*`, are no files.
        without_links = re.sub(r"https?://\S+|`[^`\n]*\.\*`", "", text)
        for pattern in (PATH, FOLDER):
            paths = pattern.findall(without_links)
            missing |= {path for path in paths if not file_exists(path.rstrip("/"), name)}
        for pattern in (DOTTED, ROLE):
            words = pattern.findall(text)
            dotted = [w for w in words if not PATH.fullmatch(w) and not w.endswith(DATA)]
            missing |= {word for word in dotted if not name_exists(word)}
        missing |= {module for module in COMMAND.findall(text) if module not in MODULES}
    assert not missing


@pytest.mark.parametrize(
    "missing", ["ops._is_fused", "plan.nothing", "csrc/sm91.cuh", "torch.nope"]
)
def test_a_false_reference_is_found(missing: str) -> None:
    is_path = "/" in missing
    assert not (file_exists(missing, "README.md") if is_path else name_exists(missing))
