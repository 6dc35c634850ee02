"""The only place that touches DeepSpeed: process group, engine, and its shards on disk.

One engine for every size, one CPU process included. The model computes a loss that is
world * local sum / global count, DeepSpeed averages gradients over ranks, so the gradient is exact.
bf16 is torch's autocast inside DeepSpeed: parameters, gradients and their reduction stay fp32 at
every ZeRO stage, only the matrix products are narrow.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmssl import config, dist
from mmssl.partition import own_length, piece
from mmssl.specs import OptimSpec, TrainSpec
from mmssl.train.commit import Writer
from mmssl.train.lars import Lars, layout_of
from mmssl.train.optim import Policy, build_optimizer, set_learning_rate
from mmssl.train.safe import load_plain, plain_loads, quiet
from mmssl.types import Batch, Floor, Term, UserError

Terms = Mapping[str, Term]
_WEEK_S = 7 * 86400.0


class Trainable(Protocol):
    """What the engine and the loop ask of a model, besides being an `nn.Module`."""

    last_embeddings: dict[str, Tensor]
    """Embeddings (B, D) of the last forward by name, detached; watched for collapse."""
    floors: Mapping[str, Floor]
    """Watched terms that tell a collapse, by name."""
    last_tokens: int
    """Tokens the last forward encoded on this rank."""

    def parameter_policy(self) -> Mapping[str, Policy]:
        """How each parameter learns, by name."""

    def after_step(self, step: int, total: int) -> None:
        """Update teachers and queues after the optimiser step."""


# ---------------------------------------------------------------- process group


def start(threads: int = 0, hang_s: float = 1800.0) -> torch.device:
    """Join the process group (gloo on CPUs, NCCL on GPUs) and return this rank's device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun and the deepspeed
    launcher set them; without them this is a group of one. Of Slurm's tasks without a launcher only
    the last two must be set.

    Args:
        threads: torch threads on the CPU; 0 keeps torch's choice.
        hang_s: limit of the watchdog, which is to notice first that a rank does not come; 0 = none.

    Raises:
        UserError: tasks of Slurm do not know where to meet.
    """
    _read_slurm(os.environ, torch.cuda.device_count())
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _deepspeed()
    if threads:
        torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(local)
    backend = "nccl" if cuda else "gloo"
    dist.init(backend, 2 * hang_s + 300 if hang_s else _WEEK_S)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def _read_slurm(env: MutableMapping[str, str], devices: int) -> None:
    """Name the rank of a task that `srun` has started without another launcher.

    Of the variables only that of the step counts: a batch script also has those of its job.
    """
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if lacking:
        raise UserError(
            f"{env['SLURM_STEP_NUM_TASKS']} tasks of srun, but {' and '.join(lacking)} not set: "
            "export MASTER_ADDR=(the first node) MASTER_PORT=29500, or use launch/slurm.sbatch"
        )
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    # with --gpus-per-task each task sees its own device only
    env["LOCAL_RANK"] = env["SLURM_LOCALID"] if devices > 1 else "0"


@contextmanager
def session(threads: int = 0, hang_s: float = 1800.0) -> Iterator[torch.device]:
    """`start`, and at the normal end a meeting of all ranks before the group is destroyed.

    After an error the ranks do not wait for each other (one may be dead): the launcher ends them.
    """
    device = start(threads, hang_s)
    try:
        yield device
    except BaseException:
        if dist.world_size() == 1:
            _stop()
        raise
    _stop()


def _stop() -> None:
    """Meet, then destroy the group through DeepSpeed, which otherwise keeps handles to it.

    Engines are cyclic and hold groups: collected here, gloo's threads end. One that is alive while
    the interpreter shuts down and lets go of a tensor then asks for Python's lock and is ended in
    the midst of C++, which aborts the process.
    """
    dist.barrier()
    _deepspeed().comm.destroy_process_group()
    gc.collect()


def _deepspeed() -> Any:
    """DeepSpeed, silent, and without the extension it would compile on CPUs at start-up."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Compiling it needs a C++ compiler; without it the reductions go through gloo, equally exact.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# ---------------------------------------------------------------- configuration


def micro_batch(train: TrainSpec, world: int) -> int:
    """Rows of one forward pass on one rank.

    Raises:
        UserError: the batch cannot be split evenly; names the nearest sizes that can.
    """
    parts = world * train.accumulate
    if train.batch % parts:
        below = train.batch // parts * parts
        valid = [str(n) for n in (below, below + parts) if n]
        raise UserError(
            f"train.batch={train.batch} does not divide by {world} processes x train.accumulate="
            f"{train.accumulate}; nearest valid batch: {' or '.join(valid)}"
        )
    return train.batch // parts


def deepspeed_config(optim: OptimSpec, train: TrainSpec, world: int) -> dict[str, Any]:
    """The ZeRO preset completed with batch sizes, precision and clipping.

    Raises:
        UserError: the preset is missing or no JSON; the batch cannot be split.
    """
    settings = _preset(f"zero{train.zero}")
    settings |= {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": micro_batch(train, world),
        "gradient_accumulation_steps": train.accumulate,
        # `Lars` knows of ZeRO, and SGD treats every number by itself
        "zero_allow_untested_optimizer": optim.kind in ("lars", "sgd"),
        # At stage 0 DeepSpeed clips without telling the norm, so the engine below clips itself.
        "gradient_clipping": optim.clip if train.zero else 0.0,
    }
    if train.precision == "bf16":
        # No "safe modules": their gradients would be reduced in bf16.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings


def _preset(name: str) -> dict[str, Any]:
    paths = [root / "deepspeed" / f"{name}.json" for root in config.roots()]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise UserError(f"train.zero: no file {' or '.join(str(p) for p in paths)}")
    try:
        return cast("dict[str, Any]", json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error


# ---------------------------------------------------------------- engine


class Engine:
    """Forward, backward, update and shards of one model under DeepSpeed."""

    def __init__(
        self, model: nn.Module, optim: OptimSpec, train: TrainSpec, device: torch.device
    ) -> None:
        """Hand the model to DeepSpeed, which broadcasts rank 0's weights.

        Raises:
            UserError: the batch cannot be split evenly, or nothing is left to train.
        """
        self.stage, self.clip = int(train.zero), optim.clip
        self.kind, self.peak = optim.kind, optim.lr
        self.model, self.device = model.to(device), device
        settings = deepspeed_config(optim, train, dist.world_size())
        policy = cast("Trainable", model).parameter_policy()
        optimizer = build_optimizer(model, policy, optim)
        deepspeed = _deepspeed()
        self._linear = nn.functional.linear
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        if isinstance(optimizer, Lars) and self.stage:
            optimizer.layout = layout_of(self._engine.optimizer, self.stage)
        self._engine.checkpoint_engine = self._files = _shard_files()
        # a script that would load pickles without a check; no part of the data
        self._engine._copy_recovery_script = lambda save_path: None
        if self.stage == 3:
            _hold_own_parameters(model, deepspeed.zero.register_external_parameter)
            _clear_padding(model, deepspeed.utils)

    def forward(self, batch: Batch, step: int, total: int) -> tuple[Tensor, dict[str, Term]]:
        """Loss () of this rank and the terms, detached and summed over ranks."""
        return cast("tuple[Tensor, dict[str, Term]]", self._engine(batch, step, total))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; the last one of a step reduces over ranks."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the gradient's norm before clipping (all ranks alike).

        Where the norm is not finite nothing is updated.
        """
        set_learning_rate(self._engine.optimizer.param_groups, lr, self.peak)
        if self.stage:
            self._engine.step()  # leaves out the update by itself
            norm = float(self._engine.get_global_grad_norm())
            return norm if norm >= 0 else float("nan")  # DeepSpeed reports -1 for NaN and infinity
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.clip or float("inf")))
        if not math.isfinite(norm):
            self.model.zero_grad(set_to_none=True)  # parameters without a gradient stay
        self._engine.step()
        return norm

    def save(self, writer: Writer, name: str) -> None:
        """Write DeepSpeed's shards into the folder `name`; every rank calls it."""
        self._files.writer = writer
        self._engine.save_checkpoint(str(writer.folder), tag=name, save_latest=False)

    def load(self, folder: Path, ranks: int) -> None:
        """Read what `save` wrote: weights, optimiser state, counters; every rank calls it.

        Shards of another number of `ranks` are first put together in a folder beside, which is
        removed again; buffers and frozen parameters are not in them.

        Raises:
            UserError: a file could run code; SGD or LARS on another number of ranks, as DeepSpeed's
                converter knows Adam's states only.
        """
        if ranks == dist.world_size() or not self.stage:
            with plain_loads(_allowed()):
                self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
            return
        if self.kind in ("lars", "sgd"):
            raise UserError(
                f"{folder}: written by {ranks} processes, here are {dist.world_size()}; with "
                f"optim.kind: {self.kind} and train.zero above 0 go on with as many"
            )
        whole = folder.parent.with_name(f"{folder.parent.name}-whole.tmp")
        settings = self._engine._config
        dist.on_rank0(lambda: _put_together(folder, whole))
        settings.load_universal_checkpoint = True
        optimizer = self._engine.optimizer
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        try:
            with plain_loads(_allowed()), quiet():
                self._engine.load_checkpoint(str(whole.parent), tag=whole.name)
        finally:
            settings.load_universal_checkpoint = False
        # ZeRO-3 gives all groups the settings of the first, and all states one tensor to count in
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group |= ours
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        dist.barrier()
        if dist.rank() == 0:
            shutil.rmtree(whole)

    def close(self) -> None:
        """Release hooks and buffers; what follows in this process computes as if nothing had been.

        ZeRO-3 puts a linear layer of its own, which rounds otherwise, in the place of torch's.
        """
        self._engine.destroy()
        nn.functional.linear = self._linear
        if self.stage == 3:
            _forget_modules()


def _forget_modules() -> None:
    """ZeRO-3: empty the list and the method's cache that would keep a closed engine alive."""
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    owner = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = inspect.getclosurevars(owner._PartitionedParameterCoordinator__params_to_release)
    cached.nonlocals["func"].cache_clear()


def _hold_own_parameters(model: nn.Module, register: Any) -> None:
    """ZeRO-3: keep parameters that sit directly in composite modules gathered during a forward.

    DeepSpeed gathers a module's parameters around that module's own call and finds the matching
    moment in the backward through tensors among its outputs. Layers of torch.nn fit; modules that
    return records, or are used through other methods, do not, so their own (small) parameters
    belong to the root's call instead.
    """
    for module in model.modules():
        layer = type(module).__module__.startswith("torch.nn.modules")
        container = isinstance(module, nn.ParameterList | nn.ParameterDict)
        if layer and not container:
            continue
        for parameter in module.parameters(recurse=False):
            register(model, parameter)


@torch.no_grad()
def _clear_padding(model: nn.Module, tools: Any) -> None:
    """ZeRO-3: zeros behind the last element of each parameter, where DeepSpeed leaves stale memory.

    Otherwise checkpoints of equal runs would differ, and carry bytes of unknown origin.
    """
    parameter: Any
    for parameter in model.parameters():
        kept, real = piece(parameter), own_length(parameter)
        if real < kept.numel():
            kept[real:] = 0
            if parameter.requires_grad:
                master = tools.safe_get_local_fp32_param(parameter).clone()
                master[real:] = 0
                tools.safe_set_local_fp32_param(parameter, master)


def _allowed() -> list[type]:
    """The classes in DeepSpeed's shards besides tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _put_together(folder: Path, whole: Path) -> None:
    """DeepSpeed's shards in its form that any number of ranks can read."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    with plain_loads(_allowed()), quiet():
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder),
                output_folder=str(whole),
                strict=True,
                inject_missing_state=True,
                **options,
            )
        )
    (whole.parent / "latest_universal").unlink()


def _shard_files() -> Any:
    """DeepSpeed's file layer: writes through a `Writer`; loads build tensors and plain values."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    allowed = _allowed()

    class ShardFiles(TorchCheckpointEngine):  # type: ignore[misc]
        writer: Writer

        def save(self, state_dict: Any, path: str) -> None:
            name = Path(path).relative_to(self.writer.folder).as_posix()
            self.writer.file(name, lambda file: torch.save(state_dict, file))

        def load(self, path: str, map_location: Any = None) -> Any:
            return load_plain(path, allowed, map_location)

    return ShardFiles()
