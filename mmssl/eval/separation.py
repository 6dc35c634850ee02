"""`mmssl eval separation RUN`: how much clearer clips are after a mixture of them is taken apart.

Every clip of the test set is mixed with others of other sources, which are drawn among the
`micro_batch` clips that are read together; outputs are compared with the clips themselves.

Letters in shapes: P mixtures, K sounds, M outputs, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mmssl.eval.bootstrap import interval
from mmssl.eval.embed import Rows, frozen
from mmssl.eval.items import Metrics
from mmssl.eval.results import Results, plot
from mmssl.eval.session import RANDOM, TRAINED, Session, SuiteSpec
from mmssl.model import Model
from mmssl.objectives.separation import best_permutation, best_remix, remixed, si_sdr
from mmssl.tasks.separate import Mixtures, Separate
from mmssl.types import UserError

_MIXTURE = "mixture"
_LIMIT_DB = 30.0  # of the sums of outputs


class Options(SuiteSpec):
    """What can be set behind `mmssl eval separation RUN`."""

    sounds: int = Field(2, ge=2, le=3)  # clips in a mixture
    db: float = Field(5.0, ge=0)  # levels of the others lie within so many dB of the clip's


@dataclass
class Collected:
    """SI-SDR in dB, (K,) of every mixture, by model and way of choosing outputs."""

    rows: Rows = field(default_factory=Rows)
    read: list[dict[str, Any]] = field(default_factory=list)
    values: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, name: str, value_PK: Tensor) -> None:
        """Note the values of some mixtures."""
        self.values.setdefault(name, []).append(value_PK.double().cpu().numpy())


def separator(model: Model) -> Separate:
    """The model's separation task.

    Raises:
        UserError: it has none.
    """
    for task in model.tasks.values():
        if isinstance(task, Separate):
            return task
    raise UserError(f"{model.spec.name}: has no `separate` task, which takes mixtures apart")


def evaluate(session: Session) -> Results:
    """Results of the suite.

    Raises:
        UserError: the run takes no mixtures apart, or into fewer outputs than sounds; or no clip
            has enough others beside it.
    """
    options = cast("Options", session.options)
    task = separator(session.models[TRAINED])
    if task.spec.outputs < options.sounds:
        raise UserError(
            f"separation: sounds={options.sounds}, but {session.spec.name} has "
            f"{task.spec.outputs} outputs; ask for fewer or use another run"
        )
    found = collect(session, task.spec.view, options)
    if not found.rows.keys:
        raise UserError(
            f"separation: no clip has {options.sounds - 1} clips of other sources beside it; give "
            "a larger micro_batch, or data of several sources that are not sorted by source"
        )
    result = session.facts("separation", found.read)
    made = {name: _numbers(session, found, name) for name in session.models}
    missing = len(found.read) - len(found.rows.keys)
    result["separation"] = {**made[TRAINED], "n": len(found.rows.keys), "n_missing": missing}
    if RANDOM in made:
        result["random_encoder"] = {"separation": made[RANDOM]}
    x = ["one output each", "outputs added up"]
    lines = {name: [row["gain_db"], row["added_up"]["gain_db"]] for name, row in made.items()}
    result["plots"] = [plot("SI-SDR above that of the mixture (dB)", "estimate", x, lines)]
    return result


def collect(session: Session, view: str, options: Options) -> Collected:
    """SI-SDR of mixtures, outputs and sums of outputs on all clips."""
    found = Collected()
    task = separator(session.models[TRAINED])
    device = next(task.parameters()).device
    with frozen(session.models.values()):
        for batch in session.batches({view: session.spec.views[view]}):
            found.read += batch.meta
            batch = batch.to(device)
            mixed = task.mixtures(batch, options.sounds, (-options.db, options.db))
            mixed = mixed.of(mixed.valid_P & mixed.sound_PKS.any(-1).all(1))
            if not len(mixed.sound_PKS):
                continue
            found.rows.add_some(batch, mixed.heard.rows_P.tolist())
            lengths_P1 = mixed.heard.lengths_P[:, None]
            heard_P1S = mixed.heard.data[:, None]
            found.add(_MIXTURE, si_sdr(heard_P1S, mixed.sound_PKS, lengths_P1))
            for name, model in session.models.items():
                output_PMS = separator(model).separate(model.passes(batch), mixed.heard)
                one_PK, sum_PK = measured(output_PMS, mixed)
                found.add(name, one_PK)
                found.add(f"{name}/added_up", sum_PK)
    return found


def measured(output_PMS: Tensor, mixed: Mixtures) -> tuple[Tensor, Tensor]:
    """(P, K) SI-SDR with one output for each sound, and with all outputs added up to sounds.

    Both choices know the sounds: the order with the highest sum, the sums of least error.
    """
    sound_PKS, lengths_P11 = mixed.sound_PKS, mixed.heard.lengths_P[:, None, None]
    table_PMK = si_sdr(output_PMS[:, :, None], sound_PKS[:, None], lengths_P11)
    audible_PK = torch.ones_like(table_PMK[:, 0], dtype=torch.bool)
    index_PK = best_permutation(-table_PMK, audible_PK)
    place_PM = best_remix(output_PMS, sound_PKS, _LIMIT_DB)
    sums_PKS = remixed(output_PMS, place_PM, sound_PKS.shape[1])
    sums_PK = si_sdr(sums_PKS, sound_PKS, lengths_P11[..., 0])
    return table_PMK.gather(1, index_PK[:, None])[:, 0], sums_PK


def _numbers(session: Session, found: Collected, name: str) -> Metrics:
    """Means over sounds and mixtures in dB, with intervals of a bootstrap over mixtures."""
    before_N = np.concatenate(found.values[_MIXTURE]).mean(1)
    result: Metrics = {"mixture_db": float(before_N.mean())}
    for key in ("", "added_up"):
        after_N = np.concatenate(found.values["/".join(filter(None, (name, key)))]).mean(1)
        part = result.setdefault(key, {}) if key else result
        part["si_sdr_db"] = float(after_N.mean())
        part["gain_db"] = float((after_N - before_N).mean())
        if session.options.resamples:
            draws = {"resamples": session.options.resamples, "seed": session.options.seed}
            part["ci"] = {"gain_db": list(interval(after_N - before_N, **draws))}  # type: ignore[arg-type]
        if name == TRAINED:
            metric = ".".join(filter(None, ("separation", key, "gain_db")))
            session.items.add(metric, found.rows, range(len(after_N)), after_N - before_N)
    return result
