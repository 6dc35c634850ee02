"""The doctor finds what is broken, says why, and survives whatever a library does."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mmssl import doctor
from mmssl.doctor import Check, Finding, probes, samples

REQUIRED = [c for c in doctor.CHECKS if c.required]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


def test_every_check_has_a_probe():
    assert [c.name for c in doctor.CHECKS] == list(probes.PROBES)


@pytest.mark.parametrize("check", REQUIRED, ids=[c.name for c in REQUIRED])
def test_required_part_works_here(check, folder):
    finding = doctor.examine(check, folder)
    assert finding.status == "ok", finding
    assert any(c.isdigit() for c in finding.detail)  # the version


def test_decord_reads_the_film(folder):
    pytest.importorskip("decord")
    assert probes.probe("decord", folder).status == "ok"


# ---------------------------------------------------------------- what is broken


def test_missing_ffmpeg(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    finding = probes.probe("ffmpeg", folder)
    assert finding.status == "missing"
    assert "apt-get install ffmpeg" in finding.remedy


def script(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import sys; print('no libx', file=sys.stderr); sys.exit(1)", "no libx"),
        ("import sys; sys.stdout.buffer.write(bytes(100))", "a frame is cut off"),
        ("import sys; sys.stdout.buffer.write(bytes(64 * 64 * 3))", "read 1 of 10 frames"),
        ("import sys; sys.stdout.buffer.write(bytes(10 * 64 * 64 * 3))", "levels are off by 200.0"),
    ],
)
def test_broken_ffmpeg_is_named(folder, tmp_path, monkeypatch, text, cause):
    samples.write_film(tmp_path / "film.mp4")
    script(tmp_path / "ffmpeg", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = probes.probe("ffmpeg", tmp_path)
    assert finding.status == "failed"
    assert cause in finding.detail


def test_missing_module_names_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes the import fail
    finding = probes.probe("faiss", folder)
    assert (finding.status, finding.remedy) == ("missing", "python -m pip install faiss-cpu")


def test_wrong_result_is_a_failure(folder, monkeypatch):
    import faiss

    monkeypatch.setattr(faiss.IndexFlatIP, "search", lambda self, x, k: (x, np.zeros((16, 1), int)))
    finding = probes.probe("faiss", folder)
    assert finding.status == "failed"
    assert "wrong neighbours" in finding.detail


def test_unexpected_error_is_reported_with_its_type(folder, monkeypatch):
    import faiss

    monkeypatch.setattr(faiss, "IndexFlatIP", lambda dim: 1 / 0)
    finding = probes.probe("faiss", folder)
    assert finding == Finding(
        "failed",
        "ZeroDivisionError: division by zero",
        "python -m pip install --force-reinstall --no-deps faiss-cpu",
    )


HEAD = "Could not load libtorchcodec. Likely causes: ...\n"
AVUTIL = "FFmpeg version {}: libavutil.so.{}: cannot open shared object file\n"


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        (
            HEAD + AVUTIL.format(8, 60) + AVUTIL.format(7, 59),
            "no FFmpeg shared libraries found (looked for libavutil.so.59, libavutil.so.60)",
            "apt-get install ffmpeg",
        ),
        (
            HEAD + AVUTIL.format(8, 60) + "FFmpeg version 5: x.so: undefined symbol: _ZN3c10 y",
            "built for another torch",
            "matches this torch",
        ),
        (
            HEAD + "libnppicc.so.13: cannot open shared object file",
            "CUDA library libnppicc.so.13 not found",
            "CPU build",
        ),
        ("strange things", "cannot be loaded: strange things", "torchcodec"),
    ],
)
def test_torchcodec_causes_are_told_apart(text, cause, remedy):
    found = probes.torchcodec_cause(text)
    assert cause in found[0]
    assert remedy in found[1]


def run_instead(monkeypatch, text):
    """Runs `text` in the place of a probe's process."""
    real = doctor.subprocess.run
    swap = lambda command, **kw: real([sys.executable, "-c", text], **kw)  # noqa: E731
    monkeypatch.setattr(doctor.subprocess, "run", swap)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import sys; sys.exit('libfoo is broken')", "exit code 1: libfoo is broken"),
        ("print('no answer')", "exit code 0: nothing printed"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_probe_that_dies_is_reported(folder, monkeypatch, text, cause):
    run_instead(monkeypatch, text)
    finding = doctor.examine(Check("pyav", required=True, seconds=1), folder)
    assert finding.status == "failed"
    assert cause in finding.detail
    assert finding.remedy


@pytest.mark.parametrize(
    ("broken", "code"), [("torchcodec", 0), ("ffmpeg", 0), ("pyav", 1), ("deepspeed", 1)]
)
def test_exit_code_counts_required_parts_only(monkeypatch, capsys, broken, code):
    bad, good = Finding("failed", "cause", "remedy"), Finding("ok", "1.0")
    monkeypatch.setattr(doctor, "examine", lambda check, _: bad if check.name == broken else good)
    assert doctor.main() == code
    lines = capsys.readouterr().out.splitlines()
    optional = "" if code else " (optional)"
    assert f"{broken:<14} failed  cause{optional}" in lines
    assert f"{'':<14} -> remedy" in lines
    assert len(lines) == len(doctor.CHECKS) + 3


# ---------------------------------------------------------------- the samples themselves


def test_frame_check_has_teeth():
    good = np.repeat(samples.levels()[:, None], 12, axis=1).reshape(samples.FRAMES, 2, 2, 3)
    assert samples.frames_problem(good) == ""
    assert "read 9 of 10" in samples.frames_problem(good[1:])
    assert "off by" in samples.frames_problem(good[::-1])


def test_tone_check_has_teeth():
    time_S = np.arange(samples.AUDIO_HZ) / samples.AUDIO_HZ
    assert samples.tone_problem(np.sin(2 * np.pi * samples.TONE_HZ * time_S)) == ""
    assert "at 880 Hz" in samples.tone_problem(np.sin(2 * np.pi * 880 * time_S))
    assert "audio samples" in samples.tone_problem(time_S[: samples.AUDIO_HZ // 2])
