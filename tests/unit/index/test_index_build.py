"""mmssl embed and mmssl index build: the same rows whoever makes them and however often."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from embed_runs import run_folder
from index_runs import embedded, png, rows_of
from launching import TEST_LIMIT_S, settings_of
from media_files import moving_frames, tone, write_media
from PIL import Image

from mmssl.index import build, search, store, vectors
from mmssl.index.store import Index
from mmssl.types import UserError


def test_a_row_for_every_window_and_space(place):
    """Ten clips of one second; each kind of clip lacks one modality (write_corpus)."""
    rows = list(rows_of(place.library).values())
    count = {key: 0 for key in [("av", "audio"), ("av", "video")]}
    for row in rows:
        key = row["space"], row["modality"]
        count[key] = count.get(key, 0) + 1
    assert count == {
        **{("av", "audio"): 8, ("avt", "audio"): 8, ("avt", "text"): 8},
        **{("av", "video"): 7, ("avt", "video"): 7},
    }
    clip = next(r for r in rows if r["source"] == "source 0" and r["modality"] == "video")
    assert {r["model"] for r in rows} == {place.model.hash}
    assert (clip["start_s"], clip["end_s"], clip["duration_s"]) == (0, 1, 1)
    assert clip["caption"] == "0 dogs"
    assert clip["meta"] == ["number=0"]
    assert clip["shard"].endswith(".tar")
    with Image.open(io.BytesIO(clip["thumbnail"])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (16, 16))


def test_vectors_are_those_of_the_interface(place):
    for row in rows_of(place.library).values():
        number = int(row["caption"].split()[0]) if row["caption"] else None
        if row["modality"] == "text" and row["space"] == "avt":
            vector = place.model.encode(row["caption"], space="avt")
        elif row["modality"] == "video" and number is not None and row["space"] == "av":
            file = place.folder / "media" / f"clip{number:03d}.mp4"
            vector = place.model.encode({"video": file}, space="av")
        else:
            continue
        np.testing.assert_allclose(row["vector"], vector, atol=1e-5)


def test_windows_of_a_long_file_and_their_pictures(place, made, tmp_path):
    (tmp_path / "media").mkdir()
    film = write_media(moving_frames(30, seed=3), tone(3.0, 16000), fps=10)
    (tmp_path / "media" / "long.mp4").write_bytes(film)
    (tmp_path / "media" / "long.txt").write_text("rain falls")
    rows = made(tmp_path / "media", tmp_path / "out", "spaces=avt").values()
    spans = sorted((r["modality"], r["start_s"]) for r in rows)
    windows = [(m, float(start)) for m in ("audio", "video") for start in range(3)]
    assert spans == sorted([*windows, ("text", 0.0)])
    pictures = {(r["modality"], r["start_s"]): r["thumbnail"] for r in rows}
    assert pictures["audio", 1.0] == pictures["video", 1.0] != pictures["video", 0.0]
    assert {r["caption"] for r in rows} == {"rain falls"}


# ---------------------------------------------------------------- several processes, kills


def test_two_processes_write_what_one_does(place, monkeypatch, tmp_path):
    words = [f"model={place.folder}/run", f"out={tmp_path}/both"]
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        vectors.main(str(place.folder / "shards"), words)
        shares.append(len(embedded(tmp_path / "both")))
    monkeypatch.undo()
    assert 0 < shares[0] < shares[1]
    build.main("build", str(tmp_path / "both"), [f"out={tmp_path}/library"])
    assert rows_of(tmp_path / "library") == rows_of(place.library)  # to the last bit


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize(
    ("where", "name", "after"),
    [
        (vectors._Maker, "write", 1),  # one file of three is there
        (build, "_merge", 7),  # within the rows of the second file
        (Index, "save", 2),  # the rows of the second file are in, but nobody knows
        (store, "moments", 0),
    ],
)
def test_what_was_killed_is_completed(place, monkeypatch, tmp_path, where, name, after):
    left, whole = [after], getattr(where, name)

    def dies(*args, **kwargs):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return whole(*args, **kwargs)

    words = [f"model={place.folder}/run", f"out={tmp_path}/library"]
    monkeypatch.setattr(where, name, dies)
    with pytest.raises(Killed):
        build.main("build", str(place.folder / "shards"), words)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"unfinished; .* same mmssl index build|no index"):
        search.main(f"{tmp_path}/library", ["a dog"])
    build.main("build", str(place.folder / "shards"), words)
    assert rows_of(tmp_path / "library") == rows_of(place.library)
    old, new = (np.load(f / store.MOMENTS) for f in (place.library, tmp_path / "library"))
    assert all(np.allclose(old[n], new[n], atol=1e-12) for n in old)


@pytest.mark.timeout(TEST_LIMIT_S)
def test_only_what_a_killed_process_lacks_is_made_again(place, tmp_path, capsys):
    shards, out = place.folder / "shards", tmp_path / "vectors"
    words = [str(shards), f"model={place.folder}/run", f"out={out}", "batch_size=1"]
    command = [sys.executable, "-m", "mmssl.cli", "embed", *words]
    with subprocess.Popen(command, env=settings_of()) as process:
        while process.poll() is None and not list(out.glob("*.parquet")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    capsys.readouterr()
    vectors.main(words[0], words[1:])
    rows = embedded(out)
    made = len(rows) - sum(len(vectors.parquet().read_table(out / n)) for n in before)
    assert f"{made} new rows" in capsys.readouterr().out
    assert all((out / n).stat().st_mtime_ns == stamp for n, stamp in before.items())
    build.main("build", str(out), [f"out={tmp_path}/library"])
    assert rows_of(tmp_path / "library").keys() == rows_of(place.library).keys()


# ---------------------------------------------------------------- what is refused


def test_models_are_never_mixed(place, monkeypatch, tmp_path):
    run_folder(tmp_path / "other", "avt/mmv_fac")
    shards, library = str(place.folder / "shards"), place.library
    with pytest.raises(UserError, match=r"vectors of another model .* never mixed"):
        build.main("build", shards, [f"model={tmp_path}/other", f"out={library}"])
    vectors.main(shards, [f"model={tmp_path}/other", f"out={tmp_path}/vectors"])
    with pytest.raises(UserError, match="never mixed: name another out="):
        build.main("build", str(tmp_path / "vectors"), [f"out={library}"])
    with monkeypatch.context() as patched:  # nor when the first of them left but a table
        merge = build._merge
        patched.setattr(build, "_merge", lambda *args: (merge(*args), _die()))
        with pytest.raises(Killed):
            build.main("build", str(library / "vectors"), [f"out={tmp_path}/killed"])
    with pytest.raises(UserError, match="never mixed: name another out="):
        build.main("build", str(tmp_path / "vectors"), [f"out={tmp_path}/killed"])


def _die():
    raise Killed


def test_other_settings_are_refused(place):
    words = [f"model={place.folder}/run", f"out={place.library}", "window_s=0.5"]
    with pytest.raises(UserError, match=r"was made with .*'window_s': 0, .*choose another folder"):
        build.main("build", str(place.folder / "shards"), words)


def test_what_cannot_be_read_is_counted(place, made, tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    (media / "bad.mp4").write_bytes(b"no video at all")
    film = write_media(moving_frames(10, seed=3), tone(1.0, 16000), fps=10)
    cut = len(film) // 2
    (media / "half.mp4").write_bytes(film[:cut] + bytes(len(film) - cut))
    (media / "bad.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"nothing could be read; .*cannot be"):
        made(media, tmp_path / "none")
    (media / "good.mp4").write_bytes(film)
    rows = made(media, tmp_path / "library")
    assert {r["key"] for r in rows.values()} == {"good.mp4"}
    assert "3 items could not be read" in capsys.readouterr().out
    facts = next(iter(vectors.read_facts(tmp_path / "library" / "vectors").values()))
    assert [key for key, _ in facts.skipped] == ["bad.mp4", "bad.png", "half.mp4"]


def test_odd_files_are_counted_and_stop_nothing(place, made, tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    whole = png()
    flipped = bytearray(whole)
    flipped[whole.index(b"IDAT") + 1] ^= 0x20  # an unknown kind of chunk
    length = bytearray(whole)
    length[8] ^= 0x40  # of the first chunk, 13 bytes
    for name, data in (("flipped", flipped), ("length", length)):
        (media / f"{name}.png").write_bytes(data)
    Image.new("1", (20000, 20000)).save(media / "huge.png")
    (media / "dangling.png").symlink_to("nowhere.png")
    (media / os.fsdecode(b"caf\xe9.png")).write_bytes(whole)
    long = "a" * 228 + ".png"
    (media / long).write_bytes(whole)
    for _ in range(2):  # the second time nothing is left to be done
        rows = made(media, tmp_path / "library")
    assert {r["key"] for r in rows.values()} == {long}
    told = capsys.readouterr().out
    assert "5 items could not be read" in told
    assert "0 new rows, 0 items" in told
    facts = next(iter(vectors.read_facts(tmp_path / "library" / "vectors").values()))
    reasons = dict(facts.skipped)
    assert reasons.keys() == {
        "caf\\xe9.png",
        "dangling.png",
        "flipped.png",
        "huge.png",
        "length.png",
    }
    assert "decompression bomb" in reasons["huge.png"]
    assert "not UTF-8" in reasons["caf\\xe9.png"]
    assert "link to nothing" in reasons["dangling.png"]


def test_an_index_is_built_by_one_process(place, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"one process; share `mmssl embed"):
        build.main("build", str(place.folder / "shards"), [f"out={place.library}"])


@pytest.mark.parametrize(
    ("env", "device"),
    [
        ({}, "cuda:0"),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, "cuda:3"),
        ({"SLURM_LOCALID": "2"}, "cuda:2"),
        ({"SLURM_LOCALID": "5"}, "cuda:1"),
    ],
)
def test_every_process_of_a_node_has_its_device(monkeypatch, env, device):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(vectors.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vectors.torch.cuda, "device_count", lambda: 4)
    assert vectors._device() == device


def test_a_second_builder_is_told_to_wait(place):
    with (
        build.FileLock(place.library / ".lock"),
        pytest.raises(UserError, match="another process builds this index"),
    ):
        build.main("build", str(place.folder / "shards"), [f"out={place.library}"])


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("nowhere", ["model=run"], "no such folder"),
        ("empty", ["model=run"], "neither shards nor media"),
        ("shards", ["model=none"], "none"),
        ("shards", [], "model=RUN is needed"),
        ("shards", ["model=run", "spaces=xy"], "spaces: no 'xy'; tiny has av"),
        ("shards", ["model=run", "whic=x"], "did you mean `which"),
    ],
)
def test_wrong_words(place, tmp_path, monkeypatch, data, words, message):
    monkeypatch.chdir(place.folder)
    (place.folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        build.main("build", data, [*words, f"out={tmp_path}/out"])


def test_damaged_files_are_named(place, tmp_path):
    shutil.copytree(place.library, tmp_path / "library")
    (tmp_path / "library" / store.RECORD).write_text("{}")
    with pytest.raises(UserError, match=r"index.json: damaged"):
        Index.open(tmp_path / "library")
    (tmp_path / "library" / store.RECORD).write_text('{"version": 99}')
    with pytest.raises(UserError, match="written in version 99"):
        Index.open(tmp_path / "library")
    shutil.copy(place.library / store.RECORD, tmp_path / "library")
    (tmp_path / "library" / store.MOMENTS).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"moments.npz: missing or damaged .* remove it and run"):
        search.main(f"{tmp_path}/library", ["a dog"])
    (tmp_path / "library" / store.MOMENTS).unlink()
    build.main("build", str(place.library / "vectors"), [f"out={tmp_path}/library"])
    assert (tmp_path / "library" / store.MOMENTS).is_file()
    file = next((tmp_path / "library" / "vectors").glob("*.parquet"))
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"damaged one .* remove it"):
        vectors.read_facts(file.parent)
