"""The fault suites in a short form; `make chaos` runs the full counts."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from faults import (
    disks,
    gradients,
    hangs,
    kills,
    mutilations,
    not_finite,
    preemptions,
    resumes,
    trust,
)
from faults.report import Outcome
from launching import TEST_LIMIT_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TEST_LIMIT_S)]


def holds(outcomes: Sequence[Outcome], at_least: int) -> None:
    assert sum(outcome.injected for outcome in outcomes) >= at_least
    assert [outcome for outcome in outcomes if outcome.lost] == []


def test_kills_while_saving_lose_nothing() -> None:
    holds(kills.run(3, seed=1), 3)


def test_damaged_checkpoints_are_refused_by_all_ranks() -> None:
    holds(mutilations.run(2 * len(mutilations.DAMAGES), seed=1), 14)


def test_resumes_at_any_moment_are_exact() -> None:
    holds(resumes.run(4, seed=1), 4)


def test_values_that_are_not_finite_change_nothing() -> None:
    holds(not_finite.run(12, seed=1), 12)


def test_several_processes_compute_what_one_does() -> None:
    holds(gradients.run(1, seed=1), 18)


def test_hangs_end() -> None:
    holds(hangs.run(len(hangs.CASES), seed=1), 5)


def test_requests_to_stop_cost_no_step() -> None:
    holds(preemptions.run(4, seed=1), 4)


@pytest.mark.skipif(not disks.possible(), reason="needs `unshare` and user namespaces")
def test_a_full_disk_costs_no_checkpoint() -> None:
    holds(disks.run(2, seed=1), 2)


def test_untrusted_files_run_no_code(tmp_path: Path) -> None:
    holds(trust.run(24, seed=1), 290)
    # the payloads are live: a trusting reader does execute them
    mark = tmp_path / "executed"
    for name in ("os.system", "exec", "runpy"):
        pickle.loads(pickle.dumps(trust.payloads(mark)[name]))
        assert mark.exists(), name
        os.unlink(mark)
