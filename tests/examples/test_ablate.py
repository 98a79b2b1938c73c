"""The ablations and the sequence of tasks: quick runs, their stored files, and their page."""

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

from examples import ablate, continual  # noqa: E402
from examples.digits import (  # noqa: E402
    ablation,
    data,
    experiment,
    model,
    runs,
    sequence,
    training,
)

pytestmark = pytest.mark.eager_only
EXAMPLES = Path(ablate.__file__).parent
EXPERIMENTS = [ablate.EXPERIMENT, continual.EXPERIMENT]
PLANS = {"ablations": [*ablate.plans()], "continual": continual.PLANS}
each_experiment = pytest.mark.parametrize("tested", EXPERIMENTS, ids=lambda tested: tested.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The commands use one thread, too: a model this small is slower with more."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_images() -> Iterator[None]:
    """Fewer images suffice for these tests, and are faster."""

    def first(images: data.Images) -> data.Images:
        return images[0][:60], images[1][:60]

    def draw_data(*arguments):
        return data.Data(*map(first, data.draw_data(*arguments)))

    def draw_tasks(*arguments):
        return [data.Task(*map(first, task)) for task in data.draw_tasks(*arguments)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "draw_data", draw_data)
        patch.setattr(sequence, "draw_tasks", draw_tasks)
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the files of quick runs of both experiments."""
    folder = tmp_path_factory.mktemp("quick")
    for each in EXPERIMENTS:
        assert each.main(["--quick", "--out", str(folder)]) == 0
    return folder


def results(folder: Path, tested: experiment.Experiment) -> list[dict]:
    return json.loads((folder / f"{tested.name}.json").read_text())["runs"]


def stored(folder: Path, tested: experiment.Experiment) -> list[dict]:
    lines = (folder / f"{tested.name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(run: dict) -> dict:
    return {key: value for key, value in run.items() if key not in ("seconds", "step_ms")}


@each_experiment
def test_quick_run(tested, quick, tmp_path, capsys) -> None:
    methods = [plan.method for plan in PLANS[tested.name]]
    assert [run["method"] for run in results(quick, tested)] == methods
    assert len(stored(quick, tested)) == len(PLANS[tested.name])
    record = json.loads((quick / f"{tested.name}.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert {"hardware", "commit", "code", "seconds", "settings"} <= set(record)
    picture = (quick / f"{tested.name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert experiment.digest(record).encode() in picture

    page = tmp_path / "PAGE.md"
    markers = [f"<!-- {tested.name}:{side} -->" for side in ("begin", "end")]
    page.write_text(f"Before.\n{markers[0]}\nold\n{markers[1]}\nAfter.")
    assert tested.main(["--report", "--out", str(quick), "--page", str(page)]) == 0
    output, text = capsys.readouterr().out, page.read_text()
    assert text.startswith("Before.\n<!--")
    assert text.endswith("-->\nAfter.")
    assert "old\n" not in text
    for section in tested.sections(record["runs"]):
        assert section.header[0] in output
        for label, *_ in section.rows:
            assert label in output
            assert f"| {label} " in text
    link = re.search(r"\((\S+\.png)\)", text)
    assert link
    assert (page.parent / link[1]).exists()


@each_experiment
def test_resumes_after_a_kill(tested, quick, tmp_path) -> None:
    """Only the run with an incomplete line is performed again."""
    for path in quick.glob(f"{tested.name}.json*"):
        shutil.copy(path, tmp_path)
    store = tmp_path / f"{tested.name}.jsonl"
    content = store.read_bytes()
    store.write_bytes(content[: content.rstrip(b"\n").rfind(b"\n") + 40])
    performed = []

    def perform(start, job, steps):
        performed.append(job)
        return tested.perform(start, job, steps)

    resumed = tested._replace(perform=perform)
    assert resumed.main(["--quick", "--out", str(tmp_path)]) == 0
    assert [job.settings for job in performed] == [PLANS[tested.name][-1]._asdict()]
    expected = [*map(without_times, results(quick, tested))]
    assert [*map(without_times, results(tmp_path, tested))] == expected
    assert len(stored(tmp_path, tested)) == len(PLANS[tested.name])  # one valid line for each

    assert resumed.main(["--quick", "--out", str(tmp_path)]) == 0
    assert len(performed) == 1


def test_changed_settings_and_code_run_again(tmp_path, monkeypatch) -> None:
    seeds = []

    def jobs(count):
        return [job for job in ablate.jobs(count) if job.settings == ablate.NOT_FINETUNED._asdict()]

    def perform(start, job, steps):
        seeds.append(job.seed)
        return {**ablate.perform(start, job, steps)}

    tested = ablate.EXPERIMENT._replace(jobs=jobs, perform=perform, sections=lambda _: [])
    tested = tested._replace(draw=lambda _: ablate.Figure())
    options = ["--quick", "--out", str(tmp_path)]
    tested.main(options)
    tested.main([*options, "--seeds", "2"])
    assert seeds == [0, 1]
    pretraining, steps = experiment.QUICK
    monkeypatch.setattr(experiment, "QUICK", (pretraining, steps + 1))
    tested.main(options)
    assert seeds == [0, 1, 0]
    monkeypatch.setattr(experiment, "QUICK", (pretraining._replace(rate=1e-3), steps + 1))
    tested.main(options)
    assert seeds == [0, 1, 0, 0]
    tested._replace(modules=(data,)).main(options)
    assert seeds == [0, 1, 0, 0, 0]
    tested.main(options)
    assert seeds == [0, 1, 0, 0, 0]


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
    reread = runs.Store(path, "abc")
    assert reread.get({"a": 1, "b": 2.0}) == {"value": 3}
    assert reread.get({"a": 2}) == {"value": 4}
    path.write_bytes(b'{"code"\n' + path.read_bytes())
    with pytest.raises(runs.StoreError, match=r"runs\.jsonl, line 1, is not a run"):
        runs.Store(path, "abc")


def test_code_version_covers_what_results_depend_on(monkeypatch) -> None:
    version = runs.code_version([data])
    assert version == runs.code_version([data])
    assert version != runs.code_version([data, training])
    monkeypatch.setattr(torch, "__version__", "0")
    assert version != runs.code_version([data])


def test_one_factor_at_a_time() -> None:
    """Every row differs from its baseline only in the factor of its table."""
    varied = {
        "No loss": {"method", "weight", "rate"},
        "Measure": {"method", "weight"},
        "Weight": {"method", "weight"},
        "Batch size": {"method", "weight"},
        "Debiasing": {"debiased"},
        "Rotation of the covariance": {"rotation"},
    }
    for title, _, rows in ablate.factors():
        for row in rows:
            if row.baseline is not None:
                plan, baseline = row.plan._asdict(), row.baseline._asdict()
                assert {key for key in plan if plan[key] != baseline[key]} <= varied[title]
                assert row.baseline in [each.plan for each in [*rows, *ablate.factors()[0].rows]]


def test_loss_has_the_plans_settings() -> None:
    for plan in ablate.plans():
        loss = ablation.rift_loss(plan)
        if plan.method in ("plain", "pretrained"):
            assert loss is None
        else:
            assert (loss.measure, loss.weight, loss.debiased) == (*plan[:2], plan.debiased)
            assert loss.optimal == (plan.rotation == "optimal")
            assert (loss.rotation is None) == (plan.rotation != "learned")


@pytest.mark.parametrize("batch", [8, 30])
def test_the_loss_gets_batches_of_the_planned_size(batch, monkeypatch) -> None:
    shapes = set()
    forward = ablation.rk.RIFTLoss.forward

    def spy(self, student, teacher, mask=None):
        shapes.add((student.shape, teacher.shape))
        return forward(self, student, teacher, mask)

    monkeypatch.setattr(ablation.rk.RIFTLoss, "forward", spy)
    start = ablation.prepare(0, training.Recipe(1, 1e-3))
    ablation.perform(start, ablation.Plan(batch=batch), 2)
    assert shapes == {((batch, model.SIZES["width"]),) * 2}


def test_a_learned_rotation_changes() -> None:
    start = ablation.prepare(0, training.Recipe(1, 1e-3))
    loss = ablation.rift_loss(ablation.Plan("covariance", rotation="learned"))
    before = loss.rotation.weight.detach().clone()
    training.finetune(start.teacher, start.data.shots, 3, loss, 0, training.Recipe(3, 1e-2))
    assert (loss.rotation.weight - before).abs().max() > 1e-4


def test_average_and_forgetting() -> None:
    accuracies = [[90.0], [95.0, 80.0], [60.0, 70.0, 50.0]]
    assert sequence.average(accuracies) == pytest.approx(60)
    assert sequence.forgetting(accuracies) == pytest.approx((35 + 10) / 2)


def test_each_task_is_compared_with_the_previous_model(monkeypatch) -> None:
    """Heads are kept, so a frozen backbone forgets nothing."""
    calls = []
    finetune = sequence.finetune

    def spy(teacher, *arguments, **options):
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        student, ms = finetune(teacher, *arguments, **options)
        calls.append((teacher, student))
        return student, ms

    monkeypatch.setattr(sequence, "finetune", spy)
    start = sequence.prepare(0, training.Recipe(2, 1e-3))
    for method in ("cka", "linear probe"):
        calls.clear()
        accuracies = sequence.perform(start, sequence.Plan(method, 1.0), 2)
        assert calls[0][0] is start.model
        assert all(student is teacher for (_, student), (teacher, _) in pairwise(calls))
        assert [len(row) for row in accuracies["accuracy"]] == [1, 2, 3]
        assert [len(row) for row in accuracies["refitted"]] == [1, 2, 3]
    assert sequence.forgetting(accuracies["accuracy"]) == 0
    assert sequence.forgetting(accuracies["refitted"]) == 0


def test_tasks_share_no_image() -> None:
    tasks = data.draw_tasks(0, torch.device("cpu"))
    assert [len(task.training[0]) for task in tasks[1:]] == [30, 30]
    assert [int(task.test[1].max()) + 1 for task in tasks] == [4, 3, 3]
    for task in tasks:
        same = (task.training[0][:, None] == task.test[0][None]).flatten(2).all(-1)
        assert not same.any()


@pytest.mark.parametrize(
    ("values", "baseline", "expected"),
    [
        ([3.0, 4.0, 5.1], [1.0, 2.0, 3.0], "+2.0"),
        ([3.0, 1.0, 5.0], [1.0, 2.0, 3.0], "~+1.0"),
        ([1.0, 1.0], [3.0, 3.0], "-2.0"),
        ([1.0, 2.0], [1.0, 2.0], "~+0.0"),
        ([1.0], [3.0], "~-2.0"),
    ],
)
def test_difference_is_paired(values, baseline, expected) -> None:
    def make_runs(numbers, order):
        return [{"seed": seed, "x": numbers[seed]} for seed in order]

    seeds = range(len(values))
    pair = make_runs(values, seeds), make_runs(baseline, reversed(seeds))
    assert experiment.difference(*pair, "x") == expected


@each_experiment
def test_wrong_options(tested, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        tested.main(["--seeds", "0"])
    assert "--seeds: must be at least 1, got 0" in capsys.readouterr().err
    assert tested.main(["--report", "--out", str(tmp_path)]) == 1
    assert f"{tested.name}.json" in capsys.readouterr().out.replace("\n", "")


@each_experiment
def test_page_shows_the_committed_results(tested) -> None:
    folder = EXAMPLES / "results"
    record = json.loads((folder / f"{tested.name}.json").read_text())
    text = (EXAMPLES / "ABLATIONS.md").read_text()
    begin, end = (f"<!-- {tested.name}:{side} -->" for side in ("begin", "end"))
    section = text[text.index(begin) + len(begin) : text.index(end)].strip()
    assert section == tested.page(record, f"results/{tested.name}.png")
    assert experiment.digest(record).encode() in (folder / f"{tested.name}.png").read_bytes()
