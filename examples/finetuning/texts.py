"""A file of labelled texts as a dataset, and a tokenizer that needs no vocabulary."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .processes import UserError
from .trainer import Examples

Tokenizer = Any  # of transformers, or a HashTokenizer
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".json")


class Line(NamedTuple):
    """A text, its label as written, and its place in the file."""

    text: str
    label: str
    place: str


class Texts(Examples):
    """Pairs (text, class) from lines.

    Raises:
        UserError: a label is not among the classes.
    """

    def __init__(self, lines: Sequence[Line], classes: Sequence[str]) -> None:
        for line in lines:
            if line.label not in classes:
                raise UserError(
                    f"{line.place}: label must be one of the training labels, "
                    f"{', '.join(map(repr, classes[:12]))}; got {line.label!r}"
                )
        self.pairs = [(line.text, classes.index(line.label)) for line in lines]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.pairs[index]


class Collate:
    """Turn texts into the model's arguments, padded to the longest, and a tensor of classes."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, pairs: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*pairs, strict=True)
        settings = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = self.tokenizer(list(texts), max_length=self.max_tokens, **settings)
        return dict(inputs), torch.tensor(labels)


class HashTokenizer:
    """Maps each word between blanks to a fixed number below ``words`` by a hash.

    0 is padding and 1 begins a text.
    """

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(
        self,
        texts: Sequence[str],
        max_length: int,
        padding: bool = True,  # noqa: ARG002
        **_: Any,
    ) -> dict[str, Tensor]:
        # CRC32, because Python's own hash differs between processes.
        rows = [
            [1, *(2 + zlib.crc32(word.encode()) % (self.words - 2) for word in text.split())]
            for text in texts
        ]
        rows = [row[:max_length] for row in rows]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}


def read_lines(path: Path, text: str, label: str) -> list[Line]:
    """Read a CSV, TSV or JSON lines file; ``text`` and ``label`` name its columns.

    Raises:
        UserError: naming the file and, where there is one, the line.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix not in (*_DELIMITERS, *_JSON):
        raise UserError(
            f"{path} must end with {', '.join((*_DELIMITERS, *_JSON))}; got {path.suffix!r}"
        )
    lines = []
    for number, row in _json(path) if path.suffix in _JSON else _table(path):
        place = f"{path}, line {number}"
        for name in (text, label):
            if row.get(name) is None:
                names = ", ".join(map(repr, row)) or "none"
                raise UserError(f"{place} must have {name!r}; got {names}")
        lines.append(Line(str(row[text]), str(row[label]), place))
    if not lines:
        raise UserError(f"{path} must have at least one text; got none")
    return lines


def class_names(lines: Sequence[Line]) -> list[str]:
    """The labels in order, which is numeric if all of them are numbers."""
    labels = {line.label for line in lines}
    if len(labels) < 2:
        raise UserError(f"--train must have at least two labels; got {sorted(labels)}")
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=_DELIMITERS[path.suffix])
        for row in reader:
            yield reader.line_num, row


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} must be an object; got {line.strip()[:40]}")
            yield number, row
