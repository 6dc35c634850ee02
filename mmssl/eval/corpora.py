"""Public sound data sets as files in a folder, their shards, and steps that are done once."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.eval import results
from mmssl.types import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Corpus:
    """A data set: where its files lie and what their names say.

    label: what the probe tells; group: what it leaves out. suffix: of the runs that fit it. hz: of
    the baseline. held_out: pretraining never hears the group. spoken: speakers are told apart, too.
    """

    name: str
    files: str
    pattern: str
    label: str
    group: str
    suffix: str
    hz: int
    held_out: bool
    spoken: bool = False


CORPORA = {
    c.name: c
    for c in (
        Corpus(
            "fsdd",
            "fsdd/recordings/*.wav",
            r"(?P<digit>\d)_(?P<speaker>[^_/]+)_(?P<index>\d+)\.wav$",
            "digit",
            "speaker",
            "_tiny",
            8000,
            held_out=False,
            spoken=True,
        ),
        Corpus(
            "esc10",
            "esc10/*/*.ogg",
            r"(?P<class>[^/]+)/(?P<fold>\d)-(?P<source>\d+)-[A-Z]\.ogg$",
            "class",
            "fold",
            "_esc10",
            44100,
            held_out=True,
        ),
    )
}


def read_clips(corpus: Corpus, data: Path) -> dict[Path, dict[str, Any]]:
    """Meta of every file, from its name.

    Raises:
        UserError: no file is named so, or fewer than three groups.
    """
    found = {}
    for file in sorted(data.glob(corpus.files)):
        match = re.search(corpus.pattern, file.as_posix())
        if match:
            meta: dict[str, Any] = match.groupdict()
            if corpus.spoken:  # the letters are read by configs/runs/unispeech_tiny.yaml alone
                letters = " ".join(DIGITS[int(meta["digit"])])
                meta |= {"index": int(meta["index"]), "letters": letters}
            found[file] = meta
    if len({meta[corpus.group] for meta in found.values()}) < 3:
        raise UserError(
            f"{data / corpus.files}: needs clips of three or more of the field {corpus.group}; "
            "mmssl/eval/scoreboard.py says where the data set comes from"
        )
    return found


def make_shards(
    corpus: Corpus, clips: Mapping[Path, Mapping[str, Any]], work: Path, held: str = ""
) -> Path:
    """Shards of all clips, or of those outside a group; made when first asked for."""
    name = f"without_{held}" if held else "train"
    folder, manifest = work / "shards" / name, work / "shards" / f"{name}.jsonl"
    if not folder.is_dir():
        rows = [
            {"media": str(file.resolve()), "source": meta.get("source", file.stem), "meta": meta}
            for file, meta in clips.items()
            if meta[corpus.group] != held
        ]
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        module("data_tools.make_shards", str(manifest), str(folder))
    return folder


def module(*words: str) -> None:
    """Run a module of the project in a process of its own.

    Raises:
        UserError: it fails.
    """
    print("+", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", *words])
    if done.returncode:
        raise UserError(
            f"{words[0]} ended with exit status {done.returncode}, see above; the same command "
            "goes on"
        )


def once(mark: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run a module unless the mark says that it was; minutes on the clock and of all cores."""
    if mark.is_file():
        facts = results.read(mark)
        if facts["command"] != list(words):
            raise UserError(
                f"{mark} was made by `{' '.join(facts['command'])}`, not by `{' '.join(words)}`; "
                "choose another --out, or remove it and the run"
            )
        return facts
    begin, used = time.monotonic(), _cpu_s()
    module(*words)
    facts = {
        "command": list(words),
        "minutes": (time.monotonic() - begin) / 60,
        "cpu_minutes": (_cpu_s() - used) / 60,
    }
    results.write(facts, mark)
    return facts


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
