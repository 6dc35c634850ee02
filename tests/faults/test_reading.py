"""R6, R12 and R16 in short; `make chaos` runs the full counts."""

from faults import archives, clocks, media, report


def test_damaged_media_end_as_rows_or_counts():
    outcomes = media.run(25, 1)
    assert sum(o.injected for o in outcomes) > 45
    assert [o for o in outcomes if not o.passed] == []


def test_hostile_archives_are_refused():
    outcomes = archives.run(20_000, 1)
    assert len(outcomes) > 30
    assert [o for o in outcomes if not o.passed] == []


def test_sound_and_picture_keep_together():
    assert all(o.passed and o.injected == 5 for o in clocks.run(5, 1))


def test_committed_report_is_that_of_the_results():
    assert report.REPORT.read_text() == report.markdown()
    assert " NO " not in report.markdown()
