"""Programs that fail in every way cost their clip only; answers survive a kill at any byte."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import tone, write_media

from data_tools import transcribe as tool
from data_tools.caption_program import ClipError, check_answer
from data_tools.make_shards import make_shards
from data_tools.manifest import as_tree, find_manifests, read_rows
from data_tools.manifest.row import parse
from data_tools.transcode import Encoding
from data_tools.transcribe import Options, transcribe
from mmssl.types import UserError

# answers by the name of the clip; writes down what it was asked
PROGRAM = r"""
import json, os, signal, sys, time
log, delay = sys.argv[1], float(sys.argv[2])
for line in sys.stdin:
    asked = json.loads(line)
    name = os.path.basename(asked["media"]).split(".")[0]
    kind = name.split("-")[0]
    with open(log, "a") as file:
        file.write(name + "\n")
    first = open(log).read().split().count(name) == 1
    time.sleep(delay * (hash(name) % 5))
    answer = {"id": asked["id"], "caption": "about " + name, "language": "en"}
    text = json.dumps(answer) + "\n"
    if kind == "dies":
        print("boom", file=sys.stderr)
        sys.exit(3)
    elif kind == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "hangs":
        time.sleep(600)
    elif kind == "closes":
        os.close(1)
        time.sleep(600)
    elif kind == "swaps":
        text = json.dumps(answer | {"id": asked["id"] + 1}) + "\n"
    elif kind == "chatters":
        text = text + "done\n"
    elif kind == "mumbles":
        text = "loading...\n"
    elif kind == "forgets":
        text = json.dumps({"caption": "whose?"}) + "\n"
    elif kind == "invents":
        text = json.dumps(answer | {"colour": "red"}) + "\n"
    elif kind == "backwards":
        text = json.dumps({"id": asked["id"], "words": [[2.0, 1.0, "no"]]}) + "\n"
    elif kind == "refuses":
        text = json.dumps({"id": asked["id"], "error": "too dark"}) + "\n"
    elif kind == "flaky" and first:
        sys.exit(1)
    elif kind == "speaks":
        words = [[1.5, 1.75, "hey"], [2, 2.5, "you"]]
        text = json.dumps({"id": asked["id"], "words": words, "transcript": " hey you"}) + "\n"
    elif kind == "silent":
        text = json.dumps({"id": asked["id"]}) + "\n"
    elif kind == "noisy":
        sys.stderr.write("x" * 300_000)
    sys.stdout.write(text)
    sys.stdout.flush()
"""


@pytest.fixture
def program(tmp_path):
    """The words that start it, after which its own file of questions comes."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, "-SE", str(path), str(tmp_path / "asked.txt"), "0"]


def _manifest(path, names, **more):
    rows = ({"media": f"clips/{name}.mp4", **more} for name in names)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _asked(tmp_path):
    path = tmp_path / "asked.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


FAILURES = {
    "dies": ("died", "ended with 3; it said: boom"),
    "crashes": ("died", "was ended by SIGSEGV"),
    "hangs": ("hung", "no answer within 0.5 s"),
    "closes": ("died", "closed its output"),
    "swaps": ("order", "asked for 5, answered"),
    "chatters": ("order", "more than one line"),
    "mumbles": ("nonsense", "not a line of JSON: 'loading...'"),
    "forgets": ("nonsense", "no JSON object with the clip's id"),
    "invents": ("nonsense", "colour: "),
    "backwards": ("nonsense", "words: "),
    "refuses": ("refused", "too dark"),
}


def test_every_failure_costs_its_clip_alone(program, tmp_path):
    names = [n for k, kind in enumerate(FAILURES) for n in (kind, f"fine-{k}")]
    names[0:0] = ["flaky"]  # rows 1, 3, 5 ... fail
    names = [*names, "silent", "noisy"]
    manifest = _manifest(tmp_path / "m.jsonl", names)
    made = transcribe(manifest, tmp_path / "out.jsonl", program, Options(seconds=0.5))
    listed = _lines(tmp_path / "out.quarantine.jsonl")
    assert [line["media"] for line in listed] == [f"clips/{kind}.mp4" for kind in FAILURES]
    for line, (kind, (reason, message)) in zip(listed, FAILURES.items(), strict=True):
        assert line["reason"] == reason, kind
        assert message.replace("5,", f"{names.index(kind)},") in line["message"]
        assert line["row"] == f"{manifest}:{names.index(kind) + 1}"
    assert made.failed == {"died": 3, "hung": 1, "nonsense": 4, "order": 2, "refused": 1}
    rows = _lines(tmp_path / "out.jsonl")
    assert [row["media"] for row in rows] == [f"clips/{name}.mp4" for name in names]
    answered = {name for name, row in zip(names, rows, strict=True) if "captions" in row}
    assert answered == {n for n in names if n not in FAILURES} - {"silent"}
    counts = _counted(_asked(tmp_path))
    # a second time in a new process, but for what the program itself declines
    assert counts == {n: 2 if n in {*FAILURES, "flaky"} - {"refuses"} else 1 for n in names}


def _counted(names):
    return {name: names.count(name) for name in names}


def test_what_is_merged(program, tmp_path):
    manifest = tmp_path / "in" / "m.jsonl"
    rows = [
        {"media": "a.mp4", "captions": ["one", "about a"], "language": "de", "meta": {"k": [1]}},
        {"media": "speaks.mp4", "start": 1.0, "end": 3.0, "source": "tape", "split": "train"},
        {"captions": ["words alone"], "licence": "CC0"},
        {"media": "b.mp4", "has": ["audio"]},
        {"media": "c.mp4", "has": ["video"], "caption": "not to be used"},
    ]
    manifest.parent.mkdir()
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "deep" / "er" / "out.jsonl"
    transcribe(manifest, out, program)
    found = _lines(out)
    assert found[0] == rows[0] | {"media": str(manifest.parent / "a.mp4"), "source": "a"}
    assert found[1] == rows[1] | {
        "media": str(manifest.parent / "speaks.mp4"),
        "transcript": {"text": "hey you", "words": [[1.5, 1.75, "hey"], [2, 2.5, "you"]]},
    }
    assert found[2] == rows[2] | {"source": "row2"}
    assert (found[3]["captions"], found[3]["language"]) == (["about b"], "en")
    assert [row.get("has") for row in found[3:]] == [["audio", "text"], ["video"]]
    assert _asked(tmp_path) == ["a", "speaks", "b", "c"]


ECHO = r"""
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({"id": asked.pop("id"), "caption": json.dumps(asked)}), flush=True)
"""


def test_what_is_asked_of_media_of_every_kind(tmp_path):
    """Addresses as they are, paths whole, sounds of their own and lists of pictures."""
    stills = ["0.jpg", "s3://bucket/1.jpg"]
    rows = [
        {"media": "sub/../a.mp4", "start": 1.5, "end": 3},
        {"media": "s3://bucket/a b.mp4"},
        {"media": "a.mp4", "sound": "s3://bucket/a.wav"},
        {"media": stills, "sound": "a.wav"},
    ]
    files = fsspec.filesystem("memory")
    files.pipe("/asked/m.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "m.jsonl").write_bytes(files.cat("/asked/m.jsonl"))
    cut, whole = {"start": 1.5, "end": 3.0}, {"start": 0.0, "end": None}
    for place, base in ((tmp_path, f"{tmp_path}/"), ("memory://asked", "memory://asked/")):
        out = tmp_path / "out" / "out.jsonl"
        transcribe(place, out, [sys.executable, "-c", ECHO])
        first = f"{base}a.mp4" if place == tmp_path else f"{base}sub/../a.mp4"
        assert [json.loads(row.captions[0]) for row in read_rows(out)] == [
            {"media": first, **cut},
            {"media": "s3://bucket/a b.mp4", **whole},
            {"media": f"{base}a.mp4", "sound": "s3://bucket/a.wav", **whole},
            {"media": [f"{base}0.jpg", stills[1]], "sound": f"{base}a.wav", **whole},
        ]
        lists = (list(read_rows(path)) for path in (*find_manifests(place), out))
        before, after = ([str(row.media).replace("sub/../", "") for row in rows] for rows in lists)
        assert after == [media.replace("sub/../", "") for media in before]
        shutil.rmtree(out.parent)
    files.rm("/asked", recursive=True)


def test_what_was_said_arrives_in_shards(program, tmp_path):
    """On the clock of each clip; text without times is that of the whole of it."""
    (tmp_path / "clips").mkdir()
    wave = write_media(None, tone(4.0, 8000), container="wav", rate=8000, audio_codec="pcm_s16le")
    for name in ("speaks", "speaks-2", "fine"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(wave)
    manifest = _manifest(tmp_path / "m.jsonl", ["speaks", "fine"], has=["audio"])
    with manifest.open("a") as file:
        file.write('{"media": "clips/speaks-2.mp4", "start": 1.0, "end": 2.2}\n')
    out = tmp_path / "out.jsonl"
    transcribe(manifest, out, program)
    make_shards(out, tmp_path / "shards", reencode=Encoding.parse("audio=flac"))
    said = {}
    for path in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    said[record["source"]] = record.get("transcript"), record["has"]
    whole = {"text": "hey you", "words": [[1.5, 1.75, "hey"], [2.0, 2.5, "you"]]}
    assert said == {
        "speaks": (whole, ["audio", "text"]),
        "fine": (None, ["audio", "text"]),
        "speaks-2": ({"text": "hey", "words": [[0.5, 0.75, "hey"]]}, ["audio", "text"]),
    }


def test_the_new_manifest_reads_as_the_old_one(program, tmp_path):
    """Of a folder with a name that is no UTF-8, too."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for name in (b"sub/silent-caf\xe9.mp4", "猫.wav".encode(), b"x y.flac"):
        with open(os.fsencode(folder) + b"/" + name, "wb"):
            pass
    out = tmp_path / "out.jsonl"
    transcribe(folder, out, program)
    before, after = list(read_rows(folder)), list(read_rows(out))
    assert [r.media for r in after] == [r.media for r in before]
    assert [r.source for r in after] == [r.source for r in before]
    assert [len(r.captions) for r in after] == [0, 1, 1]


def test_workers_change_no_byte(program, tmp_path):
    names = [f"fine-{k}" for k in range(24)] + ["dies"]
    manifest = _manifest(tmp_path / "m.jsonl", names)
    program[-1] = "0.005"
    for workers in (1, 4):
        out = tmp_path / f"{workers}" / "out.jsonl"
        transcribe(manifest, out, program, Options(workers=workers))
    for name in ("out.jsonl", "out.quarantine.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()


def test_cut_off_at_any_byte(program, tmp_path):
    """Only clips whose line is not whole are asked again, and the end is the same."""
    names = [f"fine-{k}" for k in range(8)] + ["refuses"]
    manifest = _manifest(tmp_path / "m.jsonl", names)
    out = tmp_path / "out.jsonl"
    transcribe(manifest, out, program)
    answers = out.with_name("out.jsonl.answers")
    whole, wanted = answers.read_bytes(), out.read_bytes()
    head = whole.index(b"\n") + 1
    cuts = random.Random(0).sample(range(head, len(whole)), 12)
    for cut in [0, 7, head - 1, head, len(whole) - 1, len(whole), *cuts]:
        _asked(tmp_path)
        out.unlink()
        answers.write_bytes(whole[:cut])
        transcribe(manifest, out, program)
        assert out.read_bytes() == wanted
        assert _asked(tmp_path) == names[max(0, whole[:cut].count(b"\n") - 1) :]
        assert answers.read_bytes() == whole


def test_killed(program, tmp_path):
    """A process that is killed leaves no OUT; what it had kept is not asked again."""
    names = [f"fine-{k}" for k in range(30)]
    manifest = _manifest(tmp_path / "m.jsonl", names)
    out = tmp_path / "out.jsonl"
    program[-1] = "0.02"
    words = ["--workers", "2", "--command", " ".join(program)]
    command = [sys.executable, "-m", "data_tools.transcribe", str(manifest), str(out), *words]
    answers = out.with_name("out.jsonl.answers")
    process = subprocess.Popen(command)
    while not answers.exists() or answers.read_bytes().count(b"\n") < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {line["row"] for line in _lines(answers)[1:]}
    time.sleep(0.2)  # the programs see the end of their input
    _asked(tmp_path)
    assert tool.main(command[3:]) == 0
    assert sorted(_asked(tmp_path)) == sorted(n for k, n in enumerate(names) if k not in kept)
    assert [row["captions"][0] for row in _lines(out)] == [f"about {name}" for name in names]


def test_retry_asks_for_failed_clips_alone(program, tmp_path):
    manifest = _manifest(tmp_path / "m.jsonl", ["a", "dies", "b"])
    out = tmp_path / "out.jsonl"
    words = [str(manifest), str(out), "--command", " ".join(program)]
    assert tool.main(words) == 1
    before = out.read_bytes()
    _asked(tmp_path)
    assert tool.main(words) == 1
    assert _asked(tmp_path) == []
    assert out.read_bytes() == before
    (tmp_path / "program.py").write_text(PROGRAM.replace('"dies"', '"nobody"'))
    assert tool.main([*words, "--retry"]) == 0
    assert _asked(tmp_path) == ["dies"]
    assert [row["captions"][0] for row in _lines(out)] == ["about a", "about dies", "about b"]
    assert not out.with_name("out.quarantine.jsonl").exists()


def test_answers_of_another_run_are_refused(program, tmp_path):
    manifest = _manifest(tmp_path / "m.jsonl", ["a", "b"])
    out = tmp_path / "out.jsonl"
    transcribe(manifest, out, program)
    with pytest.raises(UserError, match="answers of another manifest, command or model"):
        transcribe(manifest, out, [*program, "more"])
    with pytest.raises(UserError, match="answers of another manifest"):
        transcribe(_manifest(manifest, ["a", "c"]), out, program)
    transcribe(_manifest(manifest, ["a", "b"], caption="corrected"), out, program)
    assert _lines(out)[1]["captions"] == ["corrected", "about b"]
    answers = out.with_name("out.jsonl.answers")
    answers.write_bytes(answers.read_bytes().replace(b'"row": 0', b'"row": x'))
    with pytest.raises(UserError, match=r"out.jsonl.answers:2: damaged"):
        transcribe(manifest, out, program)
    with answers.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            transcribe(manifest, out, program)


def test_a_broken_program_stops_the_run(program, tmp_path):
    """After some failures in a row; what hangs in another worker is not waited for."""
    manifest = _manifest(tmp_path / "m.jsonl", ["hangs", *(f"dies-{k}" for k in range(9))])
    out, begun = tmp_path / "out.jsonl", time.monotonic()
    with pytest.raises(UserError, match=r"failed 4 times in a row, the last time on .*dies-1"):
        transcribe(manifest, out, program, Options(workers=2, restarts=3))
    assert time.monotonic() - begun < 10
    assert not out.exists()
    assert _counted(_asked(tmp_path)) == {"hangs": 1, "dies-0": 2, "dies-1": 2}


def test_a_program_that_fails_at_every_other_clip_is_broken_too(program, tmp_path):
    """It answers at the second attempt each time, but never at the first."""
    manifest = _manifest(tmp_path / "m.jsonl", [f"flaky-{k}" for k in range(9)])
    with pytest.raises(UserError, match="failed 4 times in a row"):
        transcribe(manifest, tmp_path / "out.jsonl", program, Options(restarts=3))


def test_no_shell(tmp_path):
    script = tmp_path / "args.py"
    script.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    text = ' '.join(sys.argv[1:] + [os.environ['WORKER']])\n"
        "    print(json.dumps({'id': json.loads(line)['id'], 'caption': text}), flush=True)\n"
    )
    manifest = _manifest(tmp_path / "m.jsonl", ["a"])
    out = tmp_path / "out.jsonl"
    command = f"{sys.executable} {script} '$HOME; echo' *"
    assert tool.main([str(manifest), str(out), "--command", command]) == 0
    assert _lines(out)[0]["captions"][0] == "$HOME; echo * 0"


WRONG = {
    ("--workers", "0"): "--workers 0: at least one",
    ("--seconds", "0"): "--seconds 0: must be above 0",
    ("--restarts", "-1"): "--restarts -1: must be 0 or more",
    ("--command", "'"): "--command ': No closing quotation",
    ("--command", " "): "--command: names no program",
    ("--command", "no-such-program"): "no-such-program: cannot be started",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options(words, tmp_path, capsys):
    manifest = _manifest(tmp_path / "m.jsonl", ["a"])
    given = [str(manifest), str(tmp_path / "out.jsonl"), "--command", "true", *words]
    assert tool.main(given) == 2
    assert WRONG[words] in capsys.readouterr().err


def test_wrong_files(tmp_path, capsys):
    manifest = str(_manifest(tmp_path / "m.jsonl", ["a"]))
    for out in (manifest, str(tmp_path / "out.csv")):
        assert tool.main([manifest, out, "--command", "true"]) == 2
        assert "must be a .jsonl file, and not the manifest" in capsys.readouterr().err
    assert tool.main([manifest, str(tmp_path / "o.jsonl"), "--model", str(tmp_path)]) == 2
    assert "no folder of a model" in capsys.readouterr().err


def test_endless_line_is_cut_short(tmp_path):
    manifest = _manifest(tmp_path / "m.jsonl", ["a"])
    endless = [sys.executable, "-SEc", "import sys\nwhile True: sys.stdout.write('x' * 65536)"]
    made = transcribe(manifest, tmp_path / "out.jsonl", endless)
    assert made.failed == {"nonsense": 1}
    assert "more than 16 MiB" in _lines(tmp_path / "out.quarantine.jsonl")[0]["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["caption", "captions", "transcript", "words", "language", "error"])


@settings(max_examples=50)
@given(st.dictionaries(KEYS, JSON, max_size=3))
def test_what_is_accepted_can_be_written_and_read(answer):
    line = json.dumps({"id": 7, **answer}).encode()
    try:
        found = check_answer({"id": 7}, line)
    except ClipError:
        return
    for start, end, word in found.get("words", ()):
        assert 0.0 <= float(start) <= float(end) < 1e9
        assert word.encode() is not None
    assert all(isinstance(text, str) for text in found.get("captions", ()))
    old = parse("/", "row", 0, {"media": "a.mp4", "caption": "before"})
    new = tool.merged(old, found)
    line = json.dumps(as_tree(new, Path("/")), ensure_ascii=False, allow_nan=False).encode()
    assert parse("/", "row", 0, json.loads(line)) == new


@given(st.binary(max_size=40))
def test_bytes_are_no_answer(line):
    with pytest.raises(ClipError) as raised:
        check_answer({"id": 7}, line)
    assert raised.value.reason == "nonsense"


@pytest.mark.parametrize("line", [b'{"id": 7, "caption": "\\ud800"}', b"[" * 100_000, b"7", b"[7]"])
def test_odd_json_is_no_answer(line):
    with pytest.raises(ClipError, match=r"not a line of JSON|no JSON object"):
        check_answer({"id": 7}, line)
