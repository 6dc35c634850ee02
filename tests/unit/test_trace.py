"""Counting on fake tensors gives what counting on numbers gives."""

import pytest
import torch
from small_methods import small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmssl import config, trace
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY
from mmssl.train import flops
from mmssl.train.flops import FlopCounter


def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


# ---------------------------------------------------------------- the ledger


def test_bytes_are_those_of_living_storages():
    with trace.Ledger(mode()) as ledger:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()  # the same storage
        assert ledger.live == ledger.peak == 4000
        c = a.double()
        del a, b
        assert ledger.live == 8000
        d = c + 1
        d.add_(1)
        assert (ledger.live, ledger.peak) == (16000, 16000)
        del c, d
    assert (ledger.live, ledger.peak) == (0, 16000)


def test_gradients_of_parameters_are_told_from_activations():
    """y = w2 sin(w1 x), B rows: backward holds what autograd saved and both gradients."""
    rows, width = 64, 50
    layers = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
    x = torch.randn(rows, width)
    ledger, matrix, block = trace.Ledger(mode()), 4 * width * width, 4 * rows * width
    for layer in layers:
        ledger.count(layer.weight, 0)
        layer.weight.register_post_accumulate_grad_hook(ledger.gradient)
    ledger.count(x, 0)
    with ledger:
        hidden = layers[0](x)
        out = layers[1](hidden.sin())
        assert ledger.live == 3 * block  # both products and the sine, which the second one saved
        del hidden
        out.backward(torch.ones_like(out))
    assert ledger.gradients == 2 * matrix
    assert ledger.live == 2 * matrix + block  # and `out`
    # at once: out, its gradient, the first product, its cosine, and what flows into it
    assert ledger.kept <= 6 * block
    assert ledger.peak <= ledger.kept + 2 * matrix
    assert ledger.peak > ledger.kept


def test_attention_on_a_cpu_counts():
    q, k, v = (torch.randn(3, 2, 10, 8, requires_grad=True) for _ in range(3))
    with FlopCounter() as counter:
        out = F.scaled_dot_product_attention(q, k, v)
        forward = counter.total
        out.sum().backward()
    assert forward == 2 * (2 * 3 * 2 * 10 * 10 * 8)  # scores and mixtures
    # scores again; gradients of weights, values, queries and keys
    assert counter.total == forward + 5 * (2 * 3 * 2 * 10 * 10 * 8)


# ---------------------------------------------------------------- fake and real

NAMES = ["avt/flagship", "general/bert", "general/mae", "speech/wav2vec2_base", "speech/unispeech"]


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_count_as_real_ones(name):
    spec = small(name)
    fake, real = (trace.trace(spec, rows=3, real=real) for real in (False, True))
    assert fake.flops == pytest.approx(real.flops, rel=0.01)
    assert fake.kept == pytest.approx(real.kept, rel=0.05)
    assert fake.peak == pytest.approx(real.peak, rel=0.05)


@pytest.mark.parametrize("name", ["avt/flagship", "general/mae", "general/albert"])
def test_parameters_are_those_of_the_model(name):
    spec = config.load(name)
    fake, real = trace.fake_model(spec, mode()), build_model(spec, VOCABULARY, SPECIAL, BEGINS)
    assert trace.sizes(fake) == trace.sizes(real)
    assert trace.parts(fake) == trace.parts(real)
    assert sum(trace.parts(fake).values()) == sum(p.numel() for p in real.parameters())


def test_frozen_parameters_are_not_trained():
    spec = small("avt/flagship", "towers.audio.freeze=true")
    found = trace.sizes(trace.fake_model(spec, mode()))
    model = build_model(spec, VOCABULARY, SPECIAL, BEGINS)
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained < found.parameters


def test_work_is_linear_in_the_rows():
    spec = small("general/mae")
    direct, line = trace.trace(spec, 48), trace.traced(spec, 48)
    assert line.flops == pytest.approx(direct.flops, rel=1e-6)
    assert line.kept == pytest.approx(direct.kept, rel=0.02)
    assert trace.traced(spec, 3) == trace.trace(spec, 3)


def test_recomputed_activations_cost_at_most_one_more_forward_pass():
    spec = config.load("general/bert", ["towers.text.backbone.layers=4"])
    train = spec.train.model_copy(update={"checkpoint_activations": True})
    kept, recomputed = (trace.trace(s, 4) for s in (spec, spec.model_copy(update={"train": train})))
    assert 1.1 < recomputed.flops / kept.flops < 4 / 3
    assert recomputed.kept < 0.5 * kept.kept
    assert recomputed.peak < 1.01 * kept.peak


@pytest.mark.parametrize("recomputed", [False, True])
def test_counting_holds_no_memory_and_agrees_with_torch(recomputed):
    spec = config.load("general/bert", ["towers.text.backbone.layers=4"])
    train = spec.train.model_copy(update={"checkpoint_activations": recomputed})
    spec = spec.model_copy(update={"train": train})
    counted, alone = trace.trace(spec, 4), trace._step(spec, 4, real=False, fused=True)
    assert (counted.kept, counted.peak) == (alone.kept, alone.peak)
    pair = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch does not know it
    known = {
        pair: flops._attention,
        getattr(torch.ops.aten, f"{pair.__name__}_backward"): (flops._attention_backward),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as torchs:
        trace._step(spec, 4, real=False, fused=True)
    assert counted.flops == torchs.get_total_flops()


def test_sixteen_bits_narrow_activations():
    spec = small("general/bert", "towers.text.backbone.layers=4", "views.text.length=64")
    narrow = spec.model_copy(update={"train": spec.train.model_copy(update={"precision": "bf16"})})
    wide, thin = (trace.trace(s, 4) for s in (spec, narrow))
    assert thin.flops == wide.flops
    assert 0.5 < thin.kept / wide.kept < 0.9
