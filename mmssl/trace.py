"""Work and bytes of a training step, counted on fake tensors.

Parameters are fake: whatever is computed from them has a shape and no numbers. Data, masks and
seeds are real, so that shapes which depend on them come out.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmssl.backbones.attention import Attention
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY, fake_batch
from mmssl.data.text import Tokenizer
from mmssl.model import Model
from mmssl.specs import RunSpec
from mmssl.train.flops import FlopCounter

# From these a straight line goes to larger batches. Tasks that read a random share of the rows bend
# it by a few percent; the farther apart, the less.
ROWS = (8, 32)


class Trace(NamedTuple):
    """One micro-batch: FLOPs, bytes alive at once without and with gradients of parameters."""

    flops: float
    kept: float
    peak: float


class Sizes(NamedTuple):
    """Numbers of all and of trained parameters, bytes of buffers."""

    parameters: int
    trained: int
    buffers: int


def fake_model(spec: RunSpec, mode: FakeTensorMode | None) -> Model:
    """The run's model in training mode; its parameters are of `mode`, or real ones without it."""
    vocabulary = VOCABULARY
    if Path(spec.data.tokenizer).is_file():
        vocabulary = Tokenizer.load(Path(spec.data.tokenizer)).vocab_size
    begins = (BEGINS * -(-vocabulary // VOCABULARY))[:vocabulary]
    with _fake_parameters(mode):
        return build_model(spec, vocabulary, SPECIAL, begins).train()


@contextmanager
def _fake_parameters(mode: FakeTensorMode | None) -> Iterator[None]:
    """Modules built inside own fake parameters, one real one at a time is ever held."""
    real = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if mode is not None and parameter is not None and not isinstance(parameter, FakeTensor):
            parameter = nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
        real(self, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = real  # type: ignore[method-assign]


def sizes(model: nn.Module) -> Sizes:
    """Counts of a model."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    held = sum(b.nbytes for b in model.buffers())
    return Sizes(sum(n for n, _ in counts), sum(n for n, trained in counts if trained), held)


def parts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters by tower, joint, trunk and task."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        words = name.split(".")
        found[words[0] if words[0] == "trunk" else ".".join(words[:2])] += parameter.numel()
    return dict(found)


def trace(spec: RunSpec, rows: int, real: bool = False, fused: bool = True) -> Trace:
    """Count one forward and backward pass over `rows` made-up rows.

    Args:
        spec: the run; its precision and `checkpoint_activations` hold.
        rows: of the batch; none lacks a modality.
        real: on numbers instead of fake tensors.
        fused: attention as on a GPU, where dropout does not keep it from the fused kernel.
    """
    with FlopCounter() as counter:
        ledger = _step(spec, rows, real, fused)
    return Trace(counter.total, float(ledger.kept), float(ledger.peak))


def _step(spec: RunSpec, rows: int, real: bool, fused: bool) -> Ledger:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, ledger = fake_model(spec, None if real else mode), Ledger(mode)
    if fused:
        for part in model.modules():
            if isinstance(part, Attention):
                part.dropout.rate = 0.0
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.count(tensor, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(ledger.gradient)  # type: ignore[no-untyped-call]
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=spec.train.precision == "bf16")
    with ledger:
        batch = fake_batch(spec, rows, missing=False)
        with narrow:
            loss, _ = model(batch, 0, spec.train.steps)
        loss.backward()
    return ledger


def traced(spec: RunSpec, rows: int, real: bool = False, fused: bool = True) -> Trace:
    """The straight line through the traces of `ROWS`, at `rows`; they themselves up to there."""
    if rows <= max(ROWS):
        return trace(spec, rows, real, fused)
    first, second = (trace(spec, n, real, fused) for n in ROWS)
    share = (rows - ROWS[0]) / (ROWS[1] - ROWS[0])
    return Trace(*(a + share * (b - a) for a, b in zip(first, second, strict=True)))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations make, while they live.

    Operations whose result's shape depends on numbers that are fake run on ones instead: masks made
    from them hide everything, so that what they select is counted in full.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.live = self.gradients = self.kept = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete: from now on its bytes are no activation's."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        try:
            out = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            out = func(*tree_map_only(FakeTensor, _ones, args), **kwargs)
            out = tree_map_only(Tensor, self._faked, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                held = tensor.device.type != "meta"  # fake ones say the device they stand for
                self.count(tensor, tensor.untyped_storage().nbytes() * held)
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor) if tensor.is_floating_point() else tensor

    def count(self, tensor: Tensor, size: int) -> None:
        """`size` bytes for a tensor's storage, unless it is known, until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.kept = max(self.kept, self.live - self.gradients)


def _ones(tensor: Tensor) -> Tensor:
    """Real numbers in a fake tensor's place: 1, True, or the first index."""
    whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
    return torch.full(tensor.shape, 0 if whole else 1, dtype=tensor.dtype)
