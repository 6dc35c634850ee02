from __future__ import annotations

import math

import pytest
import torch

from mmssl.train.health import Monitor, effective_rank, spread
from mmssl.types import Floor


def test_effective_rank_counts_equal_directions() -> None:
    eye = torch.eye(16).repeat(4, 1)
    for k in (2, 5, 16):
        x_BD = eye[:, :k] @ torch.randn(k, 32, generator=torch.Generator().manual_seed(k))
        q_BD = torch.linalg.qr(x_BD.T @ x_BD).Q[:, :k]  # orthogonal directions
        signs_BD = torch.randn(4096, k, generator=torch.Generator().manual_seed(k)).sign()
        assert effective_rank(signs_BD @ q_BD.T) == pytest.approx(k, rel=0.01)


def test_effective_rank_of_two_unequal_directions_is_the_exponential_of_their_entropy() -> None:
    # Variances 3 : 1 give shares 3/4 and 1/4.
    x_BD = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_BD = x_BD * torch.tensor([3.0, 1.0]).sqrt()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(x_BD) == pytest.approx(math.exp(entropy))
    assert effective_rank(x_BD + 100) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_a_point_and_a_line_are_recognised() -> None:
    assert effective_rank(torch.full((16, 8), 3.0)) == 0.0
    line_BD = torch.arange(16.0)[:, None] * torch.ones(8)
    assert effective_rank(line_BD) == pytest.approx(1.0)


def test_spread_is_one_for_even_directions_and_zero_for_one() -> None:
    x_BD = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert spread(x_BD) == pytest.approx(1.0, abs=0.01)
    assert spread(x_BD * torch.rand(4096, 1).clamp(min=0.1)) == pytest.approx(1.0, abs=0.01)
    assert spread(torch.ones(16, 64) * torch.arange(1, 17)[:, None]) == pytest.approx(0.0, abs=1e-6)


def test_monitor_warns_once_when_a_collapse_has_lasted() -> None:
    monitor, good = Monitor({}), torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    bad = torch.ones(32, 8)
    series = [good, bad, bad, good, bad, bad, bad, bad, good, bad, bad, bad]
    counts = [len(monitor.measure({}, {"av": x})[1]) for x in series]
    assert counts == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_monitor_leaves_small_and_broken_batches_out() -> None:
    monitor = Monitor({})
    values, warnings = monitor.measure(
        {}, {"a": torch.ones(7, 4), "b": torch.full((9, 4), math.nan)}
    )
    assert values == {}
    assert warnings == []
    values, _ = monitor.measure({}, {"a": torch.ones(8, 4)})
    assert values == {"rank/a": 0.0, "std/a": pytest.approx(0.0, abs=1e-6), "alarm/a": 0.0}


def test_a_floor_of_the_rank_stands_in_for_the_rule_of_embeddings() -> None:
    flat_BD = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(8)
    other_BD = torch.randn(32, 1, generator=torch.Generator().manual_seed(1)) * torch.ones(8)
    plane_BD = torch.cat([flat_BD, 0.5 * other_BD], 1)  # shares of about 4/5 and 1/5
    assert 1.1 < effective_rank(plane_BD) < 2.0
    for x_BD, expected in ((plane_BD, 0.0), (flat_BD, 1.0)):
        monitor = Monitor({"targets": Floor(1.1, "the rank of the targets", "raise `decay`")})
        values = [monitor.measure({}, {"targets": x_BD, "other": x_BD})[0] for _ in range(3)]
        assert values[-1]["alarm/targets"] == expected
        assert values[-1]["alarm/other"] == 1.0


def test_a_term_below_its_floor_is_an_alarm_with_its_remedy_until_it_recovers() -> None:
    monitor = Monitor({"mam.usage": Floor(0.1, "the codebook", "raise `diversity`")})
    series = [0.09, 0.09, 0.1, 0.05, 0.05, 0.05, 0.05, 0.5, None, 0.0, 0.0, 0.0]
    found = [
        monitor.measure({} if x is None else {"term/mam.usage": x}, {"tiny": torch.ones(2, 2)})
        for x in series
    ]
    # a line without the term tells nothing
    on = [values.get("alarm/mam.usage") for values, _ in found]
    assert on == [0, 0, 0, 0, 0, 1, 1, 0, None, 0, 0, 1]
    texts = [warnings for _, warnings in found]
    assert [len(text) for text in texts] == [0] * 5 + [1] + [0] * 5 + [1]
    assert texts[5] == [
        "the codebook has collapsed: `mam.usage` is 0.05, below 0.1; raise `diversity`"
    ]


def test_terms_without_rows_are_one_warning_and_alarms_until_they_have_some() -> None:
    monitor = Monitor({})
    series = [(0, 4), (0, 4), (1, 0), (0, 0), (0, 0), (0, 0), (0, 3), (0, 0), (0, 0), (2, 0)]
    found = [
        monitor.measure({"count/av": a, "count/label": b, "count/label.accuracy": b}, {})
        for a, b in series
    ]
    alarms = [[values.get(f"alarm/{name}") for values, _ in found] for name in ("av", "label")]
    assert alarms == [
        [0, 0, None, 0, 0, 1, 1, 1, 1, None],
        [None, None, 0, 0, 1, 1, None, 0, 0, 1],
    ]
    texts = [(step, text) for step, (_, texts) in enumerate(found) for text in texts]
    assert [step for step, _ in texts] == [4, 5, 9]
    assert [text.split(":")[0] for _, text in texts] == [
        "no row has a part in `label`, `label.accuracy`",
        "no row has a part in `av`",
        "no row has a part in `label`, `label.accuracy`",
    ]
