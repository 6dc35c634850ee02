"""Continues a training loader from a saved state, in a process of its own."""

import json
import sys

import torch

from mmssl.data.loader import load_state, train_loader
from mmssl.data.text import Tokenizer
from mmssl.specs import DataSpec, ViewSpec


def digest(batch):
    """Everything a batch holds, as plain numbers."""
    sums = {
        name: [
            v.data.double().sum().item(),
            v.seeds_P.tolist(),
            v.start_s_P.tolist(),
            v.lengths_P.tolist(),
        ]
        for name, v in batch.views.items()
    }
    return [batch.keys, batch.index_B.tolist(), sums]


def main():
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    loader = train_loader(
        DataSpec(**plan["data"]),
        {name: ViewSpec(**v) for name, v in plan["views"].items()},
        plan["micro_batch"],
        plan["seed"],
        plan["rank"],
        plan["world"],
        Tokenizer.load(plan["tokenizer"]),
    )
    if plan["state"]:
        loader.restore(load_state(plan["state"]))
    out = [digest(next(loader)) for _ in range(plan["take"])]
    loader.close()
    print(json.dumps(out))


if __name__ == "__main__":
    main()
