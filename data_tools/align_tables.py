"""Refines the map between two tables: `python -m data_tools.align_tables RUN OUT`.

The map that a run of speech/speech_text_alignment has learned, refined on the pairs that are each
other's translation (Procrustes, five rounds). OUT: a safetensors file with `weight` (D, D), which
maps row vectors by x @ weight.T, and `translation` (N,), the target row of each source row by CSLS.
Vectors are centred and of length 1 as in training.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmssl import config
from mmssl.build import build_model
from mmssl.eval.alignment import refined, translate
from mmssl.tasks.players import Alignment
from mmssl.train.checkpoint import WEIGHTS, find
from mmssl.types import UserError


def main(run: str, out: str) -> None:
    """Refine, write, and tell what was gained by the criterion.

    Raises:
        UserError: no run of that method, or no checkpoint.
    """
    folder = find(run)
    spec = config.load(folder / "config.yaml", [])
    model = build_model(spec)
    (task,) = model.tasks.values()
    if not isinstance(task, Alignment):
        raise UserError(f"{run}: not a run of speech/speech_text_alignment; nothing to align")
    model.load_state_dict(load_file(folder / WEIGHTS))
    first = task.mapping.weight.detach()
    weight = refined(first, task.source_ND, task.target_ND)
    _, before = translate(task.source_ND @ first.T, task.target_ND)
    found, after = translate(task.source_ND @ weight.T, task.target_ND)
    save_file({"weight": weight.contiguous(), "translation": found}, out)
    print(f"mean CSLS {float(before.mean()):.4f}, refined {float(after.mean()):.4f} -> {Path(out)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m data_tools.align_tables RUN OUT")
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
