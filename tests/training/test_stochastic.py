"""Students that skip layers or draw random numbers, and what a regulariser warns of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support import tiny_models
from tests.support.tiny_models import perturbed


class Skipping(nn.Module):
    """Leaves the layers named in ``skipped`` out while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.unused = nn.Identity()
        self.skipped: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if not (self.training and i in self.skipped):
                x = layer(x)
        return x


def inputs() -> Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


# --- layers left out


@pytest.mark.parametrize("skipped", [{0}, {2}, {0, 2}])
def test_a_skipped_layer_leaves_the_loss_of_its_step(skipped) -> None:
    student = Skipping()
    teacher = perturbed(student)
    rift = rk.RIFTRegularizer(student, teacher, layers="layers.*")
    student(inputs())
    rift()
    assert len(rift.metrics()) == 4
    student.skipped = skipped
    student(inputs())
    loss = rift()
    kept = [f"layers.{i}" for i in range(3) if i not in skipped]
    assert list(rift.distances) == kept
    assert set(rift.metrics()) == {"rift/weight", *(f"rift/similarity/{name}" for name in kept)}
    with rk.RIFTRegularizer(student, teacher, layers=kept) as expected:
        student(inputs())
        assert torch.equal(loss, expected())


def test_a_skipped_layer_is_not_pooled() -> None:
    """It has no mask, without which a function as pooling may not work."""
    student = Skipping()
    rift = rk.RIFTRegularizer(
        student,
        copy.deepcopy(student),
        layers="layers.*",
        pooling=lambda x, mask: (x * mask.unsqueeze(-1)).sum(1),
        token_mask=lambda _: torch.ones(12, 2, dtype=torch.bool),
    )
    student.skipped = {2}
    student(torch.stack([inputs(), -inputs()], 1))
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    assert len(rift.distances) == 2


def test_a_step_that_skips_all_layers_has_no_loss() -> None:
    student = Skipping()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="layers.1")
    student.skipped = {1}
    task = student(inputs()).square().sum()
    loss = rift()
    assert float(loss) == 0
    assert set(rift.metrics()) == {"rift/weight"}
    (task + loss).backward()
    student.skipped = set()
    student(inputs())
    assert rift().requires_grad


def test_a_layer_off_the_path_is_no_skipped_layer() -> None:
    student = Skipping()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers=["layers.1", "unused"])
    student(inputs())
    with pytest.raises(RuntimeError, match="nothing was captured of 'unused'"):
        rift()
    statistics = rk.collect_teacher_statistics(
        student, [inputs()], layers="layers.*", progress=False
    )
    statistics["unused"] = statistics["layers.1"]
    layers = ["layers.0", "layers.1"]
    rift = rk.RIFTRegularizer(student, statistics, layers=layers, measure="covariance")
    student(inputs())
    rift()
    student.skipped = {1}
    student(inputs())
    rift()
    assert list(rift.distances) == ["layers.0"]
    rift = rk.RIFTRegularizer(student, statistics, layers="unused", measure="covariance")
    student(inputs())
    with pytest.raises(RuntimeError, match="nothing was captured of 'unused'"):
        rift()


@pytest.mark.usefixtures("one_process")
def test_processes_of_a_group_skip_no_layer() -> None:
    student = Skipping()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="layers.*", group="world")
    student.skipped = {1}
    student(inputs())
    with pytest.raises(RuntimeError, match=r"skipped 'layers\.1'.*switch LayerDrop off"):
        rift()


def test_layerdrop_of_wav2vec2() -> None:
    student = tiny_models.wav2vec2(layerdrop=0.5, depth=4).train()
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers="*encoder.layers.*", pooling="mean")
    counts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        student(**tiny_models.audio())
        assert rift().isfinite()
        counts.add(len(rift.distances))
    assert len(counts) > 2
    assert min(counts) < 4


# --- random numbers


def test_masked_autoencoders_replay_the_students_mask() -> None:
    student = tiny_models.vit_mae()
    losses = []
    for replay in (False, True):
        rift = rk.RIFTRegularizer(
            student, copy.deepcopy(student), layers="*layers.1", pooling="mean", replay_rng=replay
        )
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for seed in range(2):
                torch.manual_seed(seed)
                student(tiny_models.images())
                after = torch.get_rng_state()
                losses.append(abs(float(rift().detach())))
                assert torch.equal(torch.get_rng_state(), after) == replay
        drew = [w for w in seen if "draws random numbers in eval mode" in str(w.message)]
        assert len(drew) == (0 if replay else 1)
        rift.remove()
    assert min(losses[:2]) > 0.1
    assert max(losses[2:]) < 1e-6


def test_random_numbers_without_an_effect_do_not_warn() -> None:
    """As of LayerDrop in transformers 4, which draws some in eval mode, too."""

    class Drawing(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand([])
            return super().forward(x)

    student = Drawing()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="layers.1")
    student(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift()


def test_a_random_state_that_is_not_known() -> None:
    student = Skipping()
    settings = {"layers": "layers.1", "replay_rng": True}
    rift = rk.RIFTRegularizer(student, perturbed(student), **settings)
    torch.compiler.reset()
    torch.compile(student, backend="eager")(inputs())
    with pytest.raises(RuntimeError, match="replay_rng must be False where the student"):
        rift()
    with pytest.raises(TypeError, match="replay_rng must be True or False; got 'yes'"):
        rk.RIFTRegularizer(student, perturbed(student), layers="layers.1", replay_rng="yes")


# --- warnings


def test_layers_without_a_gradient_are_named_once() -> None:
    student = Skipping()
    student.layers[0].requires_grad_(False)
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="layers.*")
    student(inputs())
    with pytest.warns(UserWarning, match=r"the layers 'layers\.0' have no gradient: no ") as seen:
        rift()
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(inputs())
        rift()
    student.layers[1].requires_grad_(False)
    student(inputs())
    with pytest.warns(UserWarning, match=r"the layers 'layers\.0', 'layers\.1' have no gradient"):
        rift()


def test_features_that_are_the_same_in_every_row_are_named_once() -> None:
    """The first token of a causal model has seen nothing but itself."""
    student = tiny_models.gpt2()
    teacher, batch = perturbed(student), tiny_models.text()
    batch["input_ids"][:, 0] = 3
    rift = rk.RIFTRegularizer(student, teacher, layers="*h.*")
    message = "of 'transformer.h.0', 'transformer.h.1' are the same in every row of the "
    student(**batch)
    with pytest.warns(UserWarning, match=message):
        rift()
    student(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift()
    rift = rk.RIFTRegularizer(student, teacher, layers="*h.1", pooling="last")
    student(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = rift()
    loss.backward()
    assert student.transformer.h[1].mlp.c_fc.weight.grad.abs().sum() > 0


def test_later_steps_are_not_searched() -> None:
    """Looking for constants reads all features, and waits for a GPU."""
    student = Skipping()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers="layers.1")
    student(inputs())
    rift()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(inputs()[:1].expand(12, 6))
        rift()


def test_running_statistics_that_the_teacher_shares() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    student = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["0"]))
    rift = rk.RIFTRegularizer(student, layers="2")
    student(inputs())
    with pytest.warns(UserWarning, match=r"'1' keeps running statistics.*teacher=copy"):
        rift()
    student(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift()
    student.eval()
    rift = rk.RIFTRegularizer(student, layers="2")
    student(inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift()


def test_trained_parameters_that_the_teacher_shares() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    student = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6))
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["0"]))
    rift = rk.RIFTRegularizer(student, layers="2")
    student.base_model.model[3].requires_grad_(True)  # a head, after the compared layer
    student(inputs())
    rift()
    student.base_model.model[1].requires_grad_(True)
    rift = rk.RIFTRegularizer(student, layers="2")
    student(inputs())
    with pytest.raises(
        ValueError, match=r"got '.*1\.(weight|bias)': freeze them, or give teacher=copy"
    ):
        rift()
