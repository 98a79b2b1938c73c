"""Labelled texts from a file as a dataset, and a tokenizer that needs no vocabulary."""

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
    """A text, its label as it was written, and where."""

    text: str
    label: str
    place: str


class Texts(Examples):
    """(text, class) of lines.

    Raises:
        UserError: a label is none of the classes.
    """

    def __init__(self, lines: Sequence[Line], classes: Sequence[str]) -> None:
        for line in lines:
            if line.label not in classes:
                raise UserError(
                    f"{line.place}: label must be one to train on, "
                    f"{', '.join(map(repr, classes[:12]))}; got {line.label!r}"
                )
        self.pairs = [(line.text, classes.index(line.label)) for line in lines]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.pairs[index]


class Collate:
    """A batch of texts as the model's arguments, padded to the longest, and their classes."""

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self.tokenizer, self.most = tokenizer, most

    def __call__(self, pairs: list[tuple[str, int]]) -> tuple[dict[str, Tensor], Tensor]:
        texts, labels = zip(*pairs, strict=True)
        how = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = self.tokenizer(list(texts), max_length=self.most, **how)
        return dict(inputs), torch.tensor(labels)


class HashTokenizer:
    """Words between blanks, each of which always is the same number below ``words``.

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
        # Python's own hash differs between processes.
        rows = [
            [1, *(2 + zlib.crc32(word.encode()) % (self.words - 2) for word in text.split())]
            for text in texts
        ]
        rows = [row[:max_length] for row in rows]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}


def read(path: Path, text: str, label: str) -> list[Line]:
    """The lines of a CSV, TSV or JSON lines file, by the names of its columns.

    Raises:
        UserError: naming the file, and the line.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix not in (*_DELIMITERS, *_JSON):
        raise UserError(f"{path} must be {', '.join((*_DELIMITERS, *_JSON))}")
    lines = []
    for number, row in _json(path) if path.suffix in _JSON else _table(path):
        place = f"{path}, line {number}"
        for name in (text, label):
            if row.get(name) is None:
                names = ", ".join(map(repr, row)) or "none"
                raise UserError(f"{place}: there is no {name!r}; there are {names}")
        lines.append(Line(str(row[text]), str(row[label]), place))
    if not lines:
        raise UserError(f"{path} has no texts")
    return lines


def labels_of(lines: Sequence[Line]) -> list[str]:
    """The classes, in the order of their numbers where they are numbers."""
    labels = {line.label for line in lines}
    if len(labels) < 2:
        raise UserError(f"there must be two labels to tell apart, or more; got {sorted(labels)}")
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
