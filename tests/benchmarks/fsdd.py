"""Masked prediction on real speech: digits of speakers that the probe has never heard.

    python tests/benchmarks/fsdd.py --data DIR [--work runs/fsdd] [--methods tera hubert] [--seed 0]

DIR holds `fsdd/recordings/DIGIT_SPEAKER_INDEX.wav` of the Free Spoken Digit Dataset (3,000
recordings of six speakers at 8 kHz, CC BY-SA 4.0, https://github.com/Jakobovski/free-spoken-digit-dataset).

Every method is trained on all recordings without labels, by its run in `configs/runs/*_tiny.yaml`.
Then its weights are frozen: a recording becomes the mean and standard deviation over the frames of
the last layer, and a logistic regression that never hears the sixth speaker says which digit it is.
The table shows the mean over the six speakers, the same with random weights, the same of all layers
side by side, and the baseline of log-mel statistics. Units
(clusters of MFCCs, and of what HuBERT's iterations make of them) are compared with the digits, too.
Further arguments, before --methods, override keys of all runs. The text of `fsdd.notes.md` beside
the results, if there is one, ends the table.

Everything is kept under --work: a finished step is not computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import SideCar
from mmssl.eval import results
from mmssl.eval.load import load_model
from mmssl.eval.units import sample_counts, unit_quality
from mmssl.specs import DataSpec, ViewSpec
from mmssl.towers import Tower
from mmssl.types import ViewBatch

Floats = NDArray[np.float64]

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
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEAKERS = 6
INVERSE_REGULARISATION = 0.01  # 0.001 to 0.1 change the results by 0.01
RATE = 8000  # Hz of the recordings


def once(mark: Path, *command: str | Path) -> None:
    """Run a module of the project unless the mark says that it has been run."""
    line = [str(word) for word in command]
    if mark.exists():
        if json.loads(mark.read_text())["command"] != line:
            sys.exit(
                f"{mark} was made by another command than {' '.join(line)}; use another --work"
            )
        return
    print("+", *line, flush=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", *line], check=True)
    mark.write_text(json.dumps({"command": line, "minutes": (time.monotonic() - begin) / 60}))


def make_shards(data: Path, work: Path) -> Path:
    """All recordings as one shard folder."""
    files = sorted((data / "fsdd" / "recordings").glob("*.wav"))
    if len(files) < SPEAKERS:
        sys.exit(f"{data / 'fsdd' / 'recordings'}: no recordings; see --help")
    rows = []
    for file in files:
        digit, speaker, index = file.stem.split("_")
        letters = " ".join(NAMES[int(digit)])  # read by configs/runs/unispeech_tiny.yaml alone
        meta = {"digit": digit, "speaker": speaker, "index": int(index), "letters": letters}
        row = {"media": str(file.resolve()), "source": file.stem, "split": "train"}
        rows.append({**row, "meta": meta})
    work.mkdir(parents=True, exist_ok=True)
    manifest = work / "fsdd.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    once(work / "shards.done.json", "data_tools.make_shards", manifest, work / "shards")
    return work / "shards" / "train"


def train(method: str, shards: Path, work: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Train one method, with its labels made first; returns the run folder."""
    run = work / method
    extra = [f"data.train={shards}", f"train.seed={seed}", *overrides]
    name = LABELS.get(method)
    if name is not None:
        extra.append(f"data.frame_labels.{name}={label(name, shards, work, seed, overrides)}")
    config = f"configs/runs/{method}_tiny.yaml"
    once(work / f"{method}.done.json", "mmssl.cli", "train", config, f"out={run}", *extra)
    return run


def label(name: str, shards: Path, work: Path, seed: int, overrides: Sequence[str]) -> Path:
    """Side-car of the MFCC clusters, or of a layer of one of HuBERT's iterations."""
    out = work / f"{name}.safetensors"
    features: list[str | Path] = ["--features", "mfcc_cmvn"]
    if name in CLUSTERED:
        run = train(CLUSTERED[name], shards, work, seed, overrides)
        features = ["--features", run, "--layer", str(LAYER)]
    options = ["--clusters", CLUSTERS[name], "--fit-share", "1.0", "--seed", str(seed)]
    once(work / f"{name}.done.json", "data_tools.label_shards", shards, out, *features, *options)
    return out


# --- features


@torch.inference_mode()
def encode(run: Path, shards: Path, random: bool) -> tuple[list[Floats], list[dict[str, Any]]]:
    """Mean and deviation over frames of each layer, (rows, 2 D), and metas."""
    model, spec, _ = load_model(run, random=random)
    name, view = next((n, v) for n, v in spec.views.items() if v.modality == "audio")
    tower = model.towers[view.tower_name]
    assert isinstance(tower, Tower)
    whole = view.model_copy(update={"crop_s": 0.0, "augment": [], "mix": None})
    data = spec.data.model_copy(update={"frame_labels": {}})
    rows, metas = [], []
    for batch in eval_batches(shards, data, {name: whole}, 16, None, workers=0):
        layers, pad_PN = tower.layers(batch.views[name])
        rows.append([_statistics(x_PND, ~pad_PN) for x_PND in layers[1:]])
        metas += batch.meta
    return [torch.cat(parts).double().numpy() for parts in zip(*rows, strict=True)], metas


def _statistics(x_PND: torch.Tensor, valid_PN: torch.Tensor) -> torch.Tensor:
    weight = valid_PN[..., None].float()
    count = weight.sum(1)
    mean = (x_PND * weight).sum(1) / count
    square = ((x_PND - mean[:, None]).square() * weight).sum(1) / count
    return torch.cat([mean, square.sqrt()], -1)


def log_mel(shards: Path) -> tuple[Floats, list[dict[str, Any]]]:
    """The baseline: mean, deviation, maximum and deviation of differences of 64 log-mel bands."""
    mel = torchaudio.transforms.MelSpectrogram(RATE, 512, 200, 80, n_mels=64)
    view = ViewSpec(modality="audio", hz=RATE)
    rows, metas = [], []
    for batch in eval_batches(shards, DataSpec(), {"x": view}, 1, None, workers=0):
        bands_FT = (mel(_wave(batch.views["x"])) + 1e-6).log()
        parts = [bands_FT.mean(1), bands_FT.std(1), bands_FT.amax(1), bands_FT.diff(dim=1).std(1)]
        rows.append(torch.cat(parts))
        metas += batch.meta
    return torch.stack(rows).double().numpy(), metas


def _wave(view: ViewBatch) -> torch.Tensor:
    return view.data[0, : int(view.lengths_P[0])]


# --- probe


def probe(x: Floats, metas: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the digit by speaker left out, and their mean."""
    speakers = np.asarray([m["speaker"] for m in metas])
    digits = np.asarray([m["digit"] for m in metas])
    found = {}
    for speaker in sorted(set(speakers)):
        out = speakers == speaker
        regression = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=500)
        model = make_pipeline(StandardScaler(), regression)
        model.fit(x[~out], digits[~out])
        found[str(speaker)] = float(model.score(x[out], digits[out]))
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
    shards = make_shards(args.data, args.work)
    found: dict[str, Any] = {
        "log_mel": probe(*log_mel(shards)),
        "methods": {},
        "units": {},
        "seed": args.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": results.versions(),
        "machine": results.machine(),
    }
    for method in args.methods:
        run = train(method, shards, args.work, args.seed, overrides)
        mark = json.loads((args.work / f"{method}.done.json").read_text())
        part: dict[str, Any] = {"minutes": mark["minutes"]}
        for name, random in (("trained", False), ("random", True)):
            layers, metas = encode(run, shards, random)
            part[name] = probe(layers[-1], metas)
            part[f"{name}_all_layers"] = probe(np.concatenate(layers, 1), metas)
        found["methods"][method] = part
        save(found, args.out)
    for name in CLUSTERS:
        if CLUSTERED.get(name, "hubert_it1") in args.methods:
            car = label(name, shards, args.work, args.seed, overrides)
            found["units"][name] = quality(car, shards)
    save(found, args.out)


if __name__ == "__main__":
    main()
