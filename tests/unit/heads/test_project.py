"""Projection heads: published graphs, formulas, batch statistics, the audio->vat law."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmssl.dist import MaskedSyncBatchNorm
from mmssl.heads.project import Head, SpaceHeads
from mmssl.types import UserError

WIDTHS = {"video": 12, "audio": 10, "text": 8}
FAC = {"va": 6, "vat": 4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch_norm(x):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def randomised(module):
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def test_fac_equals_its_published_formula():
    heads = SpaceHeads("fac", WIDTHS, FAC)
    v, a, t = (torch.randn(7, WIDTHS[m]) for m in ("video", "audio", "text"))
    first, _, _, second, _ = heads.heads["video_to_va"].layers
    assert first.bias is not None
    assert second.bias is None
    va = batch_norm(F.relu(batch_norm(first(v))) @ second.weight.T)
    coarse = heads.va_vat.layers[1]
    assert coarse.bias is None
    out = heads.project_all(v, "video", ("vat", "va"))
    torch.testing.assert_close(out["va"], va, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        out["vat"], batch_norm(F.relu(va) @ coarse.weight.T), atol=1e-4, rtol=1e-4
    )
    linear = heads.heads["audio_to_va"].layers[0]
    torch.testing.assert_close(heads.project(a, "audio", "va"), linear(a))
    linear = heads.heads["text_to_vat"].layers[0]
    torch.testing.assert_close(heads.project(t, "text", "vat"), linear(t))


def test_fac_has_the_published_parameters():
    heads = SpaceHeads("fac", {"video": 2048, "audio": 2048, "text": 2048}, {"va": 512, "vat": 256})
    video = 2048 * 512 + 512 + 2 * 512 + 512 * 512 + 2 * 512
    coarse = 512 * 256 + 2 * 256
    linear = 2048 * 512 + 512 + 2048 * 256 + 256
    assert sum(p.numel() for p in heads.parameters()) == video + coarse + linear
    released = SpaceHeads("fac", {"video": 8, "audio": 8, "text": 8}, FAC, bias=False)
    assert released.heads["video_to_va"].layers[0].bias is None


def test_audio_reaches_vat_in_evaluation_only():
    heads = randomised(SpaceHeads("fac", WIDTHS, FAC))
    a = torch.randn(5, 10)
    with pytest.raises(UserError, match="evaluation only"):
        heads.project(a, "audio", "vat")
    before = {k: v.clone() for k, v in heads.state_dict().items()}
    heads.eval()
    _, linear, norm = heads.va_vat.layers
    fine = heads.project(a, "audio", "va")
    expected = F.relu(fine) @ linear.weight.T / (1 + 1e-5) ** 0.5 * norm.weight + norm.bias
    torch.testing.assert_close(heads.project(a, "audio", "vat"), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in heads.state_dict().items())


def test_audio_norm_keeps_the_shared_statistics_clean():
    heads = SpaceHeads("fac", WIDTHS, FAC, audio_norm=True)
    own, shared = heads.audio_norm, heads.va_vat.layers[2]
    out = heads.project(torch.randn(9, 10), "audio", "vat")
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    assert torch.equal(shared.running_mean, torch.zeros(4))
    assert own.running_mean.abs().min() > 0
    out.square().sum().backward()
    assert heads.va_vat.layers[1].weight.grad.abs().sum() > 0


def test_one_pass_over_two_spaces_updates_statistics_once():
    heads = SpaceHeads("fac", WIDTHS, FAC)
    heads.project_all(torch.randn(7, 12), "video", ("va", "vat"))
    norms = [m for m in heads.modules() if isinstance(m, MaskedSyncBatchNorm)]
    assert [m.num_batches_tracked.tolist() for m in norms] == [[1]] * 3


def test_sub_configuration_builds_what_it_needs():
    heads = SpaceHeads("fac", {"video": 12, "audio": 10}, {"va": 6})
    full = SpaceHeads("fac", WIDTHS, FAC)
    assert set(heads.state_dict()) < set(full.state_dict())
    heads.load_state_dict(
        {k: v for k, v in full.state_dict().items() if k in set(heads.state_dict())}
    )
    assert heads.va_vat is None


def test_disjoint_has_independent_video_heads_and_no_way_from_audio_to_text():
    heads = SpaceHeads("disjoint", WIDTHS, {"va": 6, "vt": 6})
    out = heads.project_all(torch.randn(5, 12), "video", ("va", "vt"))
    out["va"].square().sum().backward()
    assert all(p.grad is None for p in heads.heads["video_to_vt"].parameters())
    for modality, space in (("audio", "vt"), ("text", "va")):
        with pytest.raises(UserError, match="no way from"):
            heads.eval().project(torch.randn(5, WIDTHS[modality]), modality, space)


def test_shared_and_linear_graphs():
    shared = SpaceHeads("shared", WIDTHS, {"all": 6})
    linear = SpaceHeads("linear", WIDTHS, FAC, {"va": ("video", "audio"), "vat": ("text",)})
    assert set(linear.heads) == {"video_to_va", "audio_to_va", "text_to_vat"}
    assert not any(isinstance(m, MaskedSyncBatchNorm) for m in linear.modules())
    for modality, width in WIDTHS.items():
        kinds = [type(layer) for layer in shared.heads[f"{modality}_to_all"].layers]
        assert kinds == [nn.Linear, MaskedSyncBatchNorm, nn.ReLU, nn.Linear, MaskedSyncBatchNorm]
        assert shared.project(torch.randn(3, width), modality, "all").shape == (3, 6)
    x = torch.randn(3, 4, 12)
    norm, matrix = linear.heads["video_to_va"].layers
    expected = F.layer_norm(x, (12,), norm.weight, norm.bias, 1e-6) @ matrix.weight.T + matrix.bias
    torch.testing.assert_close(linear.project(x, "video", "va"), expected)


@pytest.mark.parametrize(
    ("form", "formula"),
    [
        ("linear", lambda w, x: w[0](x)),
        ("mlp", lambda w, x: w[2](F.relu(w[0](x)))),
        ("relu_linear_bn", lambda w, x: batch_norm(w[1](F.relu(x)))),
        ("linear_norm_tanh", lambda w, x: torch.tanh(F.layer_norm(w[0](x), (6,)))),
    ],
)
def test_forms_are_their_formulas(form, formula):
    head = Head(form, 12, 6, hidden=9)
    x = torch.randn(8, 12)
    torch.testing.assert_close(head(x), formula(head.layers, x), atol=1e-5, rtol=1e-4)


def test_dummy_rows_change_nothing_for_vectors_and_for_tokens():
    x = torch.randn(5, 3, 12)
    dummy = torch.cat([x, 40 * torch.randn(2, 3, 12)])
    valid = torch.arange(7) < 5
    for rows, longer in ((x, dummy), (x[:, 0], dummy[:, 0])):
        a, b = (SpaceHeads("fac", WIDTHS, FAC) for _ in range(2))
        b.load_state_dict(a.state_dict())
        short = a.project_all(rows, "video", ("va", "vat"))
        long = b.project_all(longer, "video", ("va", "vat"), valid)
        for space in FAC:
            torch.testing.assert_close(long[space][:5], short[space], atol=1e-5, rtol=1e-4)
        for p, q in zip(a.buffers(), b.buffers(), strict=True):
            torch.testing.assert_close(p, q)


def test_tokens_and_vectors_project_alike_in_evaluation():
    heads = SpaceHeads("fac", WIDTHS, FAC)
    heads.project_all(torch.randn(30, 12), "video", ("va", "vat"))
    x = torch.randn(2, 5, 12)
    for space in FAC:
        tokens = heads.eval().project(x, "video", space)
        torch.testing.assert_close(tokens[1, 3], heads.project(x[1, 3:4], "video", space)[0])


def test_wrong_wirings_are_refused():
    for match, args in (
        ("graph", ("star", WIDTHS, FAC)),
        ("form", ("linear", WIDTHS, FAC, None, "conv")),
        ("leave form out", ("fac", WIDTHS, FAC, None, "mlp")),
        ("members", ("shared", WIDTHS, {"all": 4}, {"all": ["audio"]})),
        ("one space", ("shared", WIDTHS, FAC)),
        ("has the spaces va and vat", ("fac", WIDTHS, {"va": 6, "vt": 4})),
        ("needs a tower", ("fac", {"video": 12, "audio": 10}, FAC)),
        ("needs a tower", ("linear", WIDTHS, FAC, {"va": ["touch"]})),
    ):
        with pytest.raises(UserError, match=match):
            SpaceHeads(*args)
