"""What a run of injected faults found, and the table of all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
_TOLD = "found "
RESULTS, REPORT = HERE / "results", HERE / "report.md"


@dataclass(frozen=True)
class Outcome:
    """One kind of fault. lost: faults after which what is guaranteed did not hold."""

    guarantee: str
    what: str
    injected: int
    lost: int
    passed: bool
    seconds: float


Case = tuple[str, bool] | tuple[str, bool, float]


def collect(guarantee: str, cases: Iterable[Case]) -> list[Outcome]:
    """Outcomes by kind of fault, of (kind, whether the guarantee held) one by one.

    A case took the time since the one before, unless it says how many seconds it took.
    """
    found: dict[str, list[float]] = {}
    began = time.perf_counter()
    for what, held, *took in cases:
        now = time.perf_counter()
        row = found.setdefault(what, [0, 0, 0.0])
        row[0], row[1], row[2] = (
            row[0] + 1,
            row[1] + (not held),
            row[2] + sum(took or [now - began]),
        )
        began = now
    return [
        Outcome(guarantee, what, int(injected), int(lost), not lost, round(seconds, 2))
        for what, (injected, lost, seconds) in found.items()
    ]


def tell(outcomes: Sequence[Outcome]) -> None:
    """Print the outcomes of a suite that runs in a process of its own; `heard` reads them."""
    print(_TOLD, json.dumps([asdict(outcome) for outcome in outcomes]), flush=True)


def heard(printed: str) -> list[Outcome]:
    """What `tell` has printed."""
    line = next(line for line in printed.splitlines() if line.startswith(_TOLD))
    return [Outcome(**row) for row in json.loads(line.removeprefix(_TOLD))]


def save(name: str, outcomes: Sequence[Outcome]) -> None:
    """Keep the outcomes of one suite, and write the table of all suites anew."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps([asdict(o) for o in outcomes], indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    REPORT.write_text(markdown())


def markdown() -> str:
    """The table of all saved outcomes."""
    rows = [
        Outcome(**row) for f in sorted(RESULTS.glob("*.json")) for row in json.loads(f.read_text())
    ]
    rows.sort(key=lambda row: int(row.guarantee[1:]))
    lines = [
        "# Injected faults",
        "",
        "Written by `make chaos`; the modules beside this file explain the guarantees.",
        "",
        "| guarantee | fault | injected | lost | passed | seconds |",
        "| --- | --- | ---: | ---: | --- | ---: |",
        *(
            f"| {r.guarantee} | {r.what} | {r.injected} | {r.lost} "
            f"| {'yes' if r.passed else 'NO'} | {r.seconds:.1f} |"
            for r in rows
        ),
    ]
    total, lost = sum(r.injected for r in rows), sum(r.lost for r in rows)
    return "\n".join([*lines, f"| all | | {total} | {lost} | {'NO' if lost else 'yes'} | |", ""])


Suite = Callable[[int, int], list[Outcome]]
