"""Captions and transcripts for the clips of a manifest, by any program or model.

    python -m data_tools.transcribe MANIFEST_OR_FOLDER OUT.jsonl --command "PROGRAM ARGUMENTS"
    python -m data_tools.transcribe MANIFEST_OR_FOLDER OUT.jsonl --model FOLDER [--task TASK]

A program reads and prints JSON lines, see `data_tools.caption_program`; a model is a folder that a
pipeline of `transformers` loads, see `data_tools.caption_model`. OUT has the rows of the manifest
in their order: captions are added to those of a row, a transcript replaces the row's, a language is
filled in where the row names none. Rows without media stay as they are.

Answers are kept in OUT.answers as they come: the same command again asks only for the clips that
have none, and OUT, which appears when there are no more, has the same bytes. Clips without answer
stay as they are, and are listed with the reason in OUT.quarantine.jsonl; then the exit status is 1,
and --retry asks for them again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import queue
import shlex
import sys
from array import array
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.caption_program import ClipError, Program
from data_tools.kept_rows import text_file, write_manifest
from data_tools.manifest import Row, find_manifests, read_rows
from data_tools.manifest.media import named
from data_tools.manifest.row import read_transcript
from mmssl.files import whole_file
from mmssl.types import MODALITIES, UserError

TASKS = ("automatic-speech-recognition", "image-text-to-text")


@dataclass(frozen=True)
class Options:
    """How to ask: see `caption_program.Program`; retry: ask again for clips that failed before."""

    workers: int = 1
    seconds: float = 600.0
    restarts: int = 10
    retry: bool = False


@dataclass(frozen=True)
class Transcribed:
    """A written manifest; asked: clips with media, failed: those without answer, by reason."""

    path: Path
    rows: int
    asked: int
    failed: dict[str, int]


# ---------------------------------------------------------------- answers on disk


class Answers:
    """An append-only file of one line per answer or failure; the last one of a row holds.

    failed: numbers of the rows without answer.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], rows: int) -> None:
        """Open or begin a file; what a kill left unfinished at its end is cut off.

        Args:
            path: the file.
            head: its first line, which says what was asked whom.
            rows: how many the manifest has.

        Raises:
            UserError: the file is another manifest's or command's, damaged, or in use.
        """
        self.path = path
        self._places = array("q", [-1]) * rows  # of the rows' lines
        self.failed: set[int] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing it") from error
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self._known(number, json.loads(line), end, head)
            except UserError:
                raise
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise UserError(
                    f"{path}:{number}: damaged; cut the file off there, or remove it to begin anew"
                ) from error
            end += len(line)
        self._file.truncate(end)
        self._end = end
        if not end:
            self._append(head)

    def _known(self, number: int, line: Any, place: int, head: Mapping[str, Any]) -> None:
        if number > 1:
            self._note(line["row"], place, "reason" in line)
        elif line != head:
            raise UserError(
                f"{self.path}: answers of another manifest, command or model; remove it, or write "
                "to another file"
            )

    def _note(self, row: int, place: int, failed: bool) -> None:
        self._places[row] = place
        (self.failed.add if failed else self.failed.discard)(row)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._end += self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def missing(self, row: int, retry: bool) -> bool:
        """Whether a row is to be asked for."""
        return self._places[row] < 0 or (retry and row in self.failed)

    def add(self, row: int, **fields: Any) -> None:
        """Keep `answer`, or `reason` and `message`, of a row."""
        place = self._end
        self._append({"row": row, **fields})
        self._note(row, place, "reason" in fields)

    def of(self, row: int) -> dict[str, Any]:
        """What `add` was given; empty where there is nothing."""
        if self._places[row] < 0:
            return {}
        self._file.seek(self._places[row])
        line: dict[str, Any] = json.loads(self._file.readline())
        return line

    def close(self) -> None:
        """Let others write."""
        self._file.close()


# ---------------------------------------------------------------- rows


def merged(row: Row, answer: Mapping[str, Any]) -> Row:
    """A row with what was found.

    A row that had no text and lists what it `has` gains the text there, too: shards would lack it.
    """
    texts = [text for text in map(str.strip, answer.get("captions", ())) if text]
    said = read_transcript(
        row.where,
        {
            "transcript": {
                # of blanks alone the words tell more
                "text": answer.get("transcript", "").strip() or None,
                "words": answer.get("words", []),
            }
        },
    )
    has = row.has
    if has and (texts or said) and not (row.captions or row.transcript):
        has = tuple(m for m in MODALITIES if m in (*has, "text"))
    return replace(
        row,
        captions=tuple(dict.fromkeys([*row.captions, *texts])),
        transcript=said or row.transcript,
        language=row.language or answer.get("language", ""),
        has=has,
    )


def _request(row: Row, number: int) -> dict[str, Any]:
    return {"id": number, **named(row.media, None), "start": row.start_s, "end": row.end_s}


# ---------------------------------------------------------------- the run


def transcribe(
    inputs: str | Path, out: str | Path, program: Sequence[str], options: Options | None = None
) -> Transcribed:
    """Ask a program about all clips of a manifest and write a new one; see the module's text.

    Args:
        inputs: a manifest, a folder that holds some or media, or an address of one of these.
        out: the manifest to write.
        program: the program and its arguments.
        options: how to ask.

    Raises:
        UserError: a wrong manifest or option, answers of another run, or a program that cannot be
            started or fails again and again; the answers that were given are kept.
    """
    chosen, out = options or Options(), Path(out)
    check_options(chosen)
    manifests = find_manifests(inputs)
    if out.suffix != ".jsonl" or out.resolve() in {Path(m).resolve() for m in manifests}:
        raise UserError(f"{out}: must be a .jsonl file, and not the manifest that is read")
    rows = [row for manifest in manifests for row in read_rows(manifest)]
    asked = [number for number, row in enumerate(rows) if row.media is not None]
    head = {"program": list(program), "clips": _digest(rows, asked, out.parent)}
    answers = Answers(out.with_name(f"{out.name}.answers"), head, len(rows))
    try:
        todo = [number for number in asked if answers.missing(number, chosen.retry)]
        bar = tqdm(total=len(asked), initial=len(asked) - len(todo), unit="clip", disable=None)
        with bar, closing(_ask(rows, todo, program, chosen)) as found_of:
            for number, found in found_of:
                answers.add(number, **found)
                bar.update()
        failed = _write(out, rows, answers)
    finally:
        answers.close()
    return Transcribed(out, len(rows), len(asked), dict(sorted(failed.items())))


def check_options(options: Options) -> None:
    """Refuse what nobody can mean.

    Raises:
        UserError: names the option.
    """
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one worker is needed")
    if not options.seconds > 0:
        raise UserError(f"--seconds {options.seconds:g}: must be above 0")
    if options.restarts < 0:
        raise UserError(f"--restarts {options.restarts}: must be 0 or more")


def _digest(rows: Sequence[Row], asked: Sequence[int], folder: Path) -> str:
    """Of what is asked, and in which rows; captions may be corrected meanwhile."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for number in asked:
        row = rows[number]
        parts = (number, named(row.media, folder), row.start_s, row.end_s)
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def _ask(
    rows: Sequence[Row], todo: Sequence[int], program: Sequence[str], options: Options
) -> Generator[tuple[int, dict[str, Any]]]:
    """Numbers of rows and what to keep of them, in the order in which answers come."""
    count = min(options.workers, len(todo))
    programs = [Program(program, options.seconds, options.restarts, n) for n in range(count)]
    idle: queue.SimpleQueue[Program] = queue.SimpleQueue()
    for one in programs:
        idle.put(one)

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        one = idle.get()
        try:
            return number, {"answer": one.ask(_request(rows[number], number))}
        except ClipError as error:
            return number, {"reason": error.reason, "message": str(error)}
        finally:
            idle.put(one)

    rest = iter(todo)
    pool = ThreadPoolExecutor(max(1, count))
    try:
        waiting: set[Future[tuple[int, dict[str, Any]]]]
        waiting = {pool.submit(ask, number) for number in islice(rest, 2 * count)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.result()[0]):
                yield future.result()
                waiting |= {pool.submit(ask, number) for number in islice(rest, 1)}
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for one in programs:
            one.interrupt()
        raise
    finally:
        pool.shutdown()
        for one in programs:
            one.close()


def _write(out: Path, rows: Sequence[Row], answers: Answers) -> Counter[str]:
    """The new manifest and, before it, the list of what failed; returns reasons."""
    failed: Counter[str] = Counter()
    quarantine = out.with_name(f"{out.stem}.quarantine.jsonl")
    with whole_file(quarantine) as listed, text_file(listed) as bad:
        for number in sorted(answers.failed):
            found, row = answers.of(number), rows[number]
            failed[found["reason"]] += 1
            place = {"media": named(row.media, out.parent)["media"], "row": row.where}
            why = {"reason": found["reason"], "message": found["message"]}
            bad.write(json.dumps(place | why, ensure_ascii=False) + "\n")
    if not failed:
        quarantine.unlink()
    every = enumerate(rows)
    write_manifest((merged(row, answers.of(n).get("answer", {})) for n, row in every), out)
    return failed


# ---------------------------------------------------------------- command line


def _program(args: argparse.Namespace) -> list[str]:
    if args.command is not None:
        try:
            words = shlex.split(args.command)
        except ValueError as error:
            raise UserError(f"--command {args.command}: {error}") from error
        if not words:
            raise UserError("--command: names no program")
        return words
    if not (args.model / "config.json").is_file():
        raise UserError(f"--model {args.model}: no folder of a model, which has a config.json")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--model needs transformers; install the extra: pip install 'mmssl[hf]'")
    words = [sys.executable, "-m", "data_tools.caption_model", str(args.model), args.task]
    return [*words, *([] if args.prompt is None else [args.prompt])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.transcribe", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", metavar="MANIFEST_OR_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--command", metavar="'PROGRAM ARGUMENTS'")
    by.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="of the model")
    parser.add_argument("--prompt", help="for a model that describes pictures")
    parser.add_argument("--workers", type=int, default=Options.workers, help="programs at a time")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="for an answer")
    parser.add_argument("--restarts", type=int, default=Options.restarts, help="in a row")
    parser.add_argument("--retry", action="store_true", help="ask again for clips that failed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parser().parse_args(argv)
    options = Options(args.workers, args.seconds, args.restarts, args.retry)
    try:
        made = transcribe(args.inputs, args.out, _program(args), options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{made.path}: {made.rows} rows, {made.asked} with media")
    if made.failed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in made.failed.items())
        place = made.path.with_name(f"{made.path.stem}.quarantine.jsonl")
        print(f"  {sum(made.failed.values())} clips have no answer ({reasons}), see {place}")
    return 1 if made.failed else 0


if __name__ == "__main__":
    sys.exit(main())
