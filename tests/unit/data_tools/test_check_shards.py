"""Every damage of a shard folder is found and named."""

import io
import json
import shutil
import sqlite3
import tarfile

import pytest
from media_files import write_corpus

from data_tools import check_shards as tool
from data_tools.check_shards import check_folder
from data_tools.make_shards import make_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    write_corpus(root / "media", 6, seconds=0.5)
    make_shards(root / "media", root / "out", shard_samples=3)
    return root / "out"


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def test_intact_folder(folder, capsys):
    findings = check_folder(folder, decode=True)
    assert (findings.samples, findings.audio, findings.video, findings.text) == (6, 6, 6, 6)
    assert findings.damages == []
    assert tool.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["folder", "samples", "audio", "video", "text", "damages"]
    assert lines[1].split() == [str(folder), "6", "6", "6", "6", "0"]


def patch(path, change):
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)


def flip(raw):
    raw[raw.index(b"mdat") + 50] ^= 4


def swap(raw):
    """Exchange the first two samples."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        starts = [m.offset for m in tar if m.name.endswith(".mp4")]
    raw[: starts[2]] = raw[starts[1] : starts[2]] + raw[: starts[1]]


def test_flipped_byte(folder):
    patch(folder / "shard-000001.tar", flip)
    messages = [text for _, _, text in check_folder(folder).damages]
    assert any("wrong CRC32C" in m for m in messages)
    assert any("differs from manifest.json" in m for m in messages)
    assert tool.main([str(folder)]) == 1


def test_truncated_tar(folder):
    patch(folder / "shard-000000.tar", lambda raw: raw.__delitem__(slice(len(raw) // 2, None)))
    places = {place for _, place, _ in check_folder(folder).damages}
    assert {"size", "sha256", "samples"} <= places


def test_offsets_and_index(folder):
    patch(folder / "shard-000000.tar.idx", lambda raw: raw.__setitem__(slice(8, 16), bytes(8)))
    with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as database:
        database.execute("DELETE FROM samples WHERE rowid = 1")
    damages = {(shard, place) for shard, place, _ in check_folder(folder).damages}
    assert damages == {("shard-000000.tar.idx", "offsets"), ("index.sqlite", "index")}
    (folder / ".nv-meta" / "index.sqlite").write_bytes(b"no database, only bytes" * 50)
    assert any("unreadable" in text for _, _, text in check_folder(folder).damages)


def test_end_of_the_last_sample(folder):
    """Training takes it from the offsets, too."""
    patch(folder / "shard-000000.tar.idx", lambda raw: raw.__setitem__(slice(-8, None), bytes(8)))
    damages = [(shard, place) for shard, place, _ in check_folder(folder).damages]
    assert damages == [("shard-000000.tar.idx", "offsets")]


def test_signs_of_addresses_in_the_name_of_a_folder(folder):
    strange = folder.rename(folder.with_name("100%41 #1?"))
    assert check_folder(strange).damages == []


def test_order_of_rows(folder):
    patch(folder / "shard-000000.tar", swap)
    assert any("row number 0 after 1" in text for _, _, text in check_folder(folder).damages)


def test_key_in_two_shards(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000001.tar")
    assert any(
        "shard-000000.tar" in text and "also stands in" in text
        for _, _, text in check_folder(folder).damages
    )


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE samples SET byte_offset = byte_offset + 512 WHERE sample_index = 1",
        "UPDATE samples SET tar_file_id = 1 - tar_file_id",
        "UPDATE sample_parts SET content_byte_size = content_byte_size - 1 WHERE part_name = 'txt'",
        "UPDATE samples SET tar_file_id = 2 WHERE tar_file_id = 1",
        "DELETE FROM sample_parts WHERE part_name = 'json' AND sample_index = 0",
    ],
)
def test_places_in_the_index(folder, change):
    with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as database:
        database.execute(change)
    damages = check_folder(folder).damages
    assert [(shard, place) for shard, place, _ in damages] == [("index.sqlite", "index")]


def test_stray_tar(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000009.tar")
    damages = [(shard, place) for shard, place, _ in check_folder(folder).damages]
    assert damages == [("shard-000009.tar", "manifest")]


def test_clip_in_two_folders(made, folder, capsys):
    assert tool.main([str(made), str(folder)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "also stands in" in line]
    assert len(lines) == 6
    assert all(str(folder) in line and str(made) in line for line in lines)


def test_json_output_and_errors(folder, capsys):
    assert tool.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 6
    assert tool.main([str(folder.parent / "none")]) == 2
    assert "no such shard folder" in capsys.readouterr().err
