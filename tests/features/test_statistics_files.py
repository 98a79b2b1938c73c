"""Files of statistics: round trips, and the refusal of everything else."""

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


def test_round_trip_of_one_layer(path) -> None:
    statistics = gathered(normal(30, 5) + 1e4, decay=0.1)
    statistics.save(path)
    loaded = rk.TeacherStatistics.load(path, width=5)
    assert_same(loaded, statistics)
    assert_same(rk.TeacherStatistics.load(str(path)), statistics)
    assert_same(rk.load_statistics(path)[""], statistics)
    loaded.update(normal(3, 5))
    statistics.update(normal(3, 5))
    assert_same(loaded, statistics)


def test_round_trip_of_several_layers(path) -> None:
    """Names may contain any character; widths and decays differ."""
    layers = {
        name: gathered(normal(9, i + 1, seed=i), decay=1 - i / 7) for i, name in enumerate(LAYERS)
    }
    rk.save_statistics(layers, path)
    loaded = rk.load_statistics(path)
    assert list(loaded) == list(LAYERS)
    for name in LAYERS:
        assert_same(loaded[name], layers[name])
    with pytest.raises(
        ValueError, match=r"must be a file with one layer .* with 'encoder.layer.11', '', "
    ):
        rk.TeacherStatistics.load(path)
    rk.save_statistics({"named": layers["mean"]}, path)
    assert_same(rk.TeacherStatistics.load(path), layers["mean"])


def test_one_layer_under_two_names(path) -> None:
    """Such a layer comes from a module that occurs twice in a model."""
    statistics = gathered(normal(5, 4))
    rk.save_statistics({"first": statistics, "second": statistics}, path)
    for loaded in rk.load_statistics(path).values():
        assert_same(loaded, statistics)


def test_round_trip_of_empty_and_nan_statistics(path) -> None:
    for statistics in (rk.TeacherStatistics(4), gathered(normal(5, 4) * float("nan"))):
        statistics.save(path)
        loaded = rk.TeacherStatistics.load(path)
        torch.testing.assert_close(
            loaded.state_dict(), statistics.state_dict(), rtol=0, atol=0, equal_nan=True
        )


def test_statistics_loaded_in_inference_mode_can_be_updated_later(path) -> None:
    gathered(normal(5, 4)).save(path)
    with torch.inference_mode():
        loaded = rk.TeacherStatistics.load(path)
    loaded.update(normal(5, 4))
    assert float(loaded.count) == 10


def test_tensors_are_named_as_in_a_state_dict(path) -> None:
    """The names are fixed, because other programs may read the files."""
    rk.save_statistics({"a.b": gathered(normal(5, 4)), "": gathered(normal(5, 4))}, path)
    names = {f"{prefix}{part}" for prefix in ("a.b.", "") for part in ("count", "mean", "scatter")}
    assert set(load_file(path)) == names


def test_another_width_is_refused(path) -> None:
    rk.TeacherStatistics(5).save(path)
    with pytest.raises(ValueError, match=r"path must hold statistics of width 4; got 5 in"):
        rk.TeacherStatistics.load(path, width=4)
    with pytest.raises(TypeError, match="width must be an integer; got str"):
        rk.TeacherStatistics.load(path, width="5")


def test_missing_files_and_folders(path, tmp_path) -> None:
    for missing in (path, tmp_path):
        for load in (rk.load_statistics, rk.TeacherStatistics.load):
            with pytest.raises(FileNotFoundError, match=str(missing)):
                load(missing)
    with pytest.raises(FileNotFoundError, match="path must be in a directory that exists"):
        rk.TeacherStatistics(3).save(tmp_path / "none" / "x.safetensors")


def test_wrong_statistics(path) -> None:
    layer, linear = rk.TeacherStatistics(3), torch.nn.Linear(1, 1)
    for error, message, statistics in (
        (TypeError, "statistics must be a mapping .*; got TeacherStatistics", layer),
        (
            TypeError,
            "statistics must be a mapping .*; got 'a': Linear",
            {"a": linear},
        ),
        (TypeError, "statistics must be a mapping .*; got 1: TeacherStatistics", {1: layer}),
        (ValueError, "statistics must have at least one layer; got none", {}),
    ):
        with pytest.raises(error, match=message):
            rk.save_statistics(statistics, path)
    assert not path.exists()


def assert_refused(path, fault: str) -> None:
    """The error names what is accepted, the path and the fault."""
    with pytest.raises(ValueError) as error:
        rk.load_statistics(path)
    accepted = "path must be a safetensors file of format 'rift_kernels.statistics', version '1'"
    message = str(error.value)
    assert message.startswith(accepted)
    assert f"; got {path}: " in message
    assert fault in message


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
    """Every byte counts, in header and data, except the blanks that pad the header."""
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


@pytest.mark.parametrize(("fault", "changes"), WRONG_STATES, ids=[case[0] for case in WRONG_STATES])
def test_impossible_statistics_are_refused(fault, changes, path) -> None:
    """The files are intact: their digests match."""
    statistics_files.write(path, {"good": one_state(), "a.b": one_state(**changes)})
    assert_refused(path, "layer 'a.b' has ")
    assert_refused(path, fault)


def forge(path, tensors=None, **changes: str) -> None:
    """Write a file with other tensors or metadata, and a matching digest."""
    statistics_files.write(path, {"": one_state()})
    with statistics_files._safetensors().safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **changes}
    del metadata["sha256"]
    tensors = load_file(path) if tensors is None else tensors
    save_file(tensors, path, {**metadata, "sha256": statistics_files._digest(metadata, tensors)})


def test_metadata_and_tensors_that_do_not_match_are_refused(path) -> None:
    zeros = torch.zeros(3)
    forge(path)
    rk.load_statistics(path)
    for fault, changes in (
        ("decay='what', which is not JSON", {"decay": "what"}),
        ("decay={}, not a number for each layer", {"decay": "{}"}),
        ("decay=[1.0], not a number for each layer", {"decay": "[1.0]"}),
        ("progress=[]", {"progress": "[]"}),
        ("missing or unexpected: a.count, a.mean, a.scatter", {"decay": '{"": 1.0, "a": 1.0}'}),
        ("missing or unexpected: count", {"tensors": {"mean": zeros, "scatter": zeros + 1}}),
        ("missing or unexpected: other", {"tensors": {**load_file(path), "other": zeros}}),
    ):  # fmt: skip
        forge(path, **changes)
        assert_refused(path, fault)


def test_the_digest_covers_everything(path) -> None:
    """Metadata, shape, dtype and content of the tensors all change it."""
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


def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch) -> None:
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


def test_a_reader_keeps_the_old_file_during_a_write(path) -> None:
    """The file is replaced, not overwritten in place."""
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
