"""collect_teacher_statistics: kinds of batches, training modes, files that a later call resumes."""

import sys
from collections import UserDict, namedtuple

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from rift_kernels.features.collect import collect_teacher_statistics as collect
from tests.features.test_statistics import assert_same, assert_weighted, gathered, normal

SIZES = (4, 4, 1, 4, 3)


class Model(nn.Module):
    """Tokens (batch, tokens, 3) to features (batch, tokens, 5); counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 5)
        self.calls = 0

    def forward(self, pixels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        assert attention_mask is None or attention_mask.shape == pixels.shape[:-1]
        return self.head(self.embed(pixels).tanh())


class Batches:
    """A data loader that fails after ``stop`` batches."""

    def __init__(self, batches: list, stop: int | None = None) -> None:
        self.batches = batches
        self.stop = stop

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == self.stop:
                raise InterruptedError
            yield batch


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def batches() -> list[Tensor]:
    return list(normal(sum(SIZES), 7, 3).float().split(SIZES))


@pytest.fixture
def path(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors")
    return tmp_path / "teacher.safetensors"


@pytest.fixture(autouse=True)
def _tqdm():
    pytest.importorskip("tqdm", reason="needs tqdm")


def features(model: Model, x: Tensor, layer: str = "head") -> Tensor:
    with torch.no_grad():
        model.eval()
        embedded = model.embed(x)
        return embedded if layer == "embed" else model.head(embedded.tanh())


def assert_all_same(actual, expected) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        assert_same(actual[name], expected[name])


POOLED = {
    "cls": lambda x: x[:, 0],
    "mean": lambda x: x.mean(1),
    "tokens": lambda x: x.flatten(0, 1),
}


@pytest.mark.parametrize("pooling", POOLED)
def test_is_the_statistics_of_the_pooled_features(pooling, model, batches) -> None:
    statistics = collect(model, batches, layers=["head", "embed"], pooling=pooling)
    assert list(statistics) == ["embed", "head"]
    for name, layer in statistics.items():
        pooled = [POOLED[pooling](features(model, x, name)) for x in batches]
        assert_same(layer, gathered(*pooled))
        assert layer.decay == 1


Batch = namedtuple("Batch", ["pixels", "labels"])
KINDS = {
    "tuple": lambda x: (x, torch.zeros(len(x))),
    "list": lambda x: [x, "a caption"],
    "named tuple": lambda x: Batch(x, torch.zeros(len(x))),
    "mapping": lambda x: {"pixels": x, "labels": torch.zeros(len(x)), "label": 3},
    "user mapping": lambda x: UserDict(pixels=x, labels=torch.zeros(len(x))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind, model, batches) -> None:
    statistics = collect(model, [KINDS[kind](x) for x in batches], layers="head")
    assert_all_same(statistics, collect(model, batches, layers="head"))


def test_any_other_batch_goes_through_forward(model, batches) -> None:
    nested = [{"images": {"small": x}} for x in batches]
    statistics = collect(
        model, nested, layers="head", forward=lambda model, batch: model(batch["images"]["small"])
    )
    assert_all_same(statistics, collect(model, batches, layers="head"))
    for batch, kind in ((3, "int"), ([], "list"), (("a", batches[0]), "str"), ([{}], "dict")):
        with pytest.raises(TypeError, match=f"a batch must be a tensor, .*; got {kind}: forward="):
            collect(model, [batch], layers="head")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("pooling", POOLED)
def test_padding_is_left_out(pooling, dtype, model, batches) -> None:
    """Padding may be NaN. The class token is the first token, regardless of the mask."""
    padded, pooled = [], []
    for x in batches:
        valid = torch.arange(7) < torch.arange(1, len(x) + 1)[:, None]
        x[~valid] = float("nan")
        padded.append({"pixels": x, "attention_mask": valid.to(dtype)})
        rows = features(model, x)
        if pooling == "mean":
            rows = torch.stack([row[v].mean(0) for row, v in zip(rows, valid, strict=True)])
        pooled.append(
            rows[:, 0] if pooling == "cls" else rows[valid] if pooling == "tokens" else rows
        )
    statistics = collect(model, padded, layers="head", pooling=pooling)["head"]
    rows = torch.cat(pooled)
    assert_weighted(statistics, rows, torch.ones(len(rows)), tolerance=1e-6)


def test_every_training_flag_is_restored(model, batches) -> None:
    """During collection, dropout is off and nothing requires gradients."""
    model.train()
    model.embed.eval()
    flags = []
    model.head.register_forward_hook(
        lambda module, _, output: flags.append((module.training, output.requires_grad))
    )
    before = [module.training for module in model.modules()]
    collect(model, batches, layers="head")
    assert set(flags) == {(False, False)}
    assert [module.training for module in model.modules()] == before
    with pytest.raises(InterruptedError):
        collect(model, Batches(batches, stop=1), layers="head")
    assert [module.training for module in model.modules()] == before
    # The hooks are removed, and the model's output can be differentiated.
    assert len(model.head._forward_hooks) == 1
    model(batches[0]).sum().backward()


def test_moves_batches(batches, device) -> None:
    model = Model().to(device).double()
    received = []

    def forward(model, batch):
        received.append(batch)
        assert batch["x"][0].device == batch["y"].z.device == device
        model(batch["x"][0].double())

    pair = namedtuple("pair", ["z"])
    nested = [{"x": [x], "y": pair(x), "caption": "a"} for x in batches]
    statistics = collect(model, nested, layers="head", forward=forward, progress=False)
    assert received[0]["caption"] == "a"
    assert statistics["head"].mean.device == device
    meta = []
    with pytest.raises(RuntimeError, match="nothing was captured"):
        collect(model, batches, layers="head", device="meta", forward=lambda _, x: meta.append(x))
    assert meta[0].device.type == "meta"


def test_batches_go_where_the_model_is(batches) -> None:
    """The device is that of the first parameter, otherwise of the first buffer."""
    for model in (nn.Linear(3, 4), nn.BatchNorm1d(7, affine=False)):
        settings = {"layers": "", "pooling": lambda x, _: x.flatten(0, 1)}
        statistics = collect(model.to("meta"), batches, **settings)
        assert statistics[""].mean.device.type == "meta"


def test_the_class_token_needs_no_mask(model, batches) -> None:
    """The model may take a mask of any shape."""
    masked = [{"pixels": x, "attention_mask": torch.ones(len(x), 1, 7, 7)} for x in batches]
    settings = {"layers": "head", "forward": lambda model, batch: model(batch["pixels"])}
    assert_all_same(collect(model, masked, **settings), collect(model, batches, layers="head"))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(4, 1, 7, 7\) does not"):
        collect(model, masked, pooling="mean", **settings)


def test_a_model_without_parameters() -> None:
    x = normal(6, 4)
    assert_same(collect(nn.Identity(), [x], layers="")[""], gathered(x))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("save_every", [1, 2, 100])
def test_an_interrupted_run_resumes(stop, save_every, model, batches, path) -> None:
    """The result has the same bits, and batches in the file are not run again."""
    settings = {"layers": "*", "pooling": "tokens", "save_every": save_every, "progress": False}
    expected = collect(model, batches, **settings)
    with pytest.raises(InterruptedError):
        collect(model, Batches(batches, stop), path=path, **settings)
    saved = stop - stop % save_every
    assert path.exists() == (saved > 0)
    if saved:
        with pytest.warns(UserWarning, match=f"the first {saved} batches only: collect_teacher"):
            rk.load_statistics(path)
    model.calls = 0
    assert_all_same(collect(model, Batches(batches), path=path, **settings), expected)
    assert model.calls == len(batches) - saved
    model.calls = 0
    # A complete file needs neither the model nor the data.
    assert_all_same(collect(model, Batches(batches, stop=0), path=path, **settings), expected)
    assert model.calls == 0
    assert_all_same(rk.load_statistics(path), expected)


def test_interrupted_again_and_again(model, batches, path) -> None:
    for stop in (2, 3, 4):
        with pytest.raises(InterruptedError):
            collect(model, Batches(batches, stop), layers="head", path=path, save_every=1)
    statistics = collect(model, Batches(batches), layers="head", path=path)
    assert_all_same(statistics, collect(model, batches, layers="head"))


def test_a_file_of_another_call_is_refused(model, batches, path) -> None:
    def again(batches=batches, **changes):
        settings = {"layers": "head", "pooling": "mean", **changes}
        return collect(model, batches, path=path, progress=False, **settings)

    again()
    before = path.read_bytes()
    for message, changes in (
        (
            r"the same layers, \['embed'\]; got .*safetensors with \['head'\]: rem",
            {"layers": "embed"},
        ),
        (r"the same pooling, 'cls'; got .* with 'mean'", {"pooling": "cls"}),
        (r"the same length, 4; got .* with 5", {"batches": batches[:4]}),
    ):
        with pytest.raises(ValueError, match=f"path must be a file with {message}"):
            again(**changes)
    rk.save_statistics(again(), path)
    with pytest.raises(
        ValueError, match=r"path must be .* from collect.*; got .*, which save_statistics wrote"
    ):
        again()
    path.write_bytes(before[:-1])
    with pytest.raises(
        ValueError, match=r"path must be a safetensors file of .*; got .*safetensors: "
    ):
        again()
    assert path.read_bytes() == before[:-1]


def test_data_with_fewer_batches_than_the_file(model, batches, path) -> None:
    """The iterables have no length."""
    with pytest.raises(InterruptedError):
        collect(model, (b for b in Batches(batches, 3)), layers="head", path=path, save_every=1)
    with pytest.raises(ValueError, match=r"dataloader must first repeat the 3 batches .*; got 2"):
        collect(model, (b for b in batches[:2]), layers="head", path=path)
    statistics = collect(model, Batches(batches), layers="head", path=path)
    assert_all_same(statistics, collect(model, batches, layers="head"))
    collect(model, (b for b in batches), layers="head", path=path)


WRONG = [
    (TypeError, "model must be an nn.Module; got int", {"model": 3}),
    (ValueError, "pooling must be one of .*; got 'max'", {"pooling": "max"}),
    (ValueError, "layers: 'neck' matches no module", {"layers": "neck"}),
    (TypeError, "forward must be callable or None; got str", {"forward": "forward"}),
    (TypeError, "progress must be True or False; got None", {"progress": None}),
    (ValueError, "save_every must be at least 1; got 0", {"save_every": 0}),
    (FileNotFoundError, "path must be in a directory that exists", {"path": "/no/such/file"}),
    (ValueError, "dataloader must give at least one batch; got none", {"dataloader": []}),
    (TypeError, "group must be None, 'world' or a .*; got object", {"group": object()}),
]


@pytest.mark.parametrize(("error", "message", "changes"), WRONG)
def test_wrong_arguments(error, message, changes, model, batches) -> None:
    arguments = {"model": model, "dataloader": batches, "layers": "head", **changes}
    with pytest.raises(error, match=message):
        collect(**arguments)
    assert model.calls == 0
    assert not model.head._forward_hooks


def test_a_layer_that_changes_its_width_or_does_not_run(model, batches) -> None:
    wide = [nn.functional.pad(x, (0, 3 * i)) for i, x in enumerate(batches[:2])]
    with pytest.raises(ValueError, match=r"features must be \(\.\.\., N, 3\); got \(4, 6\)"):
        collect(nn.Identity(), wide, layers="")
    runs = iter([lambda m, b: m(b), lambda m, b: m.embed(b)])
    with pytest.raises(RuntimeError, match="nothing was captured of 'head'"):
        collect(model, batches, layers="head", forward=lambda m, b: next(runs)(m, b))


def test_progress(model, batches, capsys) -> None:
    collect(model, batches, layers="head", progress=False)
    assert capsys.readouterr().err == ""
    collect(model, Batches(batches), layers="head")
    assert "teacher statistics: 100%" in capsys.readouterr().err
    collect(model, (b for b in batches), layers="head")
    assert "5batch" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_runs(model, batches, path, monkeypatch) -> None:
    for package, options in (("tqdm", {}), ("safetensors", {"path": path, "progress": False})):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ImportError, match=rf"{package}: pip install 'rift_kernels\[statistics\]'"
            ):
                collect(model, batches, layers="head", **options)
    assert model.calls == 0
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    collect(model, batches, layers="head", progress=False)
