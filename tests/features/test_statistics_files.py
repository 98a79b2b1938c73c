"""Files of statistics: what is written comes back, and nothing else is taken for one."""

import dataclasses
import hashlib
import json
import sys

import pytest
import torch

import rift_kernels as rk
from rift_kernels.features import statistics_files
from rift_kernels.features.statistics_files import State
from tests.features.test_statistics import assert_same, gathered, normal

pytest.importorskip("safetensors", reason="needs safetensors")
from safetensors.torch import load_file, save_file

LAYERS = ("encoder.layer.11", "", "mean", "blocks.0.count", "ein Name mit ä / und \\ \n")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.safetensors"


def one_state(**changes) -> State:
    statistics = gathered(normal(20, 3) + 1)
    state = State(statistics.count, statistics.mean, statistics.scatter)
    return dataclasses.replace(state, **changes)


def test_round_trip_of_one(path) -> None:
    statistics = gathered(normal(30, 5) + 1e4, decay=0.1)
    statistics.save(path)
    loaded = rk.TeacherStatistics.load(path, width=5)
    assert_same(loaded, statistics)
    assert_same(rk.TeacherStatistics.load(str(path)), statistics)
    assert_same(rk.load_statistics(path)[""], statistics)
    loaded.update(normal(3, 5))
    statistics.update(normal(3, 5))
    assert_same(loaded, statistics)


def test_round_trip_of_several(path) -> None:
    """Names may have anything in them; widths and decays differ."""
    layers = {
        name: gathered(normal(9, i + 1, seed=i), decay=1 - i / 7) for i, name in enumerate(LAYERS)
    }
    rk.save_statistics(layers, path)
    loaded = rk.load_statistics(path)
    assert list(loaded) == list(LAYERS)
    for name in LAYERS:
        assert_same(loaded[name], layers[name])
    with pytest.raises(ValueError, match=r"has the layers 'encoder.layer.11', '', .*one layer"):
        rk.TeacherStatistics.load(path)
    rk.save_statistics({"named": layers["mean"]}, path)
    assert_same(rk.TeacherStatistics.load(path), layers["mean"])


def test_one_of_two_names(path) -> None:
    """As of a module that is in a model twice."""
    statistics = gathered(normal(5, 4))
    rk.save_statistics({"first": statistics, "second": statistics}, path)
    for loaded in rk.load_statistics(path).values():
        assert_same(loaded, statistics)


def test_what_has_not_begun_or_is_nan_comes_back(path) -> None:
    for statistics in (rk.TeacherStatistics(4), gathered(normal(5, 4) * float("nan"))):
        statistics.save(path)
        loaded = rk.TeacherStatistics.load(path)
        torch.testing.assert_close(
            loaded.state_dict(), statistics.state_dict(), rtol=0, atol=0, equal_nan=True
        )


def test_loaded_in_inference_mode_can_be_changed_after(path) -> None:
    gathered(normal(5, 4)).save(path)
    with torch.inference_mode():
        loaded = rk.TeacherStatistics.load(path)
    loaded.update(normal(5, 4))
    assert float(loaded.count) == 10


def test_tensors_are_named_as_in_a_state_dict(path) -> None:
    """Other programs may read them."""
    rk.save_statistics({"a.b": gathered(normal(5, 4)), "": gathered(normal(5, 4))}, path)
    names = {f"{prefix}{part}" for prefix in ("a.b.", "") for part in ("count", "mean", "scatter")}
    assert set(load_file(path)) == names


def test_another_width_is_refused(path) -> None:
    rk.TeacherStatistics(5).save(path)
    with pytest.raises(ValueError, match=r"statistics of width 5; width asks for 4"):
        rk.TeacherStatistics.load(path, width=4)
    with pytest.raises(TypeError, match="width must be an integer; got str"):
        rk.TeacherStatistics.load(path, width="5")


def test_what_is_not_there(path, tmp_path) -> None:
    for missing in (path, tmp_path):
        for load in (rk.load_statistics, rk.TeacherStatistics.load):
            with pytest.raises(FileNotFoundError, match=str(missing)):
                load(missing)
    with pytest.raises(FileNotFoundError, match="path must be in a directory that exists"):
        rk.TeacherStatistics(3).save(tmp_path / "none" / "x.safetensors")


def test_wrong_statistics(path) -> None:
    one, linear = rk.TeacherStatistics(3), torch.nn.Linear(1, 1)
    for error, message, statistics in (
        (TypeError, "statistics must be a mapping .*; got TeacherStatistics", one),
        (
            TypeError,
            "statistics must be a mapping .*; got 'a': Linear",
            {"a": linear},
        ),
        (TypeError, "statistics must be a mapping .*; got 1: TeacherStatistics", {1: one}),
        (ValueError, "statistics must have at least one layer; got none", {}),
    ):
        with pytest.raises(error, match=message):
            rk.save_statistics(statistics, path)
    assert not path.exists()


def assert_refused(path, found: str) -> None:
    """The error has the path, what was found and what is accepted."""
    with pytest.raises(ValueError) as caught:
        rk.load_statistics(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a file of teacher statistics: ")
    assert found in message
    assert "format 'rift_kernels.statistics', version '1'" in message


def test_truncated_files_are_refused(path) -> None:
    gathered(normal(20, 3)).save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(path, "safetensors says")
    path.write_bytes(whole + b"\0")
    assert_refused(path, "safetensors says")


@pytest.mark.parametrize("bits", [0x01, 0x20, 0xFF])
def test_files_with_one_wrong_byte_are_refused(path, bits) -> None:
    """In the header as in the data. A blank that fills up the header means nothing."""
    statistics = gathered(normal(20, 2), decay=0.5)
    rk.save_statistics({"a.b": statistics}, path)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :])
        try:
            loaded = rk.load_statistics(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert whole[i : i + 1] == b" "
            assert_same(loaded["a.b"], statistics)


def test_foreign_files_are_refused(path) -> None:
    path.write_bytes(b"")
    assert_refused(path, "safetensors says")
    path.write_text("count,mean,scatter\n" * 100)
    assert_refused(path, "safetensors says")
    torch.save(gathered(normal(20, 3)).state_dict(), path)
    assert_refused(path, "safetensors says")
    tensors = {
        name: tensor.clone() for name, tensor in gathered(normal(20, 3)).state_dict().items()
    }
    save_file(tensors, path)
    assert_refused(path, "format=None")
    save_file(tensors, path, {"format": "pt"})
    assert_refused(path, "format='pt'")
    save_file(tensors, path, {"format": "rift_kernels.statistics"})
    assert_refused(path, "version=None")
    save_file(tensors, path, {"format": "rift_kernels.statistics", "version": "2"})
    assert_refused(path, "version='2'")
    save_file(tensors, path, {"format": "rift_kernels.statistics", "version": "1"})
    assert_refused(path, "SHA-256")


def asymmetric() -> torch.Tensor:
    scatter = one_state().scatter.clone()
    scatter[0, 1] *= 1 + 1e-6
    return scatter


WRONG_STATES = [
    ("count=-1.0, not finite and at least 0", {"count": torch.tensor(-1.0).double()}),
    ("count=nan", {"count": torch.tensor(float("nan")).double()}),
    ("count=inf", {"count": torch.tensor(float("inf")).double()}),
    ("count of torch.int64, not torch.float64", {"count": torch.tensor(20)}),
    ("mean of torch.float32, not torch.float64", {"mean": torch.zeros(3)}),
    ("scatter of torch.bfloat16", {"scatter": one_state().scatter.bfloat16()}),
    ("shapes [(1,), (3,), (3, 3)]", {"count": torch.tensor([20.0]).double()}),
    ("shapes [(), (4,), (3, 3)]", {"mean": torch.zeros(4).double()}),
    ("shapes [(), (1, 3), (3, 3)]", {"mean": torch.zeros(1, 3).double()}),
    ("shapes [(), (3,), (3, 4)]", {"scatter": torch.zeros(3, 4).double()}),
    ("shapes [(), (0,), (3, 3)]", {"mean": torch.zeros(0).double()}),
    ("scatter that is not symmetric", {"scatter": asymmetric()}),
    ("scatter with a negative diagonal", {"scatter": -one_state().scatter}),
    ("decay=0.0, not a number in (0, 1]", {"decay": 0.0}),
    ("decay=1.5", {"decay": 1.5}),
    ("decay=None", {"decay": None}),
    ("decay='1'", {"decay": "1"}),
]  # fmt: skip


@pytest.mark.parametrize(("found", "changes"), WRONG_STATES, ids=[case[0] for case in WRONG_STATES])
def test_what_cannot_be_statistics_is_refused(found, changes, path) -> None:
    """Whole files, which a damage does not explain."""
    statistics_files.write(path, {"good": one_state(), "a.b": one_state(**changes)})
    assert_refused(path, "layer 'a.b' has ")
    assert_refused(path, found)


def forge(path, tensors=None, **metadata: str) -> None:
    """A whole file with other tensors or metadata, and a digest that fits."""
    statistics_files.write(path, {"": one_state()})
    with statistics_files._safetensors().safe_open(path, "pt") as file:
        found = {**file.metadata(), **metadata}
    del found["sha256"]
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, {**found, "sha256": statistics_files._digest(found, tensors)})


def test_metadata_and_tensors_that_do_not_fit_are_refused(path) -> None:
    zeros = torch.zeros(3)
    forge(path)
    rk.load_statistics(path)
    for found, changes in (
        ("decay='what', which is not JSON", {"decay": "what"}),
        ("decay={}, not a number a layer", {"decay": "{}"}),
        ("decay=[1.0], not a number a layer", {"decay": "[1.0]"}),
        ("progress=[]", {"progress": "[]"}),
        ("missing or too many: a.count, a.mean, a.scatter", {"decay": '{"": 1.0, "a": 1.0}'}),
        ("missing or too many: count", {"tensors": {"mean": zeros, "scatter": zeros + 1}}),
        ("missing or too many: other", {"tensors": {**load_file(path), "other": zeros}}),
    ):  # fmt: skip
        forge(path, **changes)
        assert_refused(path, found)


def test_digest_is_of_everything(path) -> None:
    """Neither what is not the default, nor what is in another order, is left out."""
    gathered(normal(20, 3)).save(path)
    tensors = load_file(path)
    metadata = {"format": "a", "decay": json.dumps({"": 1.0})}
    digest = statistics_files._digest(metadata, tensors)
    assert len(digest) == hashlib.sha256().digest_size * 2
    others = [
        statistics_files._digest({**metadata, "decay": "1"}, tensors),
        statistics_files._digest(metadata, {**tensors, "mean": tensors["mean"].reshape(3, 1)}),
        statistics_files._digest(metadata, {**tensors, "mean": tensors["mean"].view(torch.int64)}),
        statistics_files._digest(metadata, {**tensors, "mean": -tensors["mean"]}),
    ]
    assert len({digest, *others}) == 5


def test_an_interrupted_write_leaves_what_was_there(path, monkeypatch) -> None:
    statistics = gathered(normal(20, 3))
    statistics.save(path)

    def stop(_, target, __):
        target.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        rk.TeacherStatistics(7).save(path)
    assert_same(rk.TeacherStatistics.load(path), statistics)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_who_reads_the_file_while_another_is_written_reads_the_old_one(path) -> None:
    """It is replaced, not written into."""
    rk.TeacherStatistics(3).save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        rk.TeacherStatistics(5).save(path)
        assert reader.read() == before
    assert rk.TeacherStatistics.load(path).width == 5


def test_without_safetensors(path, monkeypatch) -> None:
    rk.TeacherStatistics(3).save(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = r"need safetensors: pip install 'rift_kernels\[statistics\]'"
    with pytest.raises(ImportError, match=message):
        rk.TeacherStatistics(3).save(path)
    with pytest.raises(ImportError, match=message):
        rk.load_statistics(path)
