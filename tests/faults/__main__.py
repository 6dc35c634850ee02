"""Inject faults in full counts and write the report.

python -m tests.faults [NAME ...] [--count N] [--seed S]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import (
    archives,
    clocks,
    disks,
    elastics,
    gradients,
    hangs,
    kills,
    media,
    mutilations,
    not_finite,
    objects,
    preemptions,
    report,
    resumes,
    shards,
    trust,
)

# name: (suite, full count)
SUITES: dict[str, tuple[report.Suite, int]] = {
    "kills": (kills.run, 300),
    "mutilations": (mutilations.run, 42),
    "resumes": (resumes.run, 200),
    "elastics": (elastics.run, 12),
    "gradients": (gradients.run, 40),
    "not_finite": (not_finite.run, 40),
    "hangs": (hangs.run, 40),
    "preemptions": (preemptions.run, 50),
    "disks": (disks.run, 20),
    "trust": (trust.run, 24),
    "shards": (shards.run, 2000),
    "media": (media.run, 1000),
    "archives": (archives.run, 1_000_000),
    "clocks": (clocks.run, 120),
    "objects": (objects.run, 2000),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--count", type=int, default=0, help="instead of the full one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = 0
    if odd := [name for name in args.names if name not in SUITES]:
        parser.error(f"no suite {', '.join(odd)}; there are: {', '.join(SUITES)}")
    for name in args.names or SUITES:
        suite, full = SUITES[name]
        outcomes = suite(args.count or full, args.seed)
        report.save(name, outcomes)
        for o in outcomes:
            print(f"{o.guarantee}  {o.injected:6d} injected  {o.lost} lost  {o.what}", flush=True)
            failed += o.lost
    print(report.REPORT)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
