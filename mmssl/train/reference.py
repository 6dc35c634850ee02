"""Loss curves to compare a run with.

    python -m mmssl.train.reference RUN OUT.json [--band 0.05]

A reference is a JSON file: `loss` by step, and `band`, the share by which a run may differ. A run
with `train.reference=OUT.json` compares every line of its log and says when it leaves the band.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mmssl.files import whole_file
from mmssl.types import UserError


@dataclass
class Reference:
    """The curve of another run; `inside`: this run has not left it, as far as is known."""

    source: str
    losses: dict[int, float]
    band: float
    inside: bool = True

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        """Read a file that `write` made.

        Raises:
            UserError: no such file, or no reference.
        """
        try:
            found = json.loads(Path(path).read_text())
            losses = {int(step): float(loss) for step, loss in found["loss"].items()}
            return cls(str(path), losses, float(found["band"]))
        except OSError as error:
            raise UserError(f"train.reference={path}: cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"train.reference={path}: no reference curve ({error!r}); make one with "
                "python -m mmssl.train.reference RUN OUT.json"
            ) from error

    def judge(self, step: int, loss: float) -> str:
        """What to say of the loss at a step; empty while nothing has changed."""
        expected = self.losses.get(step)
        if expected is None:
            return ""
        inside = abs(loss - expected) <= self.band * abs(expected)
        changed, self.inside = inside != self.inside, inside
        if not changed:
            return ""
        where = "is back in" if inside else "has left"
        return (
            f"the loss {where} the band of {self.source}: {loss:.4f}, the reference has "
            f"{expected:.4f} +- {self.band:.0%}"
        )


def write(run: Path, out: Path, band: float) -> None:
    """Make a reference of a run's log.

    Raises:
        UserError: the run has no log.
    """
    log = run / "log.jsonl"
    if not log.is_file():
        raise UserError(f"{log}: no such file; a run folder is what `mmssl train` wrote")
    losses = {}
    for text in log.read_text().splitlines():
        with suppress(ValueError):  # a line at which the run was killed
            line = json.loads(text)
            if line.get("loss") is not None:
                losses[line["step"]] = round(line["loss"], 5)
    with whole_file(out) as path:
        path.write_text(json.dumps({"band": band, "loss": losses}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m mmssl.train.reference", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--band", type=float, default=0.05)
    args = parser.parse_args(argv)
    write(args.run, args.out, args.band)


if __name__ == "__main__":
    main()
