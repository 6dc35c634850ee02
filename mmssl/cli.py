"""The command line: `mmssl <verb> <what> [a.b=c ...]`.

Every verb imports its module when it is called, so that `mmssl --help` answers at once. The command
line does not grow options: everything is a key of the run's file and can be overridden as `a.b=c`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from mmssl.signals import heard_by, leave
from mmssl.types import UserError


class Verb(NamedTuple):
    """`target` is `module:function`; it gets the words one by one, then the list of overrides.

    A last word that ends in `...` stands for one or more, given as a list.
    """

    target: str
    words: tuple[str, ...]
    overrides: bool
    help: str


VERBS = {
    "train": Verb(
        "mmssl.train.stages:main", ("FILE",), True, "train a run, its stages, or a method"
    ),
    "resume": Verb("mmssl.train.run:resume", ("RUN",), True, "go on with an interrupted run"),
    "eval": Verb(
        "mmssl.eval.suites:main",
        ("SUITE", "RUN"),
        True,
        "evaluate: retrieval localize bouncing boxes sync probe knn finetune abx units separation",
    ),
    "localize": Verb(
        "mmssl.demos.localize:main", ("VIDEO",), True, "show where the sound of a video comes from"
    ),
    "embed": Verb(
        "mmssl.index.vectors:main",
        ("DATA",),
        True,
        "vectors of shards or media; model=RUN out=FOLDER",
    ),
    "index": Verb(
        "mmssl.index.build:main",
        ("build", "DATA"),
        True,
        "make DATA searchable, or add it; model=RUN out=DB",
    ),
    "search": Verb(
        "mmssl.index.search:main",
        ("DB", "QUERY..."),
        True,
        "find what fits words, sounds, videos, pictures",
    ),
    "demo": Verb(
        "mmssl.demos.web.serve:main", (), True, "search, localize and explore in the browser"
    ),
    "import": Verb(
        "mmssl.interop.huggingface:import_main",
        ("FOLDER", "OUT"),
        True,
        "make a run folder of a checkpoint of transformers",
    ),
    "export": Verb(
        "mmssl.interop.huggingface:export_main",
        ("RUN", "OUT"),
        True,
        "write a tower of a run for transformers",
    ),
    "list": Verb("mmssl.catalogue:main", (), False, "the methods at hand; --json for programs"),
    "show": Verb("mmssl.check:show", ("FILE",), True, "the flow table of a method"),
    "check": Verb("mmssl.check:check", ("FILE",), True, "dry run on a fake batch"),
    "plan": Verb(
        "mmssl.plan:main", ("FILE",), True, "memory, time and cost; gpus=8 gpu=h100 samples=1e9"
    ),
    "doctor": Verb("mmssl.doctor:main", (), False, "test decoders, DeepSpeed, Energon, device"),
    "scoreboard": Verb(
        "mmssl.eval.scoreboard:main",
        (),
        True,
        "pretrain and probe methods on real sound; data=DIR methods=apc,cpc sets=fsdd",
    ),
    "chaos": Verb(
        "mmssl.chaos:main", (), True, "inject faults (source only); suites=kills count=3 seed=0"
    ),
}

# these take `--key value` for `key=value`, too
PAIRED = ("plan", "scoreboard")

# Asked to stop, these end with an exit code of their own at any time, see `mmssl.signals`.
STOPPABLE = ("train", "resume")
USER_ERROR, INTERRUPTED = 2, 130  # exit codes, beside those that `train` returns


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the process's exit code.

    2: bad input. 70: no progress for `train.hang_s`. 75: asked to stop, a checkpoint is written if
    there was anything to save, the same command goes on. 130: interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith("--local_rank="):  # deepspeed's launcher; LOCAL_RANK says it
        del words[0]
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"mmssl: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mmssl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else USER_ERROR
    if words[0] in ("-V", "--version"):
        from mmssl import __version__

        print(__version__)
        return 0
    name, rest = words[0], words[1:]
    if name not in VERBS:
        raise UserError(_unknown(name))
    if "-h" in rest or "--help" in rest:
        print(f"{_synopsis(name)}\n\n{VERBS[name].help}")
        return 0
    return _call(name, *_arguments(name, rest))


def _arguments(name: str, rest: list[str]) -> tuple[list[Any], list[str]]:
    """The verb's own words, and the overrides (or flags) after them."""
    verb = VERBS[name]
    if name in PAIRED:
        rest = _paired(rest)
    count = len(verb.words)
    several = count > 0 and verb.words[-1].endswith("...")
    if several:
        options = (k for k, word in enumerate(rest) if k >= count and _is_option(word))
        count = next(options, len(rest))
    words, extra = rest[:count], rest[count:]
    if len(words) < len(verb.words) or any(map(_is_option, words)):
        raise UserError(f"{name}: needs {' and '.join(verb.words)}\nusage: {_synopsis(name)}")
    for text in extra:
        if verb.overrides and ("=" not in text or text.startswith("-")):
            raise UserError(f"{name}: `{text}`: options are written key=value, e.g. train.steps=10")
        if not verb.overrides and not (name == "list" and text == "--json"):
            raise UserError(f"{name}: unexpected `{text}`\nusage: {_synopsis(name)}")
    first = len(verb.words) - 1
    return ([*words[:first], words[first:]] if several else words), extra


def _is_option(word: str) -> bool:
    return word.startswith("-") or ("=" in word and not os.path.exists(word))


def _paired(rest: list[str]) -> list[str]:
    """`--key value` and `--key=value` as `key=value`."""
    out, words = [], iter(rest)
    for word in words:
        key = word.removeprefix("--")
        out.append(word if key == word else key if "=" in key else f"{key}={next(words, '')}")
    return out


def _call(name: str, words: list[Any], extra: list[str]) -> int:
    verb = VERBS[name]
    module, _, function = verb.target.partition(":")
    with heard_by(leave) if name in STOPPABLE else nullcontext():
        run = getattr(importlib.import_module(module), function)
        result = run(*words, extra) if verb.overrides else run(*extra)
    return result if isinstance(result, int) else 0


def _synopsis(name: str) -> str:
    verb = VERBS[name]
    tail = ["[key=value ...]"] if verb.overrides else ["[--json]"] if name == "list" else []
    return " ".join(["mmssl", name, *verb.words, *tail])


def usage() -> str:
    """The text of `mmssl --help`."""
    width = max(len(_synopsis(name)) for name in VERBS) + 2
    rows = [f"  {_synopsis(name):<{width}}{verb.help}" for name, verb in VERBS.items()]
    notes = [
        "FILE is a path or a name below configs/runs or configs/methods (see `mmssl list`).",
        "key=value overrides any key of the file, e.g. train.steps=100 tasks.match=null",
    ]
    return "\n".join(["usage: mmssl VERB ...", "", *rows, "", *notes])


def _unknown(name: str) -> str:
    import difflib

    have = f"there are: {', '.join(VERBS)}"
    near = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"no verb `{name}`{hint}; {have}"


if __name__ == "__main__":
    sys.exit(main())
