from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import ToyBatch

from mmssl.frontends.positions import FactorisedPositions
from mmssl.specs import TrainSpec
from mmssl.train.flops import peak_flops
from mmssl.train.meters import Meters
from mmssl.train.sinks import Sinks, summary_line
from mmssl.types import Floor, Term

CPU = torch.device("cpu")
FLOOR = Floor(0.5, "the codebook", "raise the weight of `diversity`")


@pytest.fixture
def meters(tmp_path: Path) -> Iterator[Meters]:
    made = Meters(tmp_path, TrainSpec(steps=5, log_every=2), CPU, 0, 60.0, {"a": FLOOR})
    made.now = 0.0
    made.clock = lambda: made.now
    made.started = made.began = 0.0
    made.peak = 1000.0
    yield made
    made.close()


def term(total: float, count: float) -> Term:
    return Term(torch.tensor([total]), torch.tensor([count]))


def one_step(meters: Meters, step: int, wait: float, work: float, loss: float = 1.0) -> None:
    with meters.waiting():
        meters.now += wait
    meters.now += work
    meters.flops = 300.0
    terms = {"a": term(loss * 4, 4), "none": term(0.0, 0.0)}
    meters.micro_batch(ToyBatch(torch.zeros(4, 8)), 40, torch.tensor(loss), terms)
    meters.step(step, 0.1, 2.0, {}, {})


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rates_leave_the_first_step_and_interruptions_out(meters: Meters, tmp_path: Path) -> None:
    one_step(meters, 1, wait=50.0, work=50.0, loss=1.0)  # the first step warms up
    one_step(meters, 2, wait=1.0, work=3.0, loss=3.0)
    with meters.aside():
        meters.now += 1000.0
    one_step(meters, 3, wait=0.0, work=1.0)
    one_step(meters, 4, wait=1.0, work=2.0)
    one_step(meters, 5, wait=0.0, work=4.0)
    first, second, third = lines(tmp_path)
    assert [line["step"] for line in (first, second, third)] == [2, 4, 5]
    assert first["samples_per_s"] == pytest.approx(4 / 4)
    assert first["tokens_per_s"] == pytest.approx(40 / 4)
    assert first["data_wait"] == pytest.approx(1 / 4)
    assert first["flop_utilisation"] == pytest.approx(300 / 4 / 1000)
    assert second["samples_per_s"] == pytest.approx(8 / 4)
    assert second["data_wait"] == pytest.approx(1 / 4)
    # The losses of the window do contain the first step.
    assert first["loss"] == pytest.approx(2.0)
    assert first["term/a"] == pytest.approx(2.0)
    assert (first["sum/a"], first["count/a"]) == (16.0, 8.0)
    assert "term/none" not in first
    assert first["count/none"] == 0.0
    assert (first["lr"], first["grad_norm"]) == (0.1, 2.0)
    summary = meters.summary()
    assert summary["samples_per_s"] == pytest.approx(16 / 12)
    assert summary["data_wait"] == pytest.approx(2 / 12)
    assert meters.elapsed_s() == pytest.approx(60 + 112 + 1000)


def test_accumulated_micro_batches_make_one_step(meters: Meters, tmp_path: Path) -> None:
    meters.flops = 0.0
    for step in (1, 2):
        for loss in (1.0, 5.0):
            terms = {"a": term(loss, 1)}
            meters.micro_batch(ToyBatch(torch.zeros(2, 8)), 3, torch.tensor(loss), terms)
        meters.now += 2.0
        meters.step(step, 0.1, 1.0, {}, {})
    (line,) = lines(tmp_path)
    assert line["loss"] == line["term/a"] == 3.0
    assert line["samples_per_s"] == pytest.approx(2.0)


def test_flops_are_those_of_forward_and_backward_and_counted_once(meters: Meters) -> None:
    layer = nn.Linear(16, 32, bias=False)
    for rows in (8, 100):
        x = torch.randn(rows, 16, requires_grad=True)
        with meters.counting():
            layer(x).sum().backward()
    assert meters.flops == 3 * 2 * 8 * 16 * 32


def test_the_peak_is_above_what_this_machine_just_did() -> None:
    peak = peak_flops(CPU, torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14


def test_board_and_lines_hold_the_same_numbers(tmp_path: Path) -> None:
    sinks = Sinks(tmp_path, total=4)
    values = {"loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "samples_per_s": 3.0, "data_wait": 0.0}
    sinks.numbers(2, values)
    sinks.validation(2, {"r": 0.25, "bad": math.nan})
    sinks.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.5)]
    assert [(e.step, e.value) for e in board.Scalars("validation/r")] == [(2, 0.25)]
    assert lines(tmp_path) == [
        {"step": 2, **values},
        {"step": 2, "validation": {"r": 0.25, "bad": None}},
    ]


def test_a_continued_log_says_where(tmp_path: Path) -> None:
    Sinks(tmp_path, total=4).close()
    Sinks(tmp_path, total=4, step=3).close()
    assert lines(tmp_path) == [{"step": 3, "event": "resumed"}]


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "samples_per_s": 3.0, "data_wait": 0.25}
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        sinks = Sinks(tmp_path, total=4)
        sinks.numbers(1, values)
        sinks.advance()
        sinks.close()
        seen = capsys.readouterr()
        assert ("step 1/4  loss 0.5000" in seen.out) is not terminal
        assert ("1/4" in seen.err) is terminal
    assert "wait 25%" in summary_line({**values, "term/av": 0.25, "sum/av": 1.0})
    assert "av 0.250" in summary_line({**values, "term/av": 0.25, "sum/av": 1.0})


def test_a_collapse_is_announced(
    meters: Meters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meters.log_every = 1
    for step in (1, 2, 3):
        loss = torch.tensor(0.0)
        terms = {"a": term(0, 1), "b": term(0, 0)}
        meters.micro_batch(ToyBatch(torch.zeros(9, 8)), 1, loss, terms)
        meters.step(step, 0.1, 1.0, {"common": torch.ones(9, 4)}, {})
    out = capsys.readouterr().out
    assert "warning: step 3: embedding `common` has collapsed: effective rank 0.00 of 4" in out
    text = (
        "step 3: the codebook has collapsed: `a` is 0, below 0.5; raise the weight of `diversity`"
    )
    assert out.count(f"warning: {text}") == out.count("the codebook has collapsed") == 1
    assert out.count("warning: step 3: no row has a part in `b`: ") == out.count("no row") == 1
    alarms = [[line[f"alarm/{name}"] for name in ("a", "b", "common")] for line in lines(tmp_path)]
    assert alarms == [[0.0] * 3, [0.0] * 3, [1.0] * 3]


def test_counting_changes_no_digit_of_a_gradient(meters: Meters) -> None:
    """A resumed run counts at another step than the uninterrupted one, and must be equal to it."""
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.GELU()]
    net, x = nn.Sequential(*parts), torch.randn(2, 3, 9, 9)
    found = []
    for counting in (meters.counting, nullcontext):
        net.zero_grad()
        with counting():
            net(x).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert meters.flops > 0


def test_a_part_of_a_table_can_be_counted_without_gradients(meters: Meters) -> None:
    """As the teacher of a text run reads its positions; torch's counter trips over plain views."""
    table = FactorisedPositions((8,), 4, fit="crop")
    with meters.counting(), torch.no_grad():
        assert torch.equal(table.vectors((5,)), table.axis0[:5])


def test_skipped_samples_are_logged_by_reason(meters: Meters, tmp_path: Path) -> None:
    meters.micro_batch(
        ToyBatch(torch.zeros(4, 8)), 4, torch.tensor(1.0), {"a": term(1, 1), "none": term(0, 0)}
    )
    meters.now += 1.0
    meters.step(2, 0.1, 2.0, {}, {"crc": 3, "timeout": 1})
    (line,) = lines(tmp_path)
    found = {name: value for name, value in line.items() if name.startswith("skipped")}
    assert found == {"skipped": 4, "skipped/crc": 3, "skipped/timeout": 1}
