"""Features as pretrained models have them: a transformer's hidden states, and massive activations.

``python -m benchmarks.real`` makes ``data/antiberty.safetensors`` where there is none, for which it
needs transformers and the network, and says what the features are like. The model is AntiBERTy
(Ruffolo et al. 2021; MIT licence): a BERT of 8 layers, 512 wide, pretrained on 558 million antibody
sequences, its weights from the PyPI wheel antiberty 0.1.3. The inputs are variable domains of
therapeutic antibodies, as in their PDB entries. The teacher is the model as it was pretrained, the
student the same after some steps of masked language modelling on half of the sequences. A row is a
token; every layer has the same tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rift_kernels import reference

DATA = Path(__file__).parent / "data" / "antiberty.safetensors"
ROWS, WIDTH, LAYERS = 480, 512, 2
# Layers of the middle and of the end.
_LAYERS = (4, 8)
_WHEEL = "antiberty==0.1.3"
_SHA256 = "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
_STEPS, _RATE, _SEED = 30, 1e-4, 0
# Name and PDB entry -> heavy and light chain.
_LINES = DATA.with_name("antibodies.tsv").read_text(encoding="utf-8").splitlines()
_SEQUENCES = {name: chains for name, *chains in (line.split("\t") for line in _LINES)}


class UnavailableError(Exception):
    """There are no such features here; the message tells the user why."""


def layers(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(student, teacher) of each layer, (ROWS, WIDTH) bfloat16.

    Raises:
        UnavailableError: safetensors is not installed, or the file is not there.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UnavailableError(f"real features need safetensors: {error}") from error
    if not DATA.exists():
        raise UnavailableError(f"real features need {DATA}: run python -m benchmarks.real")
    tensors = load_file(DATA, device=str(device))
    return [(tensors[f"student.{n}"], tensors[f"teacher.{n}"]) for n in _LAYERS]


def massive(student: Tensor, teacher: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """1000 medians added to four columns of one row in a hundred, the same in both.

    Language models have them in few channels of few tokens, hardly dependent on the input, like a
    bias (Sun et al. 2024, "Massive Activations in Large Language Models").
    """
    rows, width = teacher.shape
    columns = torch.randperm(width, generator=generator, device=teacher.device)[:4]
    chosen = torch.randperm(rows, generator=generator, device=teacher.device)[: -(-rows // 100)]
    bias = torch.zeros_like(teacher)
    bias[chosen.unsqueeze(1), columns] = 1000 * teacher.abs().median()
    return student + bias, teacher + bias


def describe(pairs: list[tuple[Tensor, Tensor]]) -> list[str]:
    """A line a layer: how hard its features are for low precision."""
    lines = []
    for n, (student, teacher) in zip(_LAYERS, pairs, strict=True):
        x, y = student.double(), teacher.double()
        largest = float(y.abs().max() / y.abs().median())
        offset = float(y.mean(0).norm() / y.std(0).norm())
        distance = 1 - float(reference.linear_cka(x, y, debiased=False))
        lines.append(
            f"layer {n}: largest activation over median {largest:.1f}, "
            f"offset over deviation {offset:.2f}, 1 - CKA {distance:.1e}"
        )
    return lines


def _wheel(folder: Path) -> Path:
    # pip runs no code of a wheel, but of anything else.
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, _WHEEL]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise UnavailableError(f"pip could not download {_WHEEL}: exit status {status}")
    (path,) = folder.glob("*.whl")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise UnavailableError(f"{path.name} must have the SHA-256 {_SHA256}; got {digest}")
    return path


def _pretrained(wheel: Path, transformers: Any) -> tuple[Any, dict[str, int]]:
    """The model and its vocabulary; nothing of the wheel's code is run."""
    folder = "antiberty/trained_models"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.read(f"{folder}/vocab.txt").decode().split()
        config = json.loads(archive.read(f"{folder}/AntiBERTy_md_smooth/config.json"))
        weights = archive.read(f"{folder}/AntiBERTy_md_smooth/pytorch_model.bin")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    missing = model.load_state_dict(state, strict=False).missing_keys
    # A weight that is left as it was drawn would go unnoticed.
    if missing:
        raise UnavailableError(f"{wheel.name} must have all weights; none of {missing}")
    return model, {name: i for i, name in enumerate(names)}


def _hidden_states(model: Any, tokens: list[Tensor]) -> dict[int, Tensor]:
    """The states of ROWS tokens, spread evenly over all chains."""
    model.eval()
    with torch.no_grad():
        states = [model.bert(t[None], output_hidden_states=True).hidden_states for t in tokens]
    rows = torch.linspace(0, sum(map(len, tokens)) - 1, ROWS).long()
    return {n: torch.cat([chain[n][0] for chain in states])[rows] for n in _LAYERS}


def _finetune(model: Any, tokens: list[Tensor], mask: int) -> None:
    """Masked language modelling, one sequence a step."""
    generator = torch.Generator().manual_seed(_SEED)
    torch.manual_seed(_SEED)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for step in range(_STEPS):
        sequence = tokens[step % len(tokens)]
        hidden = torch.rand(sequence.shape, generator=generator) < 0.15
        labels = sequence.masked_fill(~hidden, -100)
        loss = model(sequence.masked_fill(hidden, mask)[None], labels=labels[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _make() -> None:
    try:
        import transformers  # type: ignore[import-not-found,unused-ignore]
        from safetensors.torch import save_file
    except ImportError as error:
        raise UnavailableError(f"making real features needs another package: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        model, vocabulary = _pretrained(_wheel(Path(folder)), transformers)
    chains = [chain for pair in _SEQUENCES.values() for chain in pair]
    names = [("[CLS]", *chain, "[SEP]") for chain in chains]
    tokens = [torch.tensor([vocabulary[name] for name in sequence]) for sequence in names]
    teacher = _hidden_states(model, tokens)
    seen = tokens[: len(tokens) // 2]
    _finetune(model, seen, vocabulary["[MASK]"])
    student = _hidden_states(model, tokens)
    pairs = (("teacher", teacher), ("student", student))
    tensors = {f"{side}.{n}": h[n].bfloat16().contiguous() for side, h in pairs for n in _LAYERS}
    about = {
        "source": f"{_WHEEL} from PyPI, SHA-256 {_SHA256}",
        "licence": "MIT, Copyright (c) 2023 Jeffrey Ruffolo",
        "inputs": f"heavy and light chains of {', '.join(_SEQUENCES)}",
        "layers": f"hidden states after layers {' and '.join(map(str, _LAYERS))} of 8",
        "student": f"the teacher after {_STEPS} steps of masked language modelling on the first "
        f"{len(seen)} of {len(tokens)} chains: one a step, AdamW, rate {_RATE}, seed {_SEED}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    save_file(tensors, DATA, about)


def main() -> int:
    try:
        if DATA.exists():
            print(f"{DATA} is there already: remove it to make it anew")
        else:
            _make()
            print(f"wrote {DATA}")
        print(*describe(layers(torch.device("cpu"))), sep="\n")
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
