"""Killed builds: whatever they left, the rerun gives the bytes of an undisturbed build."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import hostile_work
import psutil
import pytest
from media_files import write_corpus
from shard_builds import bytes_of, command, killed, settled

from data_tools import engines, shard_rows
from data_tools import make_shards as tool
from data_tools.make_shards import make_shards
from mmssl.types import UserError

SIZE = {"shard_samples": 3}
ROWS = 11


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Clips of which one is broken and one another's twin, and the shards of them."""
    folder = tmp_path_factory.mktemp("corpus")
    manifest = write_corpus(folder, ROWS - 2)
    (folder / "broken.mp4").write_text("no media")
    lines = manifest.read_text().splitlines(keepends=True)
    lines.insert(4, '{"media": "broken.mp4"}\n')
    manifest.write_text("".join([*lines, lines[0]]))
    make_shards(folder, folder.parent / "whole", **SIZE)
    return folder


@pytest.fixture
def whole(corpus):
    return bytes_of(corpus.parent / "whole")


@pytest.fixture
def stopped(corpus, tmp_path, monkeypatch):
    """The folder of a build that was interrupted before it built its index."""
    with monkeypatch.context() as patch:
        patch.setattr(tool, "build_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_shards(corpus, tmp_path / "out", **SIZE)
    assert not (tmp_path / "out").exists()
    return tmp_path / ".out.partial"


@pytest.fixture
def prepared(monkeypatch):
    """Sources of the rows that were prepared."""
    seen = []

    def local(rows, options):
        for row in rows:
            seen.append(row.index)
            yield shard_rows.prepare(row, options)

    monkeypatch.setitem(engines.ENGINES, "local", local)
    return seen


def test_the_corpus_is_settled_once(whole, corpus):
    lines = (corpus.parent / "whole" / "quarantine.jsonl").read_text().splitlines()
    assert [(x["index"], x["reason"]) for x in map(json.loads, lines)] == [
        (4, "header"),
        (ROWS - 1, "duplicate"),
    ]
    assert len([name for name in whole if name.endswith(".tar")]) == 3


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_kill_left(corpus, whole, stopped, prepared, seed):
    """The journal ends anywhere, the tar of its last lines anywhere behind them."""
    random_ = random.Random(seed)
    journal = stopped / ".journal.jsonl"
    data = journal.read_bytes()
    head = data.index(b"\n") + 1
    cut = random_.randrange(head, len(data))
    journal.write_bytes(data[:cut])
    tars = sorted(stopped.glob("*.tar"))
    with tars[-1].open("ab") as file:
        file.write(random_.randbytes(random_.randrange(3000)))
    make_shards(corpus, stopped.with_name("out"), **SIZE)
    assert bytes_of(stopped.with_name("out")) == whole
    done = sum(b'"shard":' not in line for line in data[:cut].split(b"\n")[1:-1])
    assert prepared == list(range(done, ROWS))
    assert not stopped.exists()


def test_a_power_failure_may_cost_bytes_of_the_open_tar(corpus, whole, stopped, prepared):
    """Its entries reached the disk before its bytes: the sample is made again."""
    journal = stopped / ".journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(k for k, line in enumerate(lines) if b'"shard":' in line)
    journal.write_bytes(b"".join(lines[:last]))
    tar = sorted(stopped.glob("*.tar"))[-1]
    data = bytearray(tar.read_bytes())
    size = json.loads(next(x for x in lines[:last][::-1] if b'"key"' in x))["size"]
    end = sum(json.loads(x).get("size", 0) for x in lines[last - 4 : last] if b'"key"' in x)
    data[end - size : end] = bytes(size)
    tar.write_bytes(data)
    make_shards(corpus, stopped.with_name("out"), **SIZE)
    assert bytes_of(stopped.with_name("out")) == whole
    assert len(prepared) in (1, 2, 3)


def test_a_torn_first_line_begins_anew(corpus, whole, stopped, prepared):
    (stopped / ".journal.jsonl").write_bytes(b'{"build":"12')
    make_shards(corpus, stopped.with_name("out"), **SIZE)
    assert bytes_of(stopped.with_name("out")) == whole
    assert prepared == list(range(ROWS))


def test_another_build_is_refused_or_dropped(corpus, whole, stopped):
    out = stopped.with_name("out")
    with pytest.raises(UserError, match=r"unfinished build of other rows, files or options"):
        make_shards(corpus, out, shard_samples=4)
    (sorted(stopped.glob("*.tar"))[0]).write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000000.tar: changed or gone; remove"):
        make_shards(corpus, out, **SIZE)
    make_shards(corpus, out, shard_samples=4, overwrite=True)
    assert len(list(out.glob("*.tar"))) == 3
    assert not stopped.exists()


def test_a_changed_file_is_noticed(corpus, stopped):
    clip = corpus / "clip003.mp4"
    before = clip.stat()
    try:
        clip.touch()
        with pytest.raises(UserError, match="other rows, files"):
            make_shards(corpus, stopped.with_name("out"), **SIZE)
    finally:
        os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_builds_of_one_folder(corpus, stopped):
    from data_tools.journal import JOURNAL, Journal

    digest = json.loads((stopped / JOURNAL).read_text().partition("\n")[0])["build"]
    held = Journal(stopped, digest, False)
    with pytest.raises(UserError, match="another process makes these shards"):
        make_shards(corpus, stopped.with_name("out"), **SIZE)
    held.close()
    assert (stopped / JOURNAL).exists()


def test_finished_parts_are_not_made_again(corpus, prepared, tmp_path, whole):
    """Killed just after the folder got its name, the journal is still in it."""
    shutil.copytree(corpus.parent / "whole", tmp_path / "out")
    (tmp_path / "out" / ".journal.jsonl").write_text("left\n")
    (tmp_path / ".out.old").mkdir()
    (report,) = make_shards(corpus, tmp_path / "out", **SIZE)
    assert (report.unchanged, report.samples, report.quarantined) == (True, ROWS - 2, 2)
    assert prepared == []
    assert bytes_of(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_sigkill(corpus, whole, tmp_path):
    """Three kills of real processes, at work and at the end, with another number of workers."""
    out = tmp_path / "out"
    for workers, rows in (("1", 1), ("2", 5), ("2", ROWS)):
        words = command(corpus, out, "--shard-samples", "3", "--workers", workers)
        assert killed(words, lambda _, rows=rows: settled(out) >= rows)
        assert not out.exists()
    make_shards(corpus, out, workers=2, **SIZE)
    assert bytes_of(out) == whole


def test_sigterm(corpus, whole, tmp_path):
    """Ends as Ctrl-C does: with a word, and no process is left."""
    words = command(corpus, tmp_path / "out", "--shard-samples", "3", "--workers", "2")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as process:
        while settled(tmp_path / "out") < 1 and process.poll() is None:
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.communicate()[1] == "interrupted; the same command goes on\n"
    assert process.returncode == 130
    assert workers
    assert psutil.wait_procs(workers, 10)[1] == []
    make_shards(corpus, tmp_path / "out", workers=2, **SIZE)
    assert bytes_of(tmp_path / "out") == whole


def test_full_disk(corpus, whole, tmp_path, monkeypatch):
    """The error names the folder; with room again the same command goes on."""
    from data_tools.shard_writer import ShardWriter

    add = ShardWriter.add

    def failing(writer, made):
        if made.row.index == 5:
            raise OSError(28, "No space left on device")
        add(writer, made)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", failing)
        with pytest.raises(UserError, match=r"\.out\.partial: No space left .* it goes on"):
            make_shards(corpus, tmp_path / "out", **SIZE)
    make_shards(corpus, tmp_path / "out", **SIZE)
    assert bytes_of(tmp_path / "out") == whole


# --- fatal rows and too many bad ones


def rows(folder, *sources):
    write_corpus(folder, len(sources))
    lines = [json.dumps({"media": f"clip{k:03d}.mp4", "source": s}) for k, s in enumerate(sources)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def test_rows_that_end_their_process_are_quarantined(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "prepare", hostile_work.prepare_or_crash)
    manifest = rows(tmp_path / "media", "good", "crash", "hang", "eat", "good too")
    manifest.write_text(manifest.read_text() + '\n{"media": "/dev/zero", "source": "endless"}')
    (report,) = make_shards(manifest, tmp_path / "out", workers=2, row_seconds=2.0, row_mb=300)
    assert 40 < report.worker_mb < 300  # Python with PyAV, and what rows took
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [(x["index"], x["reason"]) for x in map(json.loads, lines)] == [
        (1, "crash"),
        (2, "timeout"),
        (3, "memory"),
        (5, "memory"),
    ]
    assert json.loads(lines[1])["message"].endswith("clip002.mp4: not done within 2 s")


def test_error_budget(corpus, tmp_path, whole):
    """The twin is no error; the broken one is 1 in 1000."""
    (report,) = make_shards(corpus, tmp_path / "out", max_bad_share=0.001, **SIZE)
    assert report.quarantined == 2
    with pytest.raises(UserError, match=r"1 of the last 5 rows were bad, .*share = 0 of 1000"):
        make_shards(corpus, tmp_path / "strict", max_bad_share=0.0, **SIZE)
    assert not (tmp_path / "strict").exists()
    make_shards(corpus, tmp_path / "strict", **SIZE)  # goes on, see `prepared` above
    assert bytes_of(tmp_path / "strict") == whole
