"""Shards of clips of three tones, for tests of labels."""

import json
import wave as wavefile

import numpy as np

from data_tools.make_shards import make_shards

HZ, PART_S = 16000, 0.5
TONES_HZ = (220.0, 900.0, 3500.0)


def tones(numbers):
    """Half a second of each tone, one behind the other."""
    time = np.arange(round(PART_S * HZ)) / HZ
    noise = np.random.default_rng(len(numbers)).standard_normal(len(numbers) * len(time))
    wave = np.concatenate([0.4 * np.sin(2 * np.pi * TONES_HZ[n] * time) for n in numbers])
    return wave + 1e-3 * noise


SCORES = [[0, 1, 2], [2, 0], [1, 1, 0, 2], [2, 2, 1], [0, 2, 1, 0, 1]]


def write_tones(folder, scores, silent=(), metas=()):
    folder.mkdir()
    lines = []
    for k, score in enumerate(scores):
        with wavefile.open(str(folder / f"{k}.wav"), "wb") as out:
            out.setparams((1, 2, HZ, 0, "NONE", ""))
            out.writeframes(np.round(tones(score) * 32767).astype("<i2").tobytes())
        has = ["text"] if k in silent else ["audio"]
        line = {"media": f"{k}.wav", "has": has, "caption": "x", "source": f"s{k}"}
        lines.append(line | ({"meta": metas[k]} if metas else {}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_shards(folder, folder / "shards", shard_samples=3, workers=1)
    return folder / "shards"
