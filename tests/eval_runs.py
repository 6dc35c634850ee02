"""Runs for tests of suites: tiny models with seeded weights on real shards of tones."""

from __future__ import annotations

from tiny_run import TREE, tiny_model, tiny_spec
from tone_shards import write_tones

import mmssl.eval.load

NAMES = ("low", "middle", "high")


def tone_rows(repeats=6, folds=3):
    """Scores and metas: single tones, half a second each, in folds; two voices."""
    scores, metas = [], []
    for r in range(repeats):
        for tone, name in enumerate(NAMES):
            scores.append([tone, tone])
            segments = [[0.0, 0.5, name], [0.5, 1.0, name]]
            voice = f"voice{r // folds % 2}"
            metas.append({"tone": name, "fold": r % folds, "voice": voice, "parts": segments})
    return scores, metas


def tone_run(folder, monkeypatch, **rows):
    """A run folder on shards of tones; weights of seed 0, the random twin's of seed 1."""
    scores, metas = tone_rows(**rows)
    shards = write_tones(folder / "corpus", scores, metas=metas)
    data = {"test": str(shards), "workers": 0, "isolate": False}
    views = {"audio": TREE["views"]["audio"]}
    spec = tiny_spec(
        data=data,
        views=views | {"video": TREE["views"]["video"]},
        towers={k: v for k, v in TREE["towers"].items() if k != "text"},
        tasks={"match": TREE["tasks"]["match"]},
    )

    def load_model(run, which="ema", random=False):
        return tiny_model(spec, seed=int(random)).eval(), spec, None

    monkeypatch.setattr(mmssl.eval.load, "load_model", load_model)
    run = folder / "run"
    run.mkdir()
    return run
