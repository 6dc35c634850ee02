"""Trains the small alignment run on every rank's rows, for test_turn_ranks.py.

    python -m torch.distributed.run ... turn_ranks.py JSON      JSON: a list of {"folder", "zero"}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from small_methods import small  # noqa: E402

from mmssl import dist  # noqa: E402
from mmssl.build import build_model  # noqa: E402
from mmssl.data.draws import Draws  # noqa: E402
from mmssl.train.engine import session  # noqa: E402
from mmssl.train.run import Parts, fit  # noqa: E402

ROWS = 8
OPTIONS = ["train.steps=6", f"train.batch={ROWS}", "validate.every=0", "tasks.alignment.dropout=0"]
OPTIM = ["optim.kind=adam", "optim.lr=0.01", "optim.clip=0.05"]

if __name__ == "__main__":
    with session(1) as device:
        for call in json.loads(sys.argv[1]):
            zero = f"train.zero={call['zero']}"
            spec = small("speech/speech_text_alignment", *OPTIONS, *OPTIM, zero)
            folder, world = Path(call["folder"]), dist.world_size()
            dist.on_rank0(lambda: folder.mkdir(parents=True))  # noqa: B023
            parts = Parts(
                lambda: build_model(spec),  # noqa: B023
                lambda layout: Draws(ROWS // world, dist.rank(), world),  # noqa: B023
                lambda *_: {},
            )
            fit(spec, parts, folder, device)
