"""R5 in short; `make chaos` injects two thousand."""

from faults import shards


def test_damaged_shards_are_detected_and_never_mixed():
    outcomes = shards.run(60, 1)
    assert {o.what for o in outcomes} == set(shards.DAMAGES)
    assert sum(o.injected for o in outcomes) == 60
    assert [o for o in outcomes if not o.passed] == []
