"""The command line: fast, thin, and honest about bad input."""

import json
import math
import subprocess
import sys
import time
import types

import pytest

from mmssl import cli
from mmssl.types import UserError


@pytest.fixture
def calls(monkeypatch):
    """Replaces every verb's function by a recorder; returns what was called."""
    seen = []

    def module(name):
        def record(function):
            return lambda *arguments: seen.append((f"{name}:{function}", *arguments))

        fake = types.SimpleNamespace()
        for verb in cli.VERBS.values():
            target, _, function = verb.target.partition(":")
            if target == name:
                setattr(fake, function, record(function))
        return fake

    monkeypatch.setattr(cli.importlib, "import_module", module)
    return seen


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("train f.yaml a.b=1 c=x=y", ("mmssl.train.stages:main", "f.yaml", ["a.b=1", "c=x=y"])),
        ("resume runs/x", ("mmssl.train.run:resume", "runs/x", [])),
        ("eval bouncing r limit=3", ("mmssl.eval.suites:main", "bouncing", "r", ["limit=3"])),
        ("localize a.mp4 run=runs/x", ("mmssl.demos.localize:main", "a.mp4", ["run=runs/x"])),
        ("embed s model=r", ("mmssl.index.vectors:main", "s", ["model=r"])),
        ("index build s out=d", ("mmssl.index.build:main", "build", "s", ["out=d"])),
        ("search d rain", ("mmssl.index.search:main", "d", ["rain"], [])),
        ("search d a b.wav k=3", ("mmssl.index.search:main", "d", ["a", "b.wav"], ["k=3"])),
        ("demo port=0", ("mmssl.demos.web.serve:main", ["port=0"])),
        ("import peer out", ("mmssl.interop.huggingface:import_main", "peer", "out", [])),
        (
            "export run out format=hubert",
            ("mmssl.interop.huggingface:export_main", "run", "out", ["format=hubert"]),
        ),
        ("list", ("mmssl.catalogue:main",)),
        ("list --json", ("mmssl.catalogue:main", "--json")),
        ("show avt/flagship", ("mmssl.check:show", "avt/flagship", [])),
        ("check avt/flagship x=1", ("mmssl.check:check", "avt/flagship", ["x=1"])),
        ("plan f.yaml gpus=8 a.b=1", ("mmssl.plan:main", "f.yaml", ["gpus=8", "a.b=1"])),
        ("plan f.yaml --gpus 8 --gpu=h200", ("mmssl.plan:main", "f.yaml", ["gpus=8", "gpu=h200"])),
        ("doctor", ("mmssl.doctor:main",)),
        ("scoreboard --data d x=1", ("mmssl.eval.scoreboard:main", ["data=d", "x=1"])),
        ("chaos suites=kills count=3", ("mmssl.chaos:main", ["suites=kills", "count=3"])),
        # as the deepspeed launcher calls a module
        ("--local_rank=1 train f.yaml", ("mmssl.train.stages:main", "f.yaml", [])),
    ],
)  # fmt: skip
def test_verb_calls_its_function(calls, words, call):
    assert cli.main(words.split()) == 0
    assert calls == [call]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian f.yaml", "no verb `trian`; did you mean `train`?"),
        ("xyzzy", "there are: train, resume, eval"),
        ("train", "usage: mmssl train FILE [key=value ...]"),
        ("train steps=3", "needs FILE"),
        ("eval bouncing", "needs SUITE and RUN"),
        ("train f.yaml --steps 3", "options are written key=value"),
        ("train f.yaml steps", "`steps`: options are written key=value"),
        ("search d k=3", "needs DB and QUERY..."),
        ("search d rain k=3 sun", "`sun`: options are written key=value"),
        ("search d rain -k 3", "`-k`: options are written key=value"),
        ("list --csv", "unexpected `--csv`"),
        ("doctor --json", "unexpected `--json`"),
    ],
)
def test_bad_command_is_explained_in_exit_code_2(calls, capsys, words, message):
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert calls == []


def test_a_file_with_equals_sign_is_a_file(calls, tmp_path):
    path = tmp_path / "lr=3.yaml"
    path.touch()
    assert cli.main(["train", str(path)]) == 0
    assert calls[0][1] == str(path)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (3, 3), ({"a": 1}, 0), (("x", "y"), 0)])
def test_exit_code_is_the_functions_integer(monkeypatch, result, code):
    fake = types.SimpleNamespace(main=lambda *_: result)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: fake)
    assert cli.main(["doctor"]) == code


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("bad.yaml:3: x"), 2), (KeyboardInterrupt(), 130)]
)
def test_error_becomes_one_line_without_traceback(monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda _: types.SimpleNamespace(main=fail))
    assert cli.main(["doctor"]) == code
    err = capsys.readouterr().err
    assert err == f"mmssl: {'bad.yaml:3: x' if code == 2 else 'interrupted'}\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    fake = types.SimpleNamespace(main=lambda *_: 1 / 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: fake)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_every_verb_has_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert verb.help in text
        assert cli.main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"mmssl {name}")


def test_the_command_line_has_no_options():
    """Style rule: everything else is a key of the run's file."""
    flags = [w for w in cli.usage().split() if w.startswith(("-", "[-"))]
    assert {f.strip("[]") for f in flags} == {"--json"}


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from mmssl.cli import main; main(['--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    seconds = math.inf
    for _ in range(20):  # other processes may hold the cores: one quiet moment is enough
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds = min(seconds, time.perf_counter() - start)
        if seconds < 0.5:
            break
    loaded = set(json.loads(done.stderr.replace("'", '"')))
    assert not loaded & {"torch", "numpy", "pydantic", "omegaconf", "yaml", "av", "deepspeed"}
    assert seconds < 0.5


def test_reader_that_leaves_is_no_error():
    """`mmssl list | head -0` ends quietly."""
    command = f"set -o pipefail; {sys.executable} -m mmssl.cli --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
