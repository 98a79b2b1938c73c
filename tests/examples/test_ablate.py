"""The ablations and the sequence of tasks: quick runs, what is kept of them, and their page."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module, reason=f"needs {module}, as the examples do")

from threadpoolctl import threadpool_limits  # noqa: E402

from examples import (  # noqa: E402
    ablate,
    ablation,
    command,
    continual,
    digits,
    runs,
    sequence,
    training,
)

pytestmark = pytest.mark.eager_only
EXAMPLES = Path(ablate.__file__).parent
COMMANDS = [ablate.COMMAND, continual.COMMAND]
WAYS = {"ablations": [*ablate.plans()], "continual": continual.WAYS}
by_name = pytest.mark.parametrize("which", COMMANDS, ids=lambda which: which.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the commands themselves have it: so small a model is slower with more."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_images() -> Iterator[None]:
    """What is tested here takes no more, and is quicker."""

    def first(images: digits.Images) -> digits.Images:
        return images[0][:60], images[1][:60]

    def data(*arguments):
        return digits.Data(*map(first, digits.draw_data(*arguments)))

    def tasks(*arguments):
        return [digits.Task(*map(first, task)) for task in digits.draw_tasks(*arguments)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "draw_data", data)
        patch.setattr(sequence, "draw_tasks", tasks)
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that quick runs of both commands have written into."""
    folder = tmp_path_factory.mktemp("quick")
    for which in COMMANDS:
        assert which.main(["--quick", "--out", str(folder)]) == 0
    return folder


def results(folder: Path, which: command.Command) -> list[dict]:
    return json.loads((folder / f"{which.name}.json").read_text())["runs"]


def stored(folder: Path, which: command.Command) -> list[dict]:
    lines = (folder / f"{which.name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def timeless(run: dict) -> dict:
    return {key: value for key, value in run.items() if key not in ("seconds", "step_ms")}


@by_name
def test_quick_run(which, quick, tmp_path, capsys) -> None:
    assert [run["way"] for run in results(quick, which)] == [p.way for p in WAYS[which.name]]
    assert len(stored(quick, which)) == len(WAYS[which.name])
    found = json.loads((quick / f"{which.name}.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert {"hardware", "commit", "code", "seconds", "settings"} <= set(found)
    picture = (quick / f"{which.name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert command.digest(found).encode() in picture

    page = tmp_path / "PAGE.md"
    page.write_text(f"Before.\n<!-- {which.name}:begin -->\nold\n<!-- {which.name}:end -->\nAfter.")
    assert which.main(["--report", "--out", str(quick), "--page", str(page)]) == 0
    shown, text = capsys.readouterr().out, page.read_text()
    assert text.startswith("Before.\n<!--")
    assert text.endswith("-->\nAfter.")
    assert "old\n" not in text
    for section in which.sections(found["runs"]):
        assert section.header[0] in shown
        for label, *_ in section.rows:
            assert label in shown
            assert f"| {label} " in text
    link = re.search(r"\((\S+\.png)\)", text)
    assert link
    assert (page.parent / link[1]).exists()


@by_name
def test_goes_on_after_a_kill(which, quick, tmp_path) -> None:
    """Of the file of a killed run, what is torn is done again, and nothing else."""
    for path in quick.glob(f"{which.name}.json*"):
        shutil.copy(path, tmp_path)
    lines = tmp_path / f"{which.name}.jsonl"
    whole = lines.read_bytes()
    torn = whole[: whole.rstrip(b"\n").rfind(b"\n") + 40]
    lines.write_bytes(torn)
    done = []

    def perform(begun, job, steps):
        done.append(job)
        return which.perform(begun, job, steps)

    again = which._replace(perform=perform)
    assert again.main(["--quick", "--out", str(tmp_path)]) == 0
    assert [job.settings for job in done] == [WAYS[which.name][-1]._asdict()]
    assert [*map(timeless, results(tmp_path, which))] == [*map(timeless, results(quick, which))]
    assert len(stored(tmp_path, which)) == len(WAYS[which.name])  # and each of them a line

    assert again.main(["--quick", "--out", str(tmp_path)]) == 0
    assert len(done) == 1


def test_what_has_changed_is_run_anew(tmp_path, monkeypatch) -> None:
    done = []

    def few(seeds):
        return [job for job in ablate.jobs(seeds) if job.settings == ablate.UNTRAINED._asdict()]

    def perform(begun, job, steps):
        done.append(job.seed)
        return {**ablate.perform(begun, job, steps)}

    which = ablate.COMMAND._replace(jobs=few, perform=perform, sections=lambda _: [])
    which = which._replace(draw=lambda _: ablate.Figure())
    quick = ["--quick", "--out", str(tmp_path)]
    which.main(quick)
    which.main([*quick, "--seeds", "2"])
    assert done == [0, 1]
    pretraining, steps = command.QUICK
    monkeypatch.setattr(command, "QUICK", (pretraining, steps + 1))
    which.main(quick)
    assert done == [0, 1, 0]
    monkeypatch.setattr(command, "QUICK", (pretraining._replace(rate=1e-3), steps + 1))
    which.main(quick)
    assert done == [0, 1, 0, 0]
    which._replace(modules=(digits,)).main(quick)
    assert done == [0, 1, 0, 0, 0]
    which.main(quick)
    assert done == [0, 1, 0, 0, 0]


def test_store(tmp_path) -> None:
    path = tmp_path / "runs.jsonl"
    store = runs.Store(path, "abc")
    store.add({"a": 1, "b": 2.0}, {"value": 3})
    assert runs.Store(path, "abc").get({"b": 2.0, "a": 1}) == {"value": 3}
    assert runs.Store(path, "abd").get({"a": 1, "b": 2.0}) is None
    assert runs.Store(path, "abc").get({"a": 1}) is None
    with path.open("ab") as file:
        file.write(b'{"code": "abc", "sett')
    store = runs.Store(path, "abc")
    store.add({"a": 2}, {"value": 4})
    again = runs.Store(path, "abc")
    assert again.get({"a": 1, "b": 2.0}) == {"value": 3}
    assert again.get({"a": 2}) == {"value": 4}
    path.write_bytes(b'{"code"\n' + path.read_bytes())
    with pytest.raises(runs.StoreError, match=r"runs\.jsonl, line 1, is not a run"):
        runs.Store(path, "abc")


def test_code_version_is_of_what_results_depend_on(monkeypatch) -> None:
    before = runs.code_version([digits])
    assert before == runs.code_version([digits])
    assert before != runs.code_version([digits, training])
    monkeypatch.setattr(torch, "__version__", "0")
    assert before != runs.code_version([digits])


def test_one_factor_at_a_time() -> None:
    """Every row differs from what it is compared with in what its table is about, alone."""
    about = {
        "No loss": {"way", "weight", "rate"},
        "Measure": {"way", "weight"},
        "Weight": {"way", "weight"},
        "Batch size": {"way", "weight"},
        "Debiasing": {"debiased"},
        "Rotation of the covariance": {"rotation"},
    }
    for title, _, rows in ablate.factors():
        for row in rows:
            if row.other is not None:
                plan, other = row.plan._asdict(), row.other._asdict()
                assert {key for key in plan if plan[key] != other[key]} <= about[title]
                assert row.other in [each.plan for each in [*rows, *ablate.factors()[0].rows]]


def test_loss_has_the_plan_s_settings() -> None:
    for plan in ablate.plans():
        loss = ablation.loss(plan)
        if plan.way in ("plain", "pretrained"):
            assert loss is None
        else:
            assert (loss.measure, loss.weight, loss.debiased) == (*plan[:2], plan.debiased)
            assert loss.optimal == (plan.rotation == "optimal")
            assert (loss.rotation is None) == (plan.rotation != "learned")


@pytest.mark.parametrize("batch", [8, 30])
def test_batch_is_what_the_loss_sees(batch, monkeypatch) -> None:
    seen = set()
    forward = ablation.rk.RIFTLoss.forward

    def spy(self, student, teacher, mask=None):
        seen.add((student.shape, teacher.shape))
        return forward(self, student, teacher, mask)

    monkeypatch.setattr(ablation.rk.RIFTLoss, "forward", spy)
    start = ablation.begin(0, training.Recipe(1, 1e-3))
    ablation.perform(start, ablation.Plan(batch=batch), 2)
    assert seen == {((batch, digits.MODEL["width"]),) * 2}


def test_learned_rotation_is_learned() -> None:
    start = ablation.begin(0, training.Recipe(1, 1e-3))
    loss = ablation.loss(ablation.Plan("covariance", rotation="learned"))
    before = loss.rotation.weight.detach().clone()
    training.finetune(start.teacher, start.data.shots, 3, loss, 0, training.Recipe(3, 1e-2))
    assert (loss.rotation.weight - before).abs().max() > 1e-4


def test_average_and_forgetting() -> None:
    accuracies = [[90.0], [95.0, 80.0], [60.0, 70.0, 50.0]]
    assert sequence.average(accuracies) == pytest.approx(60)
    assert sequence.forgetting(accuracies) == pytest.approx((35 + 10) / 2)


def test_sequence_compares_with_the_task_before(monkeypatch) -> None:
    """And keeps the heads: a frozen backbone forgets nothing."""
    teachers = []
    finetune = sequence.finetune

    def spy(teacher, *arguments, **options):
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        model, ms = finetune(teacher, *arguments, **options)
        teachers.append((teacher, model))
        return model, ms

    monkeypatch.setattr(sequence, "finetune", spy)
    start = sequence.begin(0, training.Recipe(2, 1e-3))
    for way in ("cka", "linear probe"):
        teachers.clear()
        found = sequence.perform(start, sequence.Plan(way, 1.0), 2)
        assert teachers[0][0] is start.model
        assert all(model is teacher for (_, model), (teacher, _) in pairwise(teachers))
        assert [len(row) for row in found["accuracy"]] == [1, 2, 3]
        assert [len(row) for row in found["refitted"]] == [1, 2, 3]
    assert sequence.forgetting(found["accuracy"]) == 0
    assert sequence.forgetting(found["refitted"]) == 0


def test_tasks_share_no_image() -> None:
    tasks = digits.draw_tasks(0, torch.device("cpu"))
    assert [len(task.training[0]) for task in tasks[1:]] == [30, 30]
    assert [int(task.test[1].max()) + 1 for task in tasks] == [4, 3, 3]
    for task in tasks:
        same = (task.training[0][:, None] == task.test[0][None]).flatten(2).all(-1)
        assert not same.any()


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        ([3.0, 4.0, 5.1], [1.0, 2.0, 3.0], "+2.0"),
        ([3.0, 1.0, 5.0], [1.0, 2.0, 3.0], "~+1.0"),
        ([1.0, 1.0], [3.0, 3.0], "-2.0"),
        ([1.0, 2.0], [1.0, 2.0], "~+0.0"),
        ([1.0], [3.0], "~-2.0"),
    ],
)
def test_difference_is_paired(values, others, expected) -> None:
    def of(numbers, order):
        return [{"seed": seed, "x": numbers[seed]} for seed in order]

    seeds = range(len(values))
    assert command.difference(of(values, seeds), of(others, reversed(seeds)), "x") == expected


@by_name
def test_wrong_options(which, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        which.main(["--seeds", "0"])
    assert "--seeds: must be at least 1, got 0" in capsys.readouterr().err
    assert which.main(["--report", "--out", str(tmp_path)]) == 1
    assert f"{which.name}.json" in capsys.readouterr().out.replace("\n", "")


@by_name
def test_page_is_of_the_committed_results(which) -> None:
    folder = EXAMPLES / "results"
    found = json.loads((folder / f"{which.name}.json").read_text())
    text = (EXAMPLES / "ABLATIONS.md").read_text()
    begin, end = (f"<!-- {which.name}:{side} -->" for side in ("begin", "end"))
    inside = text[text.index(begin) + len(begin) : text.index(end)].strip()
    assert inside == which.page(found, f"results/{which.name}.png")
    assert command.digest(found).encode() in (folder / f"{which.name}.png").read_bytes()
