"""What the finetuning examples ask of a pretrained model: its last block, its head, adapters."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# What libraries call their stacks of blocks, and an attention's projections to queries and values.
_STACKS = ("blocks", "layer", "layers", "stages", "h", "block")
_TARGETS = (
    *("query", "value", "query_proj", "value_proj", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v"),
    *("qkv", "Wqkv", "in_proj", "c_attn"),
)


def needed(module: str, purpose: str) -> Any:
    """An optional library.

    Raises:
        ImportError: it is not there, or something that it needs.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # timm's torchvision may be of another torch
        name = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {name}, which cannot be imported ({error}): pip install {name}"
        ) from error


def last_block(model: nn.Module) -> str:
    """The name of the last block of a transformer, or the last stage of a network.

    Raises:
        ValueError: there is none that is called as usual.
    """
    for name, module in model.named_modules():  # the outermost come first
        stack = isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
        if stack and name.rpartition(".")[2] in _STACKS:
            return f"{name}.{len(module) - 1}"
    raise ValueError(
        f"{type(model).__name__} has no stack of blocks called "
        f"{', '.join(map(repr, _STACKS))}: name the layers to compare with --layers"
    )


def with_lora(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The model with adapters, which are all that is trained, beside its head."""
    peft = needed("peft", "--lora")
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = options.lora_target or _TARGETS
    chosen = [name for name in linear if name.rpartition(".")[2] in targets or name in targets]
    if not chosen:
        raise ValueError(
            f"no linear layer is called {', '.join(map(repr, targets))}: choose with --lora-target "
            f"of {', '.join(map(repr, linear[:12]))}{' and others' if linear[12:] else ''}"
        )
    config = peft.LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout,
        target_modules=chosen,
        modules_to_save=heads(model),
    )
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def heads(model: nn.Module) -> list[str]:
    """The names of what lies beside the pretrained body: new for a new task, so trained."""
    body = getattr(model, "base_model_prefix", "")
    if body:
        return [
            name
            for name, module in model.named_children()
            if name != body and any(True for _ in module.parameters())
        ]
    classifier = model.get_classifier()  # type: ignore[operator]  # timm's
    return [name for name, module in model.named_modules() if module is classifier]


def logits_of(output: Any) -> Tensor:
    """Of a transformers output, or of a model that returns nothing else."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def save_model(model: nn.Module, classes: Sequence[str], folder: Path) -> None:
    """As the model's own library does, and the classes in the order of the logits."""
    folder.mkdir(parents=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        library = needed("safetensors.torch", "saving a model")
        library.save_model(model, str(folder / "model.safetensors"))
    (folder / "classes.json").write_text(json.dumps(list(classes), indent=1) + "\n", "utf-8")
