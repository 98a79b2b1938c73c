"""``python -m tests.support.known_answers`` writes known_answers.json from the definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from rift_kernels import reference
from rift_kernels.trust import known_answers
from rift_kernels.trust.known_answers import CASES, Case

DIGITS = 12


def _value(case: Case, x: Any, y: Any, mask: Any) -> torch.Tensor:
    """The oracle's values of a case."""
    if case.measure == "cka":
        debiased, distance = case.settings
        value = reference.linear_cka(x, y, mask=mask, debiased=debiased)
    elif case.measure == "procrustes":
        _, distance = case.settings
        value = reference.procrustes_similarity(x, y, mask=mask)
    elif case.measure == "covariance":
        scale, weight = case.settings
        return reference.covariance_distance(x, y, mask=mask, scale=scale, mean_weight=weight)
    else:
        squared, weight, _ = case.settings
        return reference.bures_distance(x, y, mask=mask, squared=squared, mean_weight=weight)
    return 1 - value if distance else value


def answer(case: Case) -> dict[str, Any]:
    """Values and sketches of gradients, rounded to the digits that all machines agree on."""
    inputs = known_answers.features(case)
    sides = [
        [side.requires_grad_(wanted) for side in features]
        for features, wanted in zip((inputs.students, inputs.teachers), case.sides, strict=True)
    ]
    if len(case.layers) > 1:
        value = _value(case, *sides, inputs.masks or None)
    else:
        mask = inputs.masks[0] if inputs.masks else None
        value = _value(case, sides[0][0], sides[1][0], mask)
    leaves = [side for features in sides for side in features if side.requires_grad]
    gradients = torch.autograd.grad(value, leaves, inputs.incoming)
    return {
        "values": _rounded(value.reshape(-1)),
        "gradients": [_rounded(known_answers.sketch(gradient)) for gradient in gradients],
    }


def _rounded(numbers: torch.Tensor) -> Any:
    """Round to DIGITS digits of the largest."""
    if numbers.dim() > 2:
        return [_rounded(matrix) for matrix in numbers]
    digits = DIGITS - math.ceil(math.log10(float(numbers.detach().abs().max())))
    return [
        [round(n, digits) for n in row] if isinstance(row, list) else round(row, digits)
        for row in numbers.tolist()
    ]


def text() -> str:
    """The text of the file, one case per line."""
    lines = [f"{json.dumps(known_answers.key(case))}: {json.dumps(answer(case))}" for case in CASES]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    known_answers.ANSWERS.write_text(text(), encoding="utf-8")
