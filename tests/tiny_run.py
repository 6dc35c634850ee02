"""A run with every kind of task, small enough for a test; and batches for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY, fake_batch
from mmssl.model import Model
from mmssl.specs import RunSpec
from mmssl.types import Batch, ViewBatch

WIDTH = 16
TREE: dict[str, Any] = {
    "name": "tiny",
    "shared": {"width": WIDTH, "layers": 1, "head_size": 8, "hidden": 32, "own_norms": True},
    "towers": {
        "audio": {
            "modality": "audio",
            "frontend": {"kind": "log_mel", "n_fft": 256, "win": 256, "hop": 160, "n_mels": 16},
            "cut": {"kind": "conv", "channels": [4, 8], "strides": [[2, 4], [2, 4]]},
        },
        "video": {
            "modality": "video",
            "frontend": {"kind": "frames"},
            "cut": {
                "kind": "conv",
                "channels": [4, 8],
                "strides": [4, 2],
                "temporal_kernel": 2,
                "temporal_stride": 2,
            },
        },
        "text": {"modality": "text", "frontend": {"kind": "ids"}, "cut": {"kind": "embedding"}},
    },
    "joints": {
        "av": {
            "of": ["video", "audio"],
            "reduce": "max",
            "backbone": {"width": WIDTH, "layers": 1, "head_size": 8, "hidden": 32},
        }
    },
    "views": {
        "video": {"modality": "video", "crop_s": 1.0, "fps": 4, "size": 16},
        "audio": {"modality": "audio", "crop_s": 1.0},
        "text": {"modality": "text", "length": 8},
    },
    "tasks": {
        "align": {
            "kind": "pairs",
            "heads": {
                "spaces": {
                    "av": {"dim": 8, "pool": "steps", "steps": 2},
                    "avt": {"dim": 8, "pool": "agg"},
                }
            },
            "pairs": {
                "va": {"between": ["video", "audio"], "space": "av"},
                "at": {
                    "between": ["audio", "text"],
                    "space": "avt",
                    "objective": {"kind": "info_nce", "equal_text": True},
                },
                "vt": {
                    "between": ["video", "text"],
                    "space": "avt",
                    "objective": {"kind": "sigmoid"},
                },
                "dense": {
                    "between": ["video", "audio"],
                    "score": {"kind": "map", "dim": 8, "aligned": True},
                },
            },
        },
        "match": {
            "kind": "classify",
            "target": {"kind": "match", "between": ["video", "audio"]},
            "score": {"kind": "joint", "joint": "av"},
        },
        "masked_audio": {
            "kind": "masked",
            "view": "audio",
            "mask": {"rule": "blocks", "ratio": 0.5, "block": [2, 1]},
            "target": {"kind": "patches"},
        },
        "masked_video": {
            "kind": "masked",
            "view": "video",
            "mask": {"rule": "tubes", "ratio": 0.5},
            "target": {"kind": "patches"},
            "rows": 0.7,
        },
        "masked_text": {
            "kind": "masked",
            "view": "text",
            "mask": {"rule": "words", "ratio": 0.3},
            "target": {"kind": "ids"},
        },
    },
}


def tiny_spec(**changes: Any) -> RunSpec:
    """The run with some of its top-level entries replaced."""
    return RunSpec.model_validate(TREE | changes)


def recipe() -> dict[str, Any]:
    """Changes that wire the tiny run as the flagship.

    Heads with batch norm, cells of what moves in each frame against pooled sounds and captions, the
    match on a space of the pairs.
    """
    video = TREE["towers"]["video"] | {
        "frontend": {"kind": "frames", "channels": "motion"},
        "cut": {"kind": "conv", "channels": [4, 8], "strides": [4, 1], "merge": 2, "merge_time": 2},
    }
    score = {"kind": "map", "dim": 8, "aligned": True, "cells": "stem", "normalize": "steps"}
    score |= {"weigh": "motion", "query": "max"}
    align = TREE["tasks"]["align"]
    pairs = {name: pair for name, pair in align["pairs"].items() if name != "dense"}
    pairs |= {
        "where": {"between": ["video", "audio"], "score": score},
        "where_text": {"between": ["video", "text"], "score": score},
    }
    match = {"target": TREE["tasks"]["match"]["target"], "score": {"kind": "distance"}}
    tasks = {
        "align": align | {"heads": align["heads"] | {"form": "bn_linear"}, "pairs": pairs},
        "match": {"kind": "classify", "space": "align.av", **match},
    }
    return {
        "towers": TREE["towers"] | {"video": video},
        "joints": {},
        "tasks": TREE["tasks"] | tasks,
    }


def localizers() -> dict[str, Any]:
    """Changes that wire the tiny run as the localization methods, with all their scores."""
    score = {"kind": "map", "dim": 8}
    pairs = {
        "triplet": {"score": score, "objective": {"kind": "triplet"}},
        "soft": {
            # LVS's own 1/0.03 and 0.07 amplify the rounding of fp32 a hundredfold
            "score": {
                **score,
                "query": "max",
                "space": "soft",
                "form": "norm_linear",
                "sharpness": 3.0,
            },
            "objective": {"kind": "info_nce", "form": "one_way", "temperature": 0.5},
        },
        "heads": {
            "score": {**score, "heads": 2, "normalize": "none", "form": "norm_linear"},
            "objective": {"kind": "info_nce", "temperature": 2.0},
            "penalties": {"negative": 0.1, "variation": 0.1, "overlap": 0.1, "temperature": 1.0},
        },
    }
    between = {"between": ["video", "audio"]}
    match = {"kind": "match", **between}
    towers = {name: TREE["towers"][name] for name in ("video", "audio")}
    best = {**score, "query": "max", "form": "mlp", "normalize": "none", "bias": -0.1}
    return {
        "towers": towers,
        "views": {name: TREE["views"][name] for name in towers},
        "joints": {},
        "tasks": {
            "align": {"kind": "pairs", "pairs": {n: {**between, **p} for n, p in pairs.items()}},
            "match": {"kind": "classify", "target": match, "score": best},
        },
    }


def siamese() -> dict[str, Any]:
    """Changes that wire the tiny run as the siamese methods, between modalities.

    Sounds are augmented as spectrograms; targets are averages of the towers and their shared
    transformer.
    """
    head = {"widths": [16, 8]}
    task = {"kind": "siamese", "projector": head}
    byol = {"predictor": head, "decay": 0.9, "objective": {"kind": "byol"}}
    simsiam = {"predictor": head, "objective": {"kind": "cosine"}}
    moco = {"decay": 0.9, "objective": {"kind": "queue", "size": 6, "symmetric": True}}
    barlow = {"objective": {"kind": "cross_correlation"}, "weight": 0.1}
    return {
        "towers": TREE["towers"] | {"audio": TREE["towers"]["audio"] | {"augment": {"bank": 6}}},
        "joints": {},
        "tasks": {
            "byol": {**task, **byol, "between": ["audio", "video"]},
            "simsiam": {**task, **simsiam, "between": ["video", "text"]},
            "moco": {**task, **moco, "between": ["video", "audio"]},
            "barlow": {**task, **barlow, "between": ["audio", "text"]},
        },
    }


def compared() -> dict[str, Any]:
    """Changes that wire the tiny run with pairs whose rows of all ranks meet in one loss.

    A label is said in terms of the pairs, behind a batch norm (CLAR); sounds are laid over those
    of other ranks (Jansen et al.).
    """
    between = {"between": ["video", "audio"]}
    # light: the gradient of MINE's last bias is a rounding error, which must stay one
    critic = {"score": {"kind": "fusion", "hidden": 8}, "weight": 0.25}
    pairs = {
        "two_n": {"objective": {"kind": "info_nce", "form": "two_n", "temperature": 0.5}},
        "mined": {"objective": {"kind": "semi_hard", "margin": 0.5}},
        "mixed": {"objective": {"kind": "semi_hard", "margin": 0.5, "negative": "mixed"}},
        **{
            b: {**critic, "objective": {"kind": "critic", "bound": b}}
            for b in ("bce", "mine", "nce")
        },
    }
    label = {"kind": "label", "view": "audio", "also": ["video"], "field": "kind"}
    label |= {"form": "bn_relu_linear", "classes": ["a", "b"]}
    heads = {"spaces": {"z": {"dim": 8, "pool": "mean"}}}
    audio = TREE["towers"]["audio"]
    audio = audio | {"frontend": {**audio["frontend"], "log": "ln_eps"}}
    mel = [{"kind": kind} for kind in ("mel_noise", "mel_shift", "mel_mix")]
    return {
        "towers": {"video": TREE["towers"]["video"], "audio": audio},
        "views": {
            "video": TREE["views"]["video"],
            "audio": {**TREE["views"]["audio"], "augment": mel},
        },
        "joints": {},
        "data": {"labels": ["kind"]},
        "tasks": {
            "align": {
                "kind": "pairs",
                "heads": heads,
                "pairs": {n: {**between, **p} for n, p in pairs.items()},
            },
            "classes": {"kind": "classify", "space": "align.z", "target": label},
        },
    }


def unlabelled() -> dict[str, Any]:
    """Changes that wire the tiny run with prototypes, turns, order and clusters."""
    towers = {name: TREE["towers"][name] for name in ("video", "audio")}
    targets = {
        "turn": {"kind": "rotation", "view": "video"},
        "order": {"kind": "order", "view": "audio", "tiles": [2]},
        "cluster": {
            "kind": "clusters",
            "view": "audio",
            "clips": 20,
            "clusters": 2,
            "components": 1,
        },
    }
    swav = {
        "kind": "prototypes",
        "assigned": ["video", "audio"],
        "projector": {"widths": [16, 8]},
        "prototypes": 4,
        # SwAV's own amplify the rounding of fp32
        "temperature": 0.5,
        "epsilon": 0.5,
        "queue": 6,
    }
    return {
        "towers": towers,
        "views": {name: TREE["views"][name] for name in towers},
        "joints": {},
        "tasks": {
            "swav": swav,
            **{name: {"kind": "classify", "target": t} for name, t in targets.items()},
        },
    }


def future() -> dict[str, Any]:
    """Changes that wire the tiny run as CPC2: a copy of the sound, negatives from all rows.

    Recurrent layers in the tower, a transformer in front of the heads.
    """
    audio = {
        "modality": "audio",
        "frontend": {"kind": "waveform"},
        "cut": {"kind": "wave_conv", "channels": 8, "kernels": [40, 16], "strides": [20, 16]},
        "positions": {"kind": "none"},
        "backbone": {"kind": "recurrent", "width": WIDTH, "layers": 2, "residual": True},
        "globals": [],
    }
    target = {"kind": "latents", "objective": "nce", "negatives": 16, "negatives_of": "batch"}
    target |= {"predictor": {"width": WIDTH, "layers": 1, "head_size": 8, "causal": True}}
    task = {"kind": "future", "view": "past", "predicts": "clean", "target": target, "steps": 2}
    view = {"modality": "audio", "crop_s": 0.5}
    return {
        "shared": None,
        "towers": {"audio": audio},
        "views": {"past": view, "clean": view},
        "joints": {},
        "tasks": {"future": task},
    }


def rebuilt() -> dict[str, Any]:
    """Changes that wire the tiny run with slices behind an averaged codebook, and their gap."""
    slices = {
        "kind": "reconstruct",
        "view": "audio",
        "slices": {"past": 1, "future": 1, "frames": 16, "guard": 2},
        "pool": "mean",
        "quantizer": {"kind": "nearest", "groups": 1, "entries": 4, "project": False},
        "decoder": {"kind": "conv", "channels": [4, 4]},
    }
    slices["quantizer"] |= {"ema": 0.5, "restart": 0.5}
    gap = {"kind": "classify", "target": {"kind": "gap", "view": "audio", "frames": 16}}
    return {
        "towers": {"audio": TREE["towers"]["audio"]},
        "views": {"audio": TREE["views"]["audio"]},
        "joints": {},
        "tasks": {"slices": slices, "gap": gap},
    }


def workers() -> dict[str, Any]:
    """Changes that wire the tiny run as PASE: signals of a chunk, and two chunks step by step."""
    audio = {
        "modality": "audio",
        "frontend": {"kind": "waveform"},
        "cut": {"kind": "patches", "patch": [160]},
    }
    spaces = {
        "frames": {"dim": 16, "pool": "steps", "steps": 4},
        "mean": {"dim": 8, "pool": "mean"},
    }
    critic = {"between": ["anchor", "context"], "score": {"kind": "fusion", "hidden": 8}}
    pairs = {
        "lim": {"space": "frames", "objective": {"kind": "critic", "per_step": True}},
        "gim": {"space": "mean", "objective": {"kind": "critic"}},
    }
    regress = {"kind": "regress", "view": "anchor"}
    spectrum = {"kind": "log_spectrogram", "n_fft": 256, "win": 256, "hop": 160, "f_max": 0}
    view = {"modality": "audio", "crop_s": 0.5}
    return {
        "towers": {"audio": audio},
        "views": {"anchor": view, "context": view},
        "joints": {},
        "tasks": {
            "lps": {**regress, "signal": spectrum},
            "prosody": {**regress, "signal": {"kind": "prosody"}},
            "mi": {
                "kind": "pairs",
                "heads": {"spaces": spaces},
                "pairs": {n: {**critic, "weight": 0.25, **p} for n, p in pairs.items()},
            },
            "spc": {"kind": "classify", "target": {"kind": "sequence", "view": "anchor"}},
        },
    }


def separation() -> dict[str, Any]:
    """Changes that wire the tiny run with mixtures of rows of all ranks, taken apart both ways."""
    cut = {"kind": "wave_conv", "channels": 8, "kernels": [80], "strides": [40], "norm": "none"}
    audio = {
        "modality": "audio",
        "frontend": {"kind": "waveform"},
        "cut": {**cut, "activation": "none", "synthesis": True},
    }
    task = {"kind": "separate", "view": "audio", "mask": "sigmoid", "weight": 0.1}
    remix = {"kind": "remix", "outputs": 3}
    return {
        "towers": {"audio": audio},
        "views": {"audio": {"modality": "audio", "crop_s": 0.25}},
        "joints": {},
        "tasks": {
            "pit": {**task, "sounds": 2, "consistency": "learned"},
            "mixit": {**task, "sounds": 2, "objective": remix, "consistency": "equal"},
        },
    }


RECIPES = {
    "compared": compared,
    "every_part": dict,
    "flagship": recipe,
    "future": future,
    "localizers": localizers,
    "rebuilt": rebuilt,
    "separation": separation,
    "siamese": siamese,
    "unlabelled": unlabelled,
    "workers": workers,
}


def tiny_model(
    spec: RunSpec | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Model:
    """A model with seeded weights."""
    torch.manual_seed(seed)
    return build_model(spec or tiny_spec(), VOCABULARY, SPECIAL, BEGINS).to(dtype)


def tiny_batch(
    rows: int = 6, seed: int = 0, missing: bool = True, spec: RunSpec | None = None
) -> Batch:
    """A batch in which row 0 lacks text, row 1 audio, row 2 video."""
    return fake_batch(spec or tiny_spec(), rows, seed, missing)


def take_rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch as a batch of their own; views without an item get a dummy."""
    index = torch.tensor(rows)
    return Batch(
        {name: _take(view, index) for name, view in batch.views.items()},
        [batch.keys[i] for i in rows],
        batch.source_B[index],
        batch.text_B[index],
        batch.index_B[index],
        [batch.meta[i] for i in rows] if batch.meta else [],
    )


def _take(view: ViewBatch, index: torch.Tensor) -> ViewBatch:
    place = torch.full((view.present_BL.shape[0],), -1)
    place[index] = torch.arange(len(index))
    kept = (place[view.rows_P] >= 0).nonzero()[:, 0]
    dummy = len(kept) == 0
    kept = torch.zeros(1, dtype=torch.long) if dummy else kept
    rows = torch.zeros(1, dtype=torch.long) if dummy else place[view.rows_P[kept]]
    segments = {
        name: getattr(view, name)[kept]
        for name in ("split_P", "order_P")
        if getattr(view, name) is not None
    }
    return replace(
        view,
        **segments,
        data=view.data[kept],
        lengths_P=view.lengths_P[kept],
        rows_P=rows,
        slots_P=view.slots_P[kept],
        seeds_P=view.seeds_P[kept],
        start_s_P=view.start_s_P[kept],
        present_BL=view.present_BL[index],
        dummy=dummy,
        labels={n: replace(found, ids=found.ids[kept]) for n, found in view.labels.items()},
    )


def absent_rows(batch: Batch, count: int) -> Batch:
    """The batch with `count` rows behind it in which every modality is absent."""
    views = {
        name: replace(
            v,
            present_BL=torch.cat(
                [v.present_BL, v.present_BL.new_zeros(count, v.present_BL.shape[1])]
            ),
        )
        for name, v in batch.views.items()
    }
    more = torch.arange(count)
    return Batch(
        views,
        [*batch.keys, *(f"absent-{i}" for i in range(count))],
        torch.cat([batch.source_B, more + 9000]),
        torch.cat([batch.text_B, torch.zeros_like(more)]),
        torch.cat([batch.index_B, more + 9000]),
        [*batch.meta, *({} for _ in range(count))] if batch.meta else [],
    )


def gradients(model: Model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one forward and backward in training mode."""
    model.zero_grad(set_to_none=True)
    loss, _ = model.train()(batch, 0, 10)
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def sound_run(shards: str, train: dict[str, Any], **data: Any) -> dict[str, Any]:
    """Masked prediction of sound alone, over shards such as those of `tone_shards`."""
    return TREE | {
        "towers": {"audio": TREE["towers"]["audio"]},
        "views": {"audio": TREE["views"]["audio"]},
        "joints": {},
        "tasks": {"masked_audio": TREE["tasks"]["masked_audio"]},
        "train": {"batch": 4, "log_every": 1, "threads": 1} | train,
        "data": {"train": shards, "workers": 0} | data,
    }
