"""Make antiberty.safetensors anew, with transformers and the weights in a wheel on PyPI.

    pip download --no-deps antiberty==0.1.3
    python -m benchmarks.data.make_antiberty antiberty-0.1.3-*.whl antiberty.safetensors

AntiBERTy is a BERT of 8 layers, pretrained on 558 million antibody sequences; none of the wheel's
code is run. The inputs are variable domains of therapeutic antibodies, as in their PDB entries. The
teacher is the model as it was pretrained, the student the same after some steps of masked language
modelling on half of the sequences.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import REAL_FEATURES, REAL_LAYERS, REAL_ROWS

SHA256 = "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a"
STEPS, RATE, SEED = 30, 1e-4, 0
# Name and PDB entry, heavy and light chain.
ANTIBODIES = [
    line.split("\t")
    for line in REAL_FEATURES.with_name("antibodies.tsv").read_text(encoding="utf-8").splitlines()
]


def hidden_states(model: Any, tokens: list[Tensor]) -> dict[int, Tensor]:
    """The states of REAL_ROWS tokens, spread evenly over all chains."""
    model.eval()
    with torch.no_grad():
        states = [model.bert(t[None], output_hidden_states=True).hidden_states for t in tokens]
    rows = torch.linspace(0, sum(map(len, tokens)) - 1, REAL_ROWS).long()
    return {n: torch.cat([chain[n][0] for chain in states])[rows] for n in REAL_LAYERS}


def finetune(model: Any, tokens: list[Tensor], mask: int) -> None:
    """Masked language modelling, one sequence a step."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for step in range(STEPS):
        sequence = tokens[step % len(tokens)]
        hidden = torch.rand(sequence.shape, generator=generator) < 0.15
        labels = sequence.masked_fill(~hidden, -100)
        loss = model(sequence.masked_fill(hidden, mask)[None], labels=labels[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make(wheel: Path, path: Path) -> None:
    import transformers  # type: ignore[import-not-found,unused-ignore]
    from safetensors.torch import save_file

    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{wheel} must have the SHA-256 {SHA256}")
    folder = "antiberty/trained_models"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.read(f"{folder}/vocab.txt").decode().split()
        config = json.loads(archive.read(f"{folder}/AntiBERTy_md_smooth/config.json"))
        weights = io.BytesIO(archive.read(f"{folder}/AntiBERTy_md_smooth/pytorch_model.bin"))
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    # The wheel has weights for more than this model, but none may be missing.
    state = torch.load(weights, map_location="cpu")
    assert not model.load_state_dict(state, strict=False).missing_keys
    chains = [("[CLS]", *chain, "[SEP]") for _, *pair in ANTIBODIES for chain in pair]
    tokens = [torch.tensor([names.index(name) for name in chain]) for chain in chains]
    teacher = hidden_states(model, tokens)
    seen = tokens[: len(tokens) // 2]
    finetune(model, seen, names.index("[MASK]"))
    pairs = (("teacher", teacher), ("student", hidden_states(model, tokens)))
    tensors = {
        f"{side}.{n}": h[n].bfloat16().contiguous() for side, h in pairs for n in REAL_LAYERS
    }
    about = {
        "source": f"antiberty==0.1.3 from PyPI, SHA-256 {SHA256}",
        "licence": "MIT, Copyright (c) 2023 Jeffrey Ruffolo",
        "inputs": f"heavy and light chains of {', '.join(name for name, *_ in ANTIBODIES)}",
        "layers": f"hidden states after layers {' and '.join(map(str, REAL_LAYERS))} of 8",
        "student": f"the teacher after {STEPS} steps of masked language modelling on the first "
        f"{len(seen)} of {len(tokens)} chains: one a step, AdamW, rate {RATE}, seed {SEED}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    save_file(tensors, path, about)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
