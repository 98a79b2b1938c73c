"""What compute-sanitizer watches, on a stand-in for a GPU."""

from __future__ import annotations

import pytest
import torch

from rift_kernels.dispatch import availability
from tests.gpu import exercise


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.usefixtures("_stand_in")
def test_what_the_sanitizer_watches(few, monkeypatch) -> None:
    """Each backend computes each measure of each shape, and a disagreement makes it fail."""
    seen = []

    def value_and_gradient(measure, x, _, mask, backend):
        seen.append((measure.name, tuple(x.shape), x.dtype, mask is not None, backend))
        return torch.zeros(2)

    monkeypatch.setattr(exercise, "value_and_gradient", value_and_gradient)
    monkeypatch.setattr(availability, "reason_against", lambda _: None)
    assert exercise.main(["--few"] if few else []) == 0
    names, shapes, _, masked, backends = (set(column) for column in zip(*seen, strict=True))
    assert backends == {"eager", "triton", "cuda"}
    measures = exercise.FEW_MEASURES if few else exercise.MEASURES
    assert names == {measure.name for measure in measures}
    assert shapes == set(exercise.FEW_SHAPES if few else exercise.SHAPES)
    assert len(seen) <= 20 if few else masked == {False, True}
    monkeypatch.setattr(
        exercise, "value_and_gradient", lambda *a: torch.ones(2) * (a[-1] == "triton")
    )
    assert exercise.main(["--few"]) == 1
