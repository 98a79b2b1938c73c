"""The methods of finetuning that are compared, and their names and colours."""

from __future__ import annotations

from typing import NamedTuple

from .training import RATE

PRETRAINED, PLAIN, PROBE = "pretrained", "plain", "linear probe"
GREY = "#57606a"


class Measure(NamedTuple):
    """A RIFT loss in tables and pictures."""

    label: str
    colour: str
    weights: tuple[float, ...]

    @property
    def default_weight(self) -> float:
        """The weight in tables that have a single one."""
        return self.weights[1]


WEIGHTS = (0.3, 1.0, 3.0, 10.0)
# Only the Bures distance has a unit, that of squared features, so it needs other weights.
MEASURES = {
    "cka": Measure("debiased CKA", "#0969a8", WEIGHTS),
    "covariance": Measure("covariance", "#c2410c", WEIGHTS),
    "procrustes": Measure("Procrustes", "#15803d", WEIGHTS),
    "bures": Measure("Bures", "#7e22ce", (0.03, 0.1, 0.3, 1.0)),
}


class Plan(NamedTuple):
    """A method of finetuning (a key of ``MEASURES``, ``PLAIN`` or ``PROBE``) and its settings."""

    method: str
    weight: float = 0.0
    rate: float = RATE

    def __str__(self) -> str:
        if self.method in MEASURES:
            return f"+ RIFT ({MEASURES[self.method].label}), weight {self.weight:g}"
        is_slower = self.method == PLAIN and self.rate != RATE
        return self.method + (f", learning rate / {RATE / self.rate:g}" if is_slower else "")
