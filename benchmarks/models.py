"""What is finetuned: transformers' ViT with random weights, its teacher, its batch and AdamW."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.flop_counter import FlopCounterMode

from . import measure, schema

PACKAGES = ("transformers", "peft")
# Query, key, value and output of an attention, as transformers 5 and 4 call them.
_TARGETS = r".*\.(?:[qkvo]_proj|query|key|value|attention\.output\.dense)"


@dataclass(frozen=True)
class Profile:
    """A ViT on square images, its batch, and seconds to measure it in."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int
    batch: int
    budget: float
    autocast: bool = False
    rank: int | None = None  # of adapters, which are trained with the head; None: all is trained

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


class Finetuning:
    """A student near its teacher, a batch, and AdamW, which updates copies of the trained weights.

    So every step starts from the same weights, even after a loss whose gradient is NaN.
    """

    def __init__(self, profile: Profile, device: torch.device) -> None:
        self.profile = profile
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, profile.autocast)
        torch.manual_seed(0)
        self.model, self._pretrained = _student_and_teacher(profile, device)
        coarse = torch.randn(profile.batch, 3, 4, 4, device=device)
        # Patches of an image are alike, and images differ, as photographs do.
        self.images = interpolate(coarse, size=(profile.image,) * 2, mode="bilinear")
        self.labels = torch.randint(profile.classes, (profile.batch,), device=device)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.updated = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self._adamw = torch.optim.AdamW(self.updated, fused=True)

    def student(self) -> Any:
        """Modules of their own, for hooks of their own, on the shared weights."""
        return _sharing(self.model).train()

    def frozen_copy(self) -> Any:
        """The teacher as a model; where there are adapters, with a second copy of the weights."""
        if self._pretrained is None:
            return copy.deepcopy(self.model).unload().requires_grad_(False)
        return _sharing(self._pretrained)

    def task_loss(self, student: nn.Module) -> Tensor:
        return cross_entropy(student(pixel_values=self.images).logits, self.labels)

    def backward(self, loss: Tensor) -> None:
        """The backward, and the optimiser's step; no gradient stays in memory."""
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        for weight, updated in zip(self.weights, self.updated, strict=True):
            weight.grad, updated.grad = None, weight.grad
        self._adamw.step()
        self._adamw.zero_grad()

    def description(self) -> schema.Model:
        fields: dict[str, Any] = dataclasses.asdict(self.profile) | {"tokens": self.profile.tokens}
        del fields["budget"]
        parameters = sum(weight.numel() for weight in self.model.parameters())
        trained = sum(weight.numel() for weight in self.weights)
        return schema.Model(**fields, parameters=parameters, trained=trained)


def _student_and_teacher(profile: Profile, device: torch.device) -> tuple[Any, Any]:
    """Both differ a little: where they agree, the loss has no gradient.

    With adapters there is no separate teacher: it is the student with these disabled.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.step needs {' and '.join(PACKAGES)}: pip install '.[bench]' ({error})"
        ) from error
    config: Any = transformers.ViTConfig(
        image_size=profile.image,
        patch_size=profile.patch,
        hidden_size=profile.width,
        num_hidden_layers=profile.depth,
        num_attention_heads=profile.heads,
        intermediate_size=4 * profile.width,
    )
    config.num_labels = profile.classes
    base: Any = transformers.ViTForImageClassification(config)
    base.to(device)
    if profile.rank is None:
        teacher = copy.deepcopy(base).requires_grad_(False)
        for weight in base.parameters():
            weight.data += 0.1 * weight.std(correction=0) * torch.randn_like(weight)
        return base, teacher
    # Adapters normally begin at zero.
    adapters: Any = peft.LoraConfig(
        r=profile.rank, target_modules=_TARGETS, init_lora_weights=False
    )
    model = peft.get_peft_model(base, adapters)
    base.classifier.requires_grad_()
    return model.to(device), None


def _sharing(model: nn.Module) -> nn.Module:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def operations(step: measure.Timed) -> tuple[int, int]:
    """Counted operations of the products, forward, and with the backward."""
    # torch does not count those of all fused attentions.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = step.forward()
        forward = counter.get_total_flops()
        step.backward(loss)
    return forward, counter.get_total_flops()
