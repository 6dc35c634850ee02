"""Masked prediction on real speech: digits of speakers that the probe has never heard.

    python tests/benchmarks/fsdd.py --data DIR [--work runs/fsdd] [--methods tera hubert] [--seed 0]

DIR holds `fsdd/recordings/DIGIT_SPEAKER_INDEX.wav` of the Free Spoken Digit Dataset (3,000
recordings of six speakers at 8 kHz, CC BY-SA 4.0, https://github.com/Jakobovski/free-spoken-digit-dataset).

Every method is trained on all recordings without labels, by its run in `configs/runs/*_tiny.yaml`.
Then its weights are frozen: a recording becomes the mean and standard deviation over the frames of
the last layer, and a logistic regression that never hears the sixth speaker says which digit it is.
The table shows the mean over the six speakers, the same with random weights, the same of all layers
side by side, and the baseline of log-mel statistics. (`mmssl scoreboard` holds more methods against
each other, with intervals and a layer that is chosen.) Units (clusters of MFCCs, and of what
HuBERT's iterations make of them) are compared with the digits, too.
Further arguments, before --methods, override keys of all runs. The text of `fsdd.notes.md` beside
the results, if there is one, ends the table.

Everything is kept under --work: a finished step is not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import SideCar
from mmssl.eval import folds, results
from mmssl.eval.corpora import CORPORA, make_shards, once, read_clips
from mmssl.eval.features import SIGNAL, FeatureSpec, clip_features
from mmssl.eval.layers import encode_signal
from mmssl.eval.probe import linear
from mmssl.eval.session import Session
from mmssl.eval.units import sample_counts, unit_quality
from mmssl.specs import DataSpec

Floats = NDArray[np.floating[Any]]

METHODS = (
    "wav2vec2_base",
    "hubert_it1",
    "hubert_it2",
    "wavlm_base",
    "data2vec_audio",
    "tera",
    "mockingjay",
)
LABELS = {"hubert_it1": "mfcc", "hubert_it2": "it1", "wavlm_base": "it1"}
CLUSTERS = {"mfcc": "50,200,500", "it1": "100", "it2": "100"}
CLUSTERED = {"it1": "hubert_it1", "it2": "hubert_it2"}  # whose layer; `mfcc` are MFCCs
LAYER = 3
INVERSE_REGULARISATION = 0.01  # 0.001 to 0.1 change the results by 0.01
FSDD = CORPORA["fsdd"]


def train(
    method: str, shards: Path, work: Path, seed: int, overrides: Sequence[str]
) -> tuple[Path, float]:
    """Train one method, with its labels made first; returns the run folder and the minutes."""
    run = work / method
    extra = [f"data.train={shards}", f"train.seed={seed}", *overrides]
    name = LABELS.get(method)
    if name is not None:
        extra.append(f"data.frame_labels.{name}={label(name, shards, work, seed, overrides)}")
    config = f"configs/runs/{method}_tiny.yaml"
    words = ["mmssl.cli", "train", config, f"out={run}", *extra]
    return run, once(work / f"{method}.done.json", words)["minutes"]


def label(name: str, shards: Path, work: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Side-car of the MFCC clusters, or of a layer of one of HuBERT's iterations."""
    out = work / f"{name}.safetensors"
    features = ["--features", "mfcc_cmvn"]
    if name in CLUSTERED:
        run, _ = train(CLUSTERED[name], shards, work, seed, overrides)
        features = ["--features", str(run), "--layer", str(LAYER)]
    words = ["data_tools.label_shards", str(shards), str(out), *features]
    words += ["--clusters", CLUSTERS[name], "--fit-share", "1.0", "--seed", str(seed)]
    once(work / f"{name}.done.json", words)
    return out


# --- features and probe


def encode(run: Path, shards: Path, layer: str) -> tuple[dict[str, Floats], list[dict[str, Any]]]:
    """Mean and deviation over frames, (rows, 2 D), with trained and random weights; and metas."""
    options = FeatureSpec(data=str(shards), layer=layer, micro_batch=16, resamples=0)
    found = clip_features(Session.open(run, options), "mean_std")
    return found.values, found.rows.meta


def probe(x: Floats, metas: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the digit by speaker left out, and their mean."""
    labels, _ = folds.read_labels(metas, "digit")
    speakers = folds.read_folds(metas, "speaker")
    scores, _ = linear(x, labels, speakers, grid=(INVERSE_REGULARISATION,))
    found = {s.name: folds.score(scores, labels, s.test)["accuracy"] for s in speakers}
    return {"mean": float(np.mean(list(found.values()))), **found}


def quality(car: Path, shards: Path) -> dict[str, Any]:
    """How much the units of a recording's frames say about its digit."""
    batches = eval_batches(shards, DataSpec(), {}, 64, None, workers=0)
    digits = {
        key: int(meta["digit"])
        for batch in batches
        for key, meta in zip(batch.keys, batch.meta, strict=True)
    }
    return asdict(unit_quality(sample_counts(SideCar(car), digits, 10)))


# --- the table


def save(found: dict[str, Any], out: Path) -> None:
    """Write `fsdd.json` and `fsdd.md`."""
    results.write(found, out / "fsdd.json")
    baseline = found["log_mel"]
    lines = [
        "# Digits of unheard speakers (FSDD)",
        "",
        "Accuracy of a logistic regression on frozen features of the last layer, leaving one",
        "speaker out; mean and range over the six speakers. Pretraining hears all recordings,",
        "without labels.",
        "",
        "| method | trained | range | random weights | gain | all layers (random) | minutes |",
        "|---|---|---|---|---|---|---|",
        f"| log-mel statistics | {baseline['mean']:.3f} | {_range(baseline)} | | | | |",
        *(_row(name, part) for name, part in found["methods"].items()),
        "",
    ]
    if found["units"]:
        lines += [
            "| units | PNMI against digits | accuracy of the most frequent digit |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {q['pnmi']:.3f} | {q['phone_purity']:.3f} |"
            for name, q in found["units"].items()
        ]
    lines += ["", f"{found['machine']['processor']}, {found['machine']['cores']} cores; "]
    lines += [f"torch {found['versions']['torch']}; seed {found['seed']}; {found['date']}.", ""]
    notes = out / "fsdd.notes.md"
    lines += [notes.read_text(encoding="utf-8")] if notes.exists() else []
    (out / "fsdd.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _row(name: str, part: dict[str, Any]) -> str:
    trained, random = part["trained"], part["random"]
    gain = trained["mean"] - random["mean"]
    return (
        f"| {name} | **{trained['mean']:.3f}** | {_range(trained)} | {random['mean']:.3f} | "
        f"{gain:+.3f} | {part['trained_all_layers']['mean']:.3f} "
        f"({part['random_all_layers']['mean']:.3f}) | {part['minutes']:.1f} |"
    )


def _range(found: dict[str, float]) -> str:
    values = [value for name, value in found.items() if name != "mean"]
    return f"{min(values):.3f} to {max(values):.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--work", type=Path, default=Path("runs/fsdd"))
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seed", type=int, default=0)
    args, overrides = parser.parse_known_args(argv)
    shards = make_shards(FSDD, read_clips(FSDD, args.data), args.work)
    signal = encode_signal(shards, FSDD.hz, keep=lambda meta: False)
    found: dict[str, Any] = {
        "log_mel": probe(signal.vectors[SIGNAL][SIGNAL], signal.rows.meta),
        "methods": {},
        "units": {},
        "seed": args.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    for method in args.methods:
        run, minutes = train(method, shards, args.work, args.seed, overrides)
        part: dict[str, Any] = {"minutes": minutes}
        for layer, tail in (("last", ""), ("all", "_all_layers")):
            vectors, metas = encode(run, shards, layer)
            for name in ("trained", "random"):
                part[name + tail] = probe(vectors[name], metas)
        found["methods"][method] = part
        save(found, args.out)
    for name in CLUSTERS:
        if CLUSTERED.get(name, "hubert_it1") in args.methods:
            car = label(name, shards, args.work, args.seed, overrides)
            found["units"][name] = quality(car, shards)
    save(found, args.out)


if __name__ == "__main__":
    main()
