"""A damaged corpus becomes shards and a list of what was left out (in full: benchmarks)."""

import json
from collections import Counter

from faults.media import write_damaged

from data_tools.check_shards import check_folder
from data_tools.make_shards import make_shards
from data_tools.shard_writer import QUARANTINE
from data_tools.transcode import Encoding


def test_every_file_is_settled_once(tmp_path):
    """Mutated and crafted files, re-encoded: each in a shard or in the quarantine with a reason."""
    files = write_damaged(tmp_path / "media", 40, 3)
    (report,) = make_shards(
        tmp_path / "media", tmp_path / "out", workers=2, reencode=Encoding(short_side=16)
    )
    lines = (tmp_path / "out" / QUARANTINE).read_text().splitlines()
    bad = {x["media"].rpartition("/")[2]: x for x in map(json.loads, lines)}
    assert report.samples + report.quarantined == files
    assert report.quarantined == len(bad)
    assert check_folder(tmp_path / "out").damages == []
    reasons = Counter(x["reason"] for name, x in bad.items() if name.startswith("crafted"))
    # Frames too large, too many or too far apart; text, a playlist, an empty file.
    assert (reasons["bomb"], reasons["header"]) in ((3, 3), (4, 3), (3, 4), (4, 4))
    assert not reasons.keys() - {"bomb", "header"}
