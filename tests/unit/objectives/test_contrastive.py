"""Analytic values and laws of the contrastive objectives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.objectives import contrastive as con
from mmssl.objectives.contrastive import Candidates, LogitScale, candidate_mask, info_nce, mil_nce

TAU = 0.07


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


def eye(n: int) -> tuple[Tensor, Tensor]:
    return torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool)


def both_directions(video_BD: Tensor, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.einsum("id,jld->ijl", video_BD, text_BLD) / TAU
    backward = torch.einsum("jd,ild->ijl", video_BD, text_BLD) / TAU
    return forward, backward


def pooled(video_BD: Tensor, text_BLD: Tensor, form: Any = "released") -> Tensor:
    positive, valid = eye(len(video_BD))
    return mil_nce(*both_directions(video_BD, text_BLD), positive, valid, valid, form).mean()


# --- chance values


@pytest.mark.parametrize("texts", [1, 5])
def test_constant_embeddings_give_the_published_chance_values(texts: int) -> None:
    video, text = unit(1, 8).expand(16, 8), unit(1, 1, 8, seed=1).expand(16, texts, 8)
    assert pooled(video, text).item() == pytest.approx(3.4657, abs=5e-5)
    assert pooled(video, text).item() == pytest.approx(math.log(32), abs=1e-12)
    assert pooled(video, text, "strict").item() == pytest.approx(3.4340, abs=5e-5)
    assert pooled(video, text, "symmetric").item() == pytest.approx(2 * math.log(16), abs=1e-12)
    assert info_nce(video @ video.T, *eye(16)).tolist() == pytest.approx([math.log(16)] * 16)


def test_random_unit_vectors_at_batch_512() -> None:
    nce = pooled(unit(512, 512), unit(512, 1, 512, seed=1)).item()
    assert nce == pytest.approx(7.15, abs=0.05)
    mil = pooled(unit(512, 256), unit(512, 5, 256, seed=1)).item()
    assert mil == pytest.approx(7.04, abs=0.05)


def test_sigmoid_pairs_is_the_published_formula() -> None:
    scores = unit(6, 16) @ unit(6, 16, seed=1).T
    labels = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = -F.logsigmoid(labels * (10 * scores - 10)).sum(1)
    got = con.sigmoid_pairs(scores, *eye(6), scale=10, bias=-10)
    torch.testing.assert_close(got, expected)
    flat = con.sigmoid_pairs(torch.zeros(6, 6), *eye(6))
    torch.testing.assert_close(flat, torch.full((6,), 6 * math.log(2)))
    absent = con.sigmoid_pairs(scores, eye(6)[0], torch.zeros(6, 6, dtype=torch.bool))
    assert absent.tolist() == [0] * 6


# --- agreement with other formulas


def test_info_nce_is_cross_entropy() -> None:
    scores = 5 * torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(scores, torch.arange(7), reduction="none")
    for form in ("pooled", "mean"):
        got = info_nce(scores, *eye(7), positives=form)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert info_nce(scores.bfloat16(), *eye(7)).dtype == torch.float32


def test_several_positives() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    positive = torch.tensor([[True, False, True, True]])
    valid = torch.tensor([[True, True, True, False]])  # a positive that is not valid is none
    total = math.log(math.e + math.e**2 + math.e**3)
    any_of = total - math.log(math.e + math.e**3)
    each_of = total - (1 + 3) / 2
    assert info_nce(scores, positive, valid).item() == pytest.approx(any_of)
    assert info_nce(scores, positive, valid, "mean").item() == pytest.approx(each_of)


def brute_mil_nce(f: Tensor, b: Tensor, pos: Tensor, vf: Tensor, vb: Tensor, form: str) -> float:
    """One query, spelled out over plain numbers."""
    ef, eb = f.exp(), b.exp()
    top_f, top_b = float((ef * (pos & vf)).sum()), float((eb * (pos & vb)).sum())
    all_f, all_b = float((ef * vf).sum()), float((eb * vb).sum())
    if top_f == 0:
        return 0.0
    if form == "symmetric":
        return math.log(all_f / top_f) + (math.log(all_b / top_b) if top_b else 0.0)
    return math.log((all_f + all_b - (top_b if form == "strict" else 0.0)) / top_f)


@pytest.mark.parametrize("form", ["released", "strict", "symmetric"])
def test_mil_nce_against_plain_sums_with_random_masks(form: Any) -> None:
    g = torch.Generator().manual_seed(3)
    shape = (6, 6, 3)
    f, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    vf, vb = (torch.rand(shape, generator=g) < 0.6 for _ in range(2))
    pos = (torch.rand(6, 6, generator=g) < 0.3) | eye(6)[0]
    vf[2] = False
    got = mil_nce(f, b, pos, vf, vb, form)
    each = pos[..., None].expand(shape)
    expected = [brute_mil_nce(f[i], b[i], each[i], vf[i], vb[i], form) for i in range(6)]
    assert got.tolist() == pytest.approx(expected)
    assert got[2] == 0
    two_d = mil_nce(f[..., 0], b[..., 0], pos, vf[..., 0], vb[..., 0], form)
    three_d = mil_nce(f[..., :1], b[..., :1], pos, vf[..., :1], vb[..., :1], form)
    assert torch.equal(two_d, three_d)


def test_unknown_form_is_named() -> None:
    f, b = both_directions(unit(2, 4), unit(2, 1, 4))
    with pytest.raises(ValueError, match="released, strict or symmetric, got 'both'"):
        mil_nce(f, b, *eye(2), eye(2)[1], "both")  # type: ignore[arg-type]


# --- permutation laws


@pytest.mark.parametrize("form", ["released", "strict", "symmetric"])
def test_order_of_texts_and_rows_is_free_and_matching_matters(form: str) -> None:
    video, text = unit(12, 16), unit(12, 4, 16, seed=1)
    reference = pooled(video, text, form)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(pooled(video, text.flip(1), form), reference)
    torch.testing.assert_close(pooled(video[order], text[order], form), reference)
    trained = F.normalize(video[:, None] + 0.3 * text, dim=-1)
    chance = pooled(video[:1].expand(12, -1), trained[:1].expand(12, -1, -1), form)
    assert pooled(video, trained, form) < 0.3 * chance
    assert pooled(video, trained.roll(1, 0), form) > 1.2 * chance


# --- masks


def masked_pooled(video_BD: Tensor, text_BLD: Tensor, present_BL: Tensor) -> Tensor:
    ids = torch.arange(len(video_BD))
    rows = Candidates.local(ids, torch.ones(len(ids), dtype=torch.bool))
    texts = Candidates.local(ids, present_BL.any(1))
    positive, valid_vt = candidate_mask(rows, texts)
    _, valid_tv = candidate_mask(texts, rows)
    loss = mil_nce(
        *both_directions(video_BD, text_BLD),
        positive,
        valid_vt[..., None] & present_BL,
        valid_tv[..., None] & present_BL[:, None],
    )
    return loss.sum() / positive.any(1).sum().clamp(min=1)


def test_masked_texts_have_no_influence_but_their_videos_have() -> None:
    present = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1], [0, 0]], dtype=torch.bool)
    video = unit(5, 8).requires_grad_()
    text = unit(5, 2, 8, seed=1).requires_grad_()
    other = torch.where(present[..., None], text.detach(), 1e3 * unit(5, 2, 8, seed=2))
    other.requires_grad_()
    loss, loss_other = masked_pooled(video, text, present), masked_pooled(video, other, present)
    assert torch.equal(loss, loss_other)
    grads = torch.autograd.grad(loss, [video, text])
    grads_other = torch.autograd.grad(loss_other, [video, other])
    for a, b in zip(grads, grads_other, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(grads[1][~present], torch.zeros(5, 8, dtype=torch.float64))
    assert (grads[0][[1, 4]].abs().sum(1) > 1e-4).all()  # negatives of the other texts
    rows = present.any(1)
    alone = masked_pooled(video[rows], text[rows], present[rows])
    assert loss > alone + 1e-3  # more negatives


def test_all_masked_is_zero_with_zero_gradient() -> None:
    video, text = unit(4, 8).requires_grad_(), unit(4, 2, 8, seed=1).requires_grad_()
    loss = masked_pooled(video, text, torch.zeros(4, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert video.grad is not None
    assert text.grad is not None
    assert video.grad.abs().sum() + text.grad.abs().sum() == 0
    scores = torch.full((3, 3), 80.0, requires_grad=True)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    for form in ("pooled", "mean"):
        lost = info_nce(scores, nothing, nothing, form)  # type: ignore[arg-type]
        assert lost.tolist() == [0, 0, 0]
        assert torch.autograd.grad(lost.sum(), scores)[0].abs().sum() == 0


@pytest.mark.parametrize("form", ["pooled", "mean", "released", "strict", "symmetric", "sigmoid"])
def test_appending_absent_rows_changes_neither_loss_nor_gradient(form: Any) -> None:
    def run(a: Tensor, b: Tensor, has_a: Tensor, has_b: Tensor, source: Tensor) -> list[Tensor]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        q = Candidates.local(source, has_a, source % 3 + 1)
        c = Candidates.local(source, has_b, source % 3 + 1)
        positive, valid = candidate_mask(q, c, equal_text_positive=True)
        scores = 4 * a @ b.T
        if form == "sigmoid":
            loss = con.sigmoid_pairs(scores, positive, valid, 10.0, -10.0)
        elif form in ("pooled", "mean"):
            loss = info_nce(scores, positive, valid, form)
        else:
            loss = mil_nce(scores, scores.T, positive, valid, candidate_mask(c, q)[1], form)
        loss.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        return [loss.sum().detach(), a.grad, b.grad]

    source = torch.tensor([0, 1, 2, 3, 4, 4])
    yes = torch.ones(6, dtype=torch.bool)
    plain = run(unit(6, 8), unit(6, 8, seed=1), yes, yes, source)
    junk = 50 * unit(3, 8, seed=9)
    more = torch.cat([yes, ~yes[:3]])
    padded = run(
        torch.cat([unit(6, 8), junk]),
        torch.cat([unit(6, 8, seed=1), junk]),
        more,
        more,
        torch.cat([source, torch.tensor([0, 7, 8])]),
    )
    torch.testing.assert_close(padded[0], plain[0])
    for a, b in zip(plain[1:], padded[1:], strict=True):
        torch.testing.assert_close(b[:6], a)
        assert torch.equal(b[6:], torch.zeros_like(b[6:]))


def test_candidate_mask_cases() -> None:
    source = torch.tensor([10, 10, 20, 30, 40])
    text = torch.tensor([5, 6, 5, 0, 0])
    audio = Candidates.local(source, torch.tensor([1, 1, 1, 1, 0]).bool(), text)
    texts = Candidates.local(source, torch.tensor([1, 1, 1, 0, 0]).bool(), text)
    positive, valid = candidate_mask(audio, texts)
    assert positive.long().tolist()[:3] == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    # Row 0 and 1 share a source: they are left out of each other's candidates.
    assert valid.long().tolist() == [
        [1, 0, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    positive, _ = candidate_mask(audio, texts, equal_text_positive=True)
    assert positive.long().tolist() == [
        [1, 0, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],  # two missing captions are not equal
        [0, 0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="caption ids"):
        candidate_mask(Candidates.local(source, source > 0), texts, equal_text_positive=True)


def test_candidates_slice_and_gather_on_one_process() -> None:
    full = Candidates.local(torch.tensor([7, 8, 9]), torch.tensor([1, 0, 1]).bool())
    part = full[slice(1, 3)]
    assert (part.row.tolist(), part.source.tolist(), len(part)) == ([1, 2], [8, 9], 2)
    assert part.text is None
    again = full.gathered()
    assert torch.equal(again.present, full.present)
    assert again.text is None


# --- chunks


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def chunked_loss(a: Tensor, b: Tensor, scale: LogitScale, chunk: int) -> Tensor:
    rows = Candidates.local(torch.arange(len(a)) // 2, torch.arange(len(a)) % 7 != 0)

    def loss(part: slice) -> Tensor:
        positive, valid = candidate_mask(rows[part], rows)
        forward, backward = scale(a[part] @ b.T), scale(b[part] @ a.T)
        one = info_nce(forward, positive, valid)
        return one + mil_nce(forward, backward, positive, valid, valid)

    return con.in_row_chunks(loss, len(a), chunk)


def test_chunks_change_neither_loss_nor_gradient() -> None:
    results = []
    for chunk in (50, 7, 1):
        scale = LogitScale(10.0).double()
        a, b = unit(50, 8).requires_grad_(), unit(50, 8, seed=1).requires_grad_()
        loss = chunked_loss(a, b, scale, chunk)
        loss.sum().backward()
        results.append([loss.detach(), a.grad, b.grad, scale.log_scale.grad])
        with torch.no_grad():
            torch.testing.assert_close(chunked_loss(a, b, scale, chunk), loss.detach())
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="at least 1"):
        chunked_loss(a, b, scale, 0)


def test_chunks_never_hold_the_square_forward_or_backward() -> None:
    n, chunk = 2048, 32
    a, b = unit(n, 8).float().requires_grad_(), unit(n, 8, seed=1).float().requires_grad_()
    with LargestTensor() as seen:
        chunked_loss(a, b, LogitScale(10.0), chunk).sum().backward()
    assert seen.elements == 2 * chunk * n  # both directions of one chunk side by side
    assert seen.elements < n * n / 30


def test_no_rows_stay_in_the_graph() -> None:
    a, b = unit(3, 4)[:0].requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    nothing = torch.zeros(0, 3, dtype=torch.bool)
    loss = con.in_row_chunks(lambda r: info_nce(a[r] @ b.T, nothing[r], nothing[r]), 0, 8)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert b.grad is not None
    assert b.grad.abs().sum() == 0


# --- temperature


def test_logit_scale_holds_its_bound_and_can_come_back() -> None:
    scale = LogitScale(1 / TAU, bias=-3.0)
    scores = torch.tensor([[0.5, -1.0]])
    torch.testing.assert_close(scale(scores), scores / TAU - 3)
    assert [tuple(p.shape) for p in scale.parameters()] == [(1,), (1,)]
    with torch.no_grad():
        scale.log_scale.fill_(9.0)
    assert scale.scale.item() == pytest.approx(100)
    scale.scale.sum().backward()
    assert scale.log_scale.grad is not None
    assert scale.log_scale.grad.item() == pytest.approx(100)
    scale.clamp_()
    assert scale.log_scale.item() == pytest.approx(math.log(100))


def test_fixed_logit_scale_is_saved_but_not_trained() -> None:
    fixed = LogitScale(10.0, learned=False, bias=-10.0)
    assert list(fixed.parameters()) == []
    assert set(fixed.state_dict()) == {"log_scale", "bias"}
    assert LogitScale(10.0).bfloat16()(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(0, 100.0\]"):
        LogitScale(0.0)
