"""`mmssl plan`: memory, time and cost of a run, before a machine is paid for.

    mmssl plan FILE [gpus=8 gpu=h100 samples=1e9 utilisation=0.4 price=2.5 a.b=c ...]

Work and activations are counted, not modelled: a forward and a backward pass over the made-up batch
of `mmssl check` run on fake tensors (`mmssl.trace`). FLOPs are torch's count of matrix products,
convolutions and attention; bytes are those of all storages that live at once: the batch, what
autograd saved, gradients and temporaries. Both are counted for two small numbers of rows r1, r2 and
continued in a straight line to the micro-batch b,

    f(b) = f(r1) + (b - r1) (f(r2) - f(r1)) / (r2 - r1),

once with activations kept and once recomputed (`train.checkpoint_activations`). What grows with the
square of the batch, the logits of a contrast, is small beside them and not continued as such.

Memory of a rank in bytes at ZeRO stage 0-3 (Rajbhandari et al. 2020, section 3, for fp32: bf16 is
autocast, which narrows activations only). P numbers of all parameters, T of the trained ones, W
GPUs; R numbers of `reduce_bucket_size` (twice with `overlap_comm`), L = 1e9 those ZeRO-3 keeps
gathered (`stage3_max_reuse_distance`):

                       0              1              2                3
    weights            4P       4P                  4P               4P/W + 4 min(P, L)
    Adam, fp32 copy    8T       12T/W               12T/W            12T/W
    averaged (`ema`)   4T       4T                  4T               4T/W
    during backward    A + G    A + G               A + 4T/W + 4R    A + 4T/W + 4R
    during the step    8T       4T + 4R + 4T/W      16T/W            16T/W + 4R
                                or 16T/W

and the buffers (teachers, banks). A: bytes of the trace without gradients of parameters, A + G:
with them, as they replace activations on the way; with `accumulate` above 1 those of earlier
micro-batches add 4T. A step holds the gradients and DeepSpeed's flat copy of them, and from stage 1
on Adam's two temporaries of one flat tensor. L counts from two GPUs on. The peak is that of the
larger phase; an allocator's fragments, CUDA's context (about 0.5 GB) and NCCL come on top.

    seconds of a step = flops of a rank / (peak * utilisation) + traffic / bandwidth

with the traffic of Adam, 28 bytes per number (weights, both moments read and written, the gradient
read), 40 with averaged weights. Hours = steps * seconds, GPU hours = W times that, and cost = GPU
hours * price. `utilisation` stands for all that is not counted: kernels, communication, data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field
from torch._subclasses.fake_tensor import FakeTensorMode

from mmssl import config
from mmssl.backbones.transformer import Transformer
from mmssl.check import VOCABULARY, table
from mmssl.eval.options import parse
from mmssl.specs import RunSpec, Spec
from mmssl.stages import is_staged
from mmssl.stages import plan as stages_of
from mmssl.trace import Sizes, Trace, fake_model, parts, sizes, traced
from mmssl.train.engine import deepspeed_config, micro_batch
from mmssl.train.flops import GPUS

GATHERED = 10**9  # DeepSpeed's default of `stage3_max_reuse_distance`, in numbers
STAGES = (0, 1, 2, 3)


class PlanOptions(Spec):
    """Words of the command line that are no keys of the run."""

    gpus: int = Field(8, gt=0)
    gpu: Literal["a100", "h100", "h200"] = "h100"
    samples: float = Field(0.0, ge=0)  # 0 = train.steps * train.batch
    utilisation: float = Field(0.4, gt=0, le=1)  # of the peak
    price: float = Field(0.0, ge=0)  # of a GPU hour, in any currency; 0 = unknown


def main(file: str, words: Sequence[str] = ()) -> None:
    """Print what a run, or each run of a file with stages, needs.

    Raises:
        UserError: bad configuration or option; the batch does not divide by the GPUs.
    """
    own = [w for w in words if w.partition("=")[0] in PlanOptions.model_fields]
    options = parse(PlanOptions, own)
    overrides = [w for w in words if w not in own]
    if is_staged(file):
        runs = [stage.run for stage in stages_of(file, overrides) if stage.run is not None]
    else:
        runs = [config.load(file, overrides)]
    print("\n\n".join(report(spec, options) for spec in runs))


# ---------------------------------------------------------------- formulas


class Memory(NamedTuple):
    """Bytes of a rank: what is there all the time, and what each phase adds."""

    weights: float
    optimiser: float
    averaged: float
    buffers: float
    backward: float
    step: float

    @property
    def peak(self) -> float:
        """The most at once."""
        return sum(self[:4]) + max(self.backward, self.step)


def memory(spec: RunSpec, stage: int, ranks: int, size: Sizes, work: Trace) -> Memory:
    """The table of the module's docstring; work: of one micro-batch on one rank."""
    train = spec.train.model_copy(update={"zero": stage, "batch": ranks * spec.train.accumulate})
    zero = deepspeed_config(spec.optim, train, ranks)["zero_optimization"]
    bucket = 4.0 * zero.get("reduce_bucket_size", 0)
    bucket *= 2 if stage < 3 and zero.get("overlap_comm") else 1
    whole, trained = 4.0 * size.parameters, 4.0 * size.trained
    share, gathered = trained / ranks, min(whole, 4.0 * GATHERED) if ranks > 1 else 0.0
    weights = whole / ranks + gathered if stage == 3 else whole
    adam = 3 * share if stage else 2 * trained
    earlier = trained if spec.train.accumulate > 1 else 0.0
    backward = work.kept + share + bucket if stage > 1 else work.peak + earlier
    step = {
        0: 2 * trained,
        1: max(trained + bucket + share, 4 * share),
        2: 4 * share,
        3: 4 * share + bucket,
    }[stage]
    averaged = (share if stage == 3 else trained) if spec.optim.ema != 0 else 0.0
    return Memory(weights, adam, averaged, float(size.buffers), backward, step)


def step_seconds(
    spec: RunSpec, options: PlanOptions, stage: int, size: Sizes, work: Trace
) -> float:
    """Seconds of an optimiser step; work: of one micro-batch on one rank."""
    gpu = GPUS[options.gpu]
    peak = gpu.bf16_flops if spec.train.precision == "bf16" else gpu.fp32_flops
    numbers = size.trained / (options.gpus if stage else 1)
    traffic = numbers * (40 if spec.optim.ema != 0 else 28)
    return spec.train.accumulate * work.flops / (peak * options.utilisation) + (
        traffic / gpu.bytes_per_s
    )


# ---------------------------------------------------------------- report


def report(spec: RunSpec, options: PlanOptions) -> str:
    """The tables of one run."""
    gpu, rows = GPUS[options.gpu], micro_batch(spec.train, options.gpus)
    model = fake_model(spec, FakeTensorMode(allow_non_fake_inputs=True))
    size, by_part = sizes(model), parts(model)
    works = {"kept": traced(_checkpointing(spec, False), rows)}
    if any(isinstance(part, Transformer) for part in model.modules()):
        works["recomputed"] = traced(_checkpointing(spec, True), rows)
    head = (
        f"{spec.name}: {size.parameters / 1e6:.2f} M parameters, {size.trained / 1e6:.2f} M "
        f"trained; {options.gpus} x {options.gpu}, {rows} rows per GPU and micro-batch, "
        f"{spec.train.precision}"
    )
    blocks = [head, table([(n, f"{c:,}") for n, c in by_part.items()], ("part", "parameters"))]
    blocks.append(table(_memory_rows(spec, options, size, works), _HEAD))
    blocks.append(table(_time_rows(spec, options, size, works, rows), _TIME))
    text = any(view.modality == "text" for view in spec.views.values())
    if text and not Path(spec.data.tokenizer).is_file():
        blocks.append(f"no data.tokenizer: counted with a vocabulary of {VOCABULARY} ids")
    blocks.append(
        f"fits: in {gpu.bytes / 1e9:.0f} GB; time: at {options.utilisation:.2f} of the peak, an "
        "assumption (utilisation=...); formulas: mmssl/plan.py"
    )
    return "\n\n".join(blocks)


_HEAD = (
    "GB of a rank",
    "weights",
    "Adam",
    "averaged",
    "buffers",
    "backward",
    "step",
    "peak",
    "fits",
)
_TIME = (
    "activations",
    "GFLOP/sample",
    "s/step",
    "samples/s",
    "samples",
    "hours",
    "GPU hours",
    "cost",
)


def _checkpointing(spec: RunSpec, on: bool) -> RunSpec:
    train = spec.train.model_copy(update={"checkpoint_activations": on})
    return spec.model_copy(update={"train": train})


def _memory_rows(
    spec: RunSpec, options: PlanOptions, size: Sizes, works: Mapping[str, Trace]
) -> Iterator[tuple[str, ...]]:
    for stage in STAGES:
        for name, work in works.items():
            found = memory(spec, stage, options.gpus, size, work)
            numbers = [f"{x / 1e9:.2f}" for x in (*found, found.peak)]
            fits = "yes" if found.peak < GPUS[options.gpu].bytes else "no"
            yield (f"ZeRO {stage}, activations {name}", *numbers, fits)


def _time_rows(
    spec: RunSpec, options: PlanOptions, size: Sizes, works: Mapping[str, Trace], rows: int
) -> Iterator[tuple[str, ...]]:
    samples = options.samples or float(spec.train.steps * spec.train.batch)
    for name, work in works.items():
        seconds = step_seconds(spec, options, spec.train.zero, size, work)
        hours = samples / spec.train.batch * seconds / 3600
        total = hours * options.gpus
        cost = f"{total * options.price:,.0f}" if options.price else "give price=..."
        rate = f"{spec.train.batch / seconds:.1f}"
        flops = f"{work.flops / rows / 1e9:.1f}"
        times = (f"{seconds:.3g}", rate, f"{samples:.3g}", f"{hours:.3g}", f"{total:.3g}")
        yield (name, flops, *times, cost)
