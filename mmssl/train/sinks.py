"""Where numbers go on rank 0: console, JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Sinks:
    """The run folder's `log.jsonl` and `tensorboard/`, and a progress bar.

    Where standard error is no terminal there is no bar, but one line per logged step. Logs that
    cannot be written, e.g. on a full disk, are no reason to stop: it is said once.
    """

    def __init__(self, folder: Path, total: int, step: int = 0) -> None:
        """Open the logs; a run that goes on after `step` of `total` steps appends to them."""
        self.total, self.quiet = total, not sys.stderr.isatty()
        self._lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        # Events a lost process wrote after its last checkpoint are hidden by `purge_step`.
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._unwritten = ""
        self._bar = tqdm(total=total, initial=step, disable=self.quiet, unit="step")
        if step:
            self.event(step, "resumed")

    def advance(self) -> None:
        """Move the bar."""
        self._bar.update(1)

    def set_step(self, step: int) -> None:
        """Put the bar to a step."""
        self._bar.n = step
        self._bar.refresh()

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Log that something has happened."""
        self._line({"step": step, "event": event, **facts})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Log one line of training values."""
        self._line({"step": step, **values})
        self._scalars("train", step, values)
        text = summary_line(values)
        if self.quiet:
            self.message(f"step {step}/{self.total}  {text}")
        else:
            self._bar.set_postfix_str(text)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Log one evaluation."""
        self._line({"step": step, "validation": dict(values)})
        self._scalars("validation", step, values)

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Flush and close."""
        self._bar.close()
        with self._unless_full():
            self._board.close()
        with self._unless_full():
            self._lines.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        with self._unless_full():
            self._lines.write(json.dumps(_without_nan(values)) + "\n")
            self._lines.flush()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        with self._unless_full():
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._unwritten:
                self._unwritten = str(error)
                self.message(f"warning: the logs cannot be written and will have gaps: {error}")


def summary_line(values: Mapping[str, float]) -> str:
    """The values a person watches, in one line."""
    terms = [f"{k.removeprefix('term/')} {v:.3f}" for k, v in values.items() if k[:5] == "term/"]
    return "  ".join(
        [
            f"loss {values['loss']:.4f}",
            *terms,
            f"lr {values['lr']:.2e}",
            f"grad {values['grad_norm']:.2f}",
            f"{values['samples_per_s']:.1f} clips/s",
            f"wait {values['data_wait']:.0%}",
        ]
    )


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN; readers other than Python's would stumble over one."""
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
