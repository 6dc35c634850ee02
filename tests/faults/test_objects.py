"""R13 in short: one pass over the shards through the failing proxy, replaced objects, a run."""

from __future__ import annotations

from faults import objects


def test_faults_of_object_storage_lose_and_mix_nothing() -> None:
    outcomes = objects.run(120, 1)
    assert sum(o.injected for o in outcomes) > 10
    assert [o for o in outcomes if not o.passed] == []
