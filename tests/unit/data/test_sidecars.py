"""Side-cars on disk: what goes in comes out, and what is not one is refused."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mmssl.data.sidecars import LabelInfo, SideCar, Source, writing
from mmssl.types import UserError

SOURCE = Source("mfcc", 100.0, 0.0125)
ROWS = {
    "clip-b": np.array([[3], [1], [2]]),
    "clip": np.array([[0]]),
    "clip-a": np.zeros((0, 1), np.int64),
    "d": np.array([[255], [7]]),
}


def info(classes=(256,), **changes):
    return LabelInfo(**{"source": SOURCE, "classes": classes, "shards": "s" * 64, **changes})


def write(path, rows=ROWS, header=None):
    with writing(path, header or info()) as writer:
        for key, ids in rows.items():
            writer.add(key, ids, len(ids) / 100)
    return path


def broken_off(path):
    with writing(path, info()) as writer:
        writer.add("a", np.array([[1]]), 0.01)
        raise RuntimeError("stop")


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "deep" / "l.safetensors")


def test_round_trip(path):
    car = SideCar(path)
    assert list(car) == sorted(ROWS)
    assert (len(car), car.labels, car.empty) == (4, 6, 1)
    assert car.info == info()
    for key, ids in ROWS.items():
        assert key in car
        assert car.ids(key).tolist() == ids.tolist()
        assert car.seconds(key) == pytest.approx(len(ids) / 100)
    assert car.counts()[0][[0, 1, 2, 3, 7, 255]].tolist() == [1] * 6
    assert car.damage() == []


def test_plain_safetensors_reads_it(path):
    tensors = load_file(path)
    assert tensors["ids"].dtype == np.uint8
    assert tensors["ids"][:, 0].tolist() == [3, 1, 2, 0, 255, 7]
    assert bytes(tensors["keys"][: tensors["key_ends"][-1]]) == b"clipclip-aclip-bd"
    with safe_open(path, "np") as file:
        facts = json.loads(file.metadata()["info"])
    assert facts["source"]["rate_hz"] == 100.0
    assert (facts["classes"], facts["shards"]) == ([256], "s" * 64)


def test_a_look_up_copies_nothing(path):
    car = SideCar(path)
    assert np.shares_memory(car.ids("clip-b"), car._ids_NG)
    assert not car.ids("clip-b").flags.owndata
    assert not car.ids("clip-b").flags.writeable


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, np.uint8), (257, np.uint16), (65537, np.int32)]
)
def test_ids_take_the_smallest_integer(tmp_path, classes, dtype):
    path = write(tmp_path / "l", {"a": np.array([[classes - 1]])}, info((classes,)))
    assert load_file(path)["ids"].dtype == dtype
    assert SideCar(path).ids("a").tolist() == [[classes - 1]]


def test_several_codebooks(tmp_path):
    header = info((4, 300), codebooks=("x", "y"))
    path = write(tmp_path / "l", {"a": np.array([[3, 299], [0, 5]])}, header)
    car = SideCar(path)
    assert car.info.codebooks == ("x", "y")
    assert car.ids("a").tolist() == [[3, 299], [0, 5]]
    assert [int(c.sum()) for c in car.counts()] == [2, 2]


def test_many_keys_are_found(tmp_path):
    rng = np.random.default_rng(0)
    keys = [f"s{n}-{'x' * (n % 5)}-{n * 7}" for n in rng.permutation(500)]
    rows = {key: np.full((1, 1), i % 256) for i, key in enumerate(keys)}
    car = SideCar(write(tmp_path / "l", rows))
    assert all(int(car.ids(key)[0, 0]) == i % 256 for i, key in enumerate(keys))
    assert all(key not in car for key in ("", "a", "s1", "s500-", "zzz"))


def test_nothing_is_left_of_a_writer_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        broken_off(tmp_path / "l")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no sample was labelled"), writing(tmp_path / "l", info()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_keeps_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"):
        broken_off(path)
    assert path.read_bytes() == before


def test_the_same_labels_give_the_same_bytes(path, tmp_path):
    assert write(tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_writer_refuses_wrong_ids(tmp_path):
    with writing(tmp_path / "l", info((4,))) as writer:
        writer.add("a", np.array([[1]]), 0.01)
        for ids, message in (
            (np.array([[4]]), "outside the classes"),
            (np.array([[-1]]), "outside the classes"),
            (np.array([1]), "1 codebooks"),
            (np.array([[1, 1]]), "1 codebooks"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.add("b", ids, 0.01)
        with pytest.raises(ValueError, match="a: labelled twice"):
            writer.add("a", np.array([[1]]), 0.01)


def test_missing_sample(path):
    with pytest.raises(UserError, match=r"no labels of sample 'clip-c'; .*other shards"):
        SideCar(path).ids("clip-c")


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match=r"none: no such side-car; make one with"):
        SideCar(tmp_path / "none")
    bad = tmp_path / "bad"
    bad.write_bytes(b"some other file")
    with pytest.raises(UserError, match="not a side-car"):
        SideCar(bad)
    save_file({"ids": np.eye(2)}, bad)
    with pytest.raises(UserError, match="the format is None, this version reads"):
        SideCar(bad)
    save_file({"ids": np.eye(2)}, bad, {"format": "mmssl-labels-0"})
    with pytest.raises(UserError, match="'mmssl-labels-0', this version reads 'mmssl-labels-1'"):
        SideCar(bad)
    save_file({"ids": np.eye(2)}, bad, {"format": "mmssl-labels-1", "info": "{}", "crc32c": "{}"})
    with pytest.raises(UserError, match="a damaged side-car"):
        SideCar(bad)
    bad.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a side-car"):
        SideCar(bad)


def test_changed_bytes_are_noticed(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x09")
    assert SideCar(path).damage() == ["ids"]


def test_an_id_beyond_the_classes_is_noticed(path):
    header = path.read_bytes().replace(b'\\"classes\\":[256]', b'\\"classes\\":[006]')
    path.write_bytes(header.replace(b"[006]", b"[  6]"))
    with pytest.raises(UserError, match="id 255 in codebook 0 of 6 classes"):
        SideCar(path).counts()
