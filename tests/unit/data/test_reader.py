"""Reading by number: damage is marked, files stay few, the index is believed where it can be."""

import gc
import os
import shutil
import sqlite3
from contextlib import closing

import pytest

from mmssl.data import energon, reader
from mmssl.data.reader import ERROR, NOTE, REASON


def open_folder(folder, max_bytes=1 << 27):
    return energon.Shards(
        folder, energon.worker_config(0, 1, 0, 0), training=False, max_bytes=max_bytes
    ).reader()


@pytest.fixture
def folder(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "set")


def test_samples_by_number(shards):
    samples = open_folder(shards)
    assert len(samples) == 40
    read = [samples[n] for n in range(40)]
    assert len({sample["__key__"] for sample in read}) == 40
    assert [sample["__restore_key__"] for sample in read[:2]] == [
        ("Webdataset", 0),
        ("Webdataset", 1),
    ]
    assert all("json" in sample and ERROR not in sample and NOTE not in sample for sample in read)
    assert samples[39]["__shard__"] == "shard-000003.tar"
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            samples[outside]


def test_no_file_stays_open_behind_a_reader(shards):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        samples = open_folder(shards)
        assert all(ERROR not in samples[n] for n in range(0, 40, 10))
        del samples
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_few_files_are_open(shards, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    samples = open_folder(shards)
    for n in range(40):
        samples[n]
    assert len(samples._open) == 2


def test_large_samples_are_refused_before_reading(shards):
    sample = open_folder(shards, max_bytes=1000)[0]
    assert (sample[REASON], sample["__key__"]) == ("bomb", "#0")
    assert "exceed data.max_bytes = 1000" in sample[ERROR]


def test_unreadable_places_are_marked(folder):
    (folder / "shard-000001.tar.idx").unlink()
    (folder / "shard-000002.tar.idx").write_bytes(b"")
    samples = open_folder(folder)
    assert (samples[10][REASON], samples[20][REASON]) == ("tar", "index")
    assert "FileNotFoundError" in samples[10][ERROR]
    assert "json" in samples[30]


def change(folder, *statements):
    with closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as base:
        for statement in statements:
            base.execute(statement)
        base.commit()


def test_a_sample_at_the_place_of_another_is_refused(folder):
    """The index says so, and knows the place of the one that is found."""
    key = open_folder(folder)[3]["__key__"]
    change(
        folder,
        f"UPDATE samples SET sample_key = 'x' WHERE sample_key = '{key}'",
        f"UPDATE samples SET sample_key = '{key}' WHERE tar_file_id = 2 AND sample_index = 5",
    )
    samples = open_folder(folder)
    assert samples[3][REASON] == "key"
    assert NOTE in samples[25]  # its own place in the tar holds a key that no row names


def test_a_damaged_index_is_noted_once_per_shard(folder):
    change(folder, "DELETE FROM samples WHERE tar_file_id < 2")
    samples = open_folder(folder)
    notes = [NOTE in samples[n] for n in range(40)]
    assert [n for n, noted in enumerate(notes) if noted] == [0, 10]
