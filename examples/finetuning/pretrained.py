"""Parts of a pretrained model: its last block, its head, its logits, and adapters."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Names in model libraries for stacks of blocks, and for query and value projections.
_STACKS = ("blocks", "layer", "layers", "stages", "h", "block")
_TARGETS = (
    *("query", "value", "query_proj", "value_proj", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v"),
    *("qkv", "Wqkv", "in_proj", "c_attn"),
)


def import_optional(module: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: the library or one of its dependencies is missing.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # timm's torchvision may need another torch
        name = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {name}, which cannot be imported ({error}): pip install {name}"
        ) from error


def last_block(model: nn.Module) -> str:
    """The name of the last block of a transformer, or the last stage of a network.

    Raises:
        ValueError: no stack of blocks has a usual name.
    """
    for name, module in model.named_modules():  # outermost modules first
        stack = isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
        if stack and name.rpartition(".")[2] in _STACKS:
            return f"{name}.{len(module) - 1}"
    raise ValueError(
        f"{type(model).__name__} has no stack of blocks called "
        f"{', '.join(map(repr, _STACKS))}: choose the layers to compare with --layers"
    )


def add_lora(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Add adapters to the model; only they and the head are trained."""
    peft = import_optional("peft", "--lora")
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = options.lora_target or _TARGETS
    adapted = [name for name in linear if name.rpartition(".")[2] in targets or name in targets]
    if not adapted:
        raise ValueError(
            f"no linear layer is called {', '.join(map(repr, targets))}: choose with --lora-target "
            f"from {', '.join(map(repr, linear[:12]))}{' and others' if linear[12:] else ''}"
        )
    config = peft.LoraConfig(
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout,
        target_modules=adapted,
        modules_to_save=head_names(model),
    )
    student: nn.Module = peft.get_peft_model(model, config)
    return student


def head_names(model: nn.Module) -> list[str]:
    """The names of modules outside the pretrained body, which are new and must be trained."""
    body = getattr(model, "base_model_prefix", "")
    if body:
        return [
            name
            for name, module in model.named_children()
            if name != body and any(True for _ in module.parameters())
        ]
    classifier = model.get_classifier()  # type: ignore[operator]  # timm's
    return [name for name, module in model.named_modules() if module is classifier]


def get_logits(output: Any) -> Tensor:
    """The logits of a transformers output, or the output itself."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def save_model(model: nn.Module, classes: Sequence[str], folder: Path) -> None:
    """Save the model as its library does, and the classes in the order of the logits."""
    folder.mkdir(parents=True)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        safetensors = import_optional("safetensors.torch", "saving a model")
        safetensors.save_model(model, str(folder / "model.safetensors"))
    (folder / "classes.json").write_text(json.dumps(list(classes), indent=1) + "\n", "utf-8")
