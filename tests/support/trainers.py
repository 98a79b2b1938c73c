"""Trainers of other libraries with RIFT and without: their steps differ by its gradient alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

import rift_kernels as rk

RATE, ROWS, VOCABULARY = 0.1, 8, 32


def tokenizer() -> Any:
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 2))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"
    )


def texts(rows: int = 2 * ROWS, seed: int = 0) -> list[str]:
    """Sentences of different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4 + i % 5 for i in range(rows)]
    return [
        " ".join(f"w{int(word)}" for word in torch.randint(30, (length,), generator=generator))
        for length in lengths
    ]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of one plain step on a CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "learning_rate": RATE,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **more,
    }


def in_order(*bases: type) -> type:
    """A trainer that takes its data in order."""

    class InOrder(*bases):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def assert_adds_gradient(
    trainer: Any,
    plain: Any,
    start: nn.Module,
    regulariser: Callable[[nn.Module], rk.RIFTRegularizer],
    passes: int = 1,
) -> None:
    """A step of SGD differs from the plain trainer's by the gradient of RIFT alone.

    The model at the start, given a regulariser, has that gradient at the latest of the passes. They
    are counted, because none may be run for outputs that nobody asked for.
    """
    calls: list[tuple[list[Any], dict[str, Any]]] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            copies = [dict(each) if isinstance(each, dict) else each for each in inputs]
            calls.append((copies, dict(keywords)))

    handle = trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    handle.remove()
    plain.train()
    assert len(calls) == passes
    inputs, keywords = calls[-1]
    keywords.pop("fused_lm_head", None)  # TRL's trainers add it to their model's arguments
    rift = regulariser(start.train())
    start(*inputs, **keywords)
    rift().backward()
    steps = {
        name: -RATE * parameter.grad
        for name, parameter in start.named_parameters()
        if parameter.grad is not None
    }
    with_rift, without = (
        dict(trainer.model.named_parameters()),
        dict(plain.model.named_parameters()),
    )
    for name, step in steps.items():
        difference: Tensor = with_rift[name].detach() - without[name].detach()
        torch.testing.assert_close(difference, step, rtol=1e-3, atol=1e-5, msg=name)
    assert max(float(step.abs().max()) for step in steps.values()) > 1e-4
    logged = trainer.state.log_history[0]
    assert all(f"rift/similarity/{name}" in logged for name in trainer.rift.layers)
