"""Writes the golden files anew: `python tests/golden/regenerate.py [NAME...]`.

configs/: every method and run as it resolves, with all defaults. losses.json: the terms of each of
them at a small size, and of the tiny run of tests/tiny_run.py, over three seeded steps; with names,
losses of these and of what has none yet. Read the
difference (`git diff tests/golden`) before committing it: a change here changes what users get.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS, ROWS = 3, 6


def resolved() -> dict[str, str]:
    """{methods/avt/flagship: canonical YAML} of every built-in method and run."""
    from mmssl import config

    root = config.builtin_root()
    files = sorted(p for kind in config.LAUNCHABLE for p in (root / kind).rglob("*.yaml"))
    return {file.relative_to(root).with_suffix("").as_posix(): text(file) for file in files}


def text(file: Path) -> str:
    """Canonical YAML of a method, of a run, or of a run's stages."""
    from mmssl import config, stages

    if stages.is_staged(file):
        return stages.dump(stages.load(file)[0])
    return config.dump(config.load(file))


def trained() -> list[str]:
    """What has golden losses: every built-in method and run, and the run of tests/tiny_run.py."""
    from mmssl import config, stages

    return ["tiny", *(name for name in config.names() if not stages.is_staged(name))]


def losses(name: str) -> list[dict[str, float]]:
    """Mean of every term at each of three steps of plain descent; a step ends with its loss.

    In fp64 and by short steps: processors add up in their own orders, which Adam (whole steps of
    rounding errors where a gradient is zero) and batch norms over few places magnify.
    """
    import torch
    from small_methods import small, small_model
    from tiny_run import tiny_spec

    from mmssl.check import fake_batch

    spec = tiny_spec() if name == "tiny" else small(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = small_model(spec, dtype=torch.float64).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    steps = []
    for step in range(STEPS):
        loss, terms = model(fake_batch(spec, ROWS, step), step, STEPS)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimiser.step()
        model.after_step(step, STEPS)
        means = {name: float(t.sum / t.count.clamp(min=1)) for name, t in terms.items()}
        steps.append({**means, "loss": float(loss.detach())})
    torch.set_num_threads(threads)
    return steps


def main(names: Sequence[str] = ()) -> None:
    """Write configs/ and losses.json beside this file; losses of `names` only, if there are any."""
    folder = HERE / "configs"
    texts = resolved()
    for old in folder.rglob("*.yaml"):
        if old.relative_to(folder).with_suffix("").as_posix() not in texts:
            old.unlink()
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    file = HERE / "losses.json"
    kept = json.loads(file.read_text()) if names else {}
    found = {
        name: [{k: float(f"{v:.8g}") for k, v in step.items()} for step in losses(name)]
        if name in names or name not in kept
        else kept[name]
        for name in trained()
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(texts)} configurations, {STEPS} steps of {len(found)} -> {HERE}")


if __name__ == "__main__":
    root = HERE.parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    main(sys.argv[1:])
