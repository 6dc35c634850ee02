"""Values and laws of the scores."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.heads.score import Bilinear, Distance, Dot, FusionMLP, ScoreMap, to_bins
from mmssl.objectives.classification import binary_cross_entropy, softmax_cross_entropy
from mmssl.objectives.contrastive import info_nce


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chance_mask(n: int) -> tuple[Tensor, Tensor]:
    return torch.eye(n, dtype=torch.bool), torch.ones(n, n, dtype=torch.bool)


# --- vectors


@pytest.mark.parametrize(
    "score",
    [Dot(), Dot(normalize=False), Bilinear(8), Distance(), FusionMLP(8, 8, 16)],
    ids=lambda s: type(s).__name__,
)
def test_pairs_are_the_diagonal_of_all_against_all(score: nn.Module) -> None:
    score.double()
    a, b = rand(6, 8), rand(6, 8, seed=1)
    square: Tensor = score(a, b)
    assert square.shape == (6, 6)
    torch.testing.assert_close(score.pairs(a, b), square.diagonal())  # type: ignore[operator]
    torch.testing.assert_close(score(a[2:4], b)[:, 1:], square[2:4, 1:])


@pytest.mark.parametrize("score", [Dot(), Bilinear(8), Distance(), ScoreMap()], ids=str)
def test_scores_stay_in_full_precision_under_autocast(score: nn.Module) -> None:
    dense = isinstance(score, ScoreMap)
    a = rand(2, 3, 4, 8).float() if dense else rand(2, 8).float()
    b = rand(5, 6, 8, seed=1).float() if dense else rand(5, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside: Tensor = score(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, score(a, b))


def test_dot_is_cosine_and_safe_at_zero() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    scores = Dot()(a, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0.6], [0.0]]))
    scores.sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    raw = Dot(normalize=False)(a, torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(raw, torch.tensor([[6.0], [0.0]]))


def test_cola_constant_embeddings_give_the_log_of_the_batch_for_any_matrix() -> None:
    score = Bilinear(16).double()
    with torch.no_grad():
        score.weight.copy_(3 * rand(16, 16, seed=7))
    same = rand(1, 16).expand(1024, 16)
    loss = info_nce(score(same, same), *chance_mask(1024))
    assert loss.mean().item() == pytest.approx(6.9315, abs=5e-5)
    assert loss.tolist() == pytest.approx([math.log(1024)] * 1024, rel=1e-12)


def test_cola_equals_cross_entropy_and_knows_the_matching() -> None:
    score = Bilinear(16).double()
    a, b = rand(32, 16), rand(32, 16, seed=1)
    loss = info_nce(score(a, b), *chance_mask(32)).mean()
    expected = F.cross_entropy(a @ score.weight @ b.T, torch.arange(32))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    together = info_nce(score(a[order], b[order]), *chance_mask(32)).mean()
    torch.testing.assert_close(together, loss)
    assert abs(info_nce(score(a, b[order]), *chance_mask(32)).mean() - loss) > 1e-3


def test_bilinear_starts_from_the_published_spread() -> None:
    torch.manual_seed(0)
    weight = Bilinear(512).weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.01)
    # Independent unit-variance features: logits of deviation 512 * 0.05, far above chance loss.
    logits = Bilinear(512)(rand(64, 512).float(), rand(64, 512, seed=1).float())
    assert logits.std().item() == pytest.approx(25.6, rel=0.1)


def test_ave_net_before_training() -> None:
    score = Distance()
    a, b = rand(4000, 128).float(), rand(4000, 128, seed=1).float()
    distance = score.distances(a[:500], b[:500])
    assert distance.mean().item() == pytest.approx(1.41, abs=0.01)
    assert distance.std().item() == pytest.approx(0.06, abs=0.01)
    labels = torch.arange(4000) % 2
    logits = score.logits(a, b)
    loss = softmax_cross_entropy(logits, labels)
    assert loss.mean().item() == pytest.approx(0.693, abs=0.03)
    torch.testing.assert_close(loss, binary_cross_entropy(score.pairs(a, b), labels == 1))
    assert score.weight.tolist() == [1, -1]
    # Near vectors match, far ones do not; the wrong sign says the opposite.
    assert score.pairs(a[:1], a[:1]).item() == pytest.approx(2 * math.sqrt(2), abs=1e-3)
    assert score.pairs(a[:1], -a[:1]).item() == pytest.approx(2 * math.sqrt(2) - 4, abs=1e-3)
    assert Distance(slope=-1).pairs(a[:1], a[:1]).item() < 0


def test_distance_is_the_distance_of_unit_vectors_with_finite_gradient() -> None:
    score = Distance().double()
    a, b = rand(5, 8).requires_grad_(), rand(7, 8, seed=1)
    expected = torch.cdist(F.normalize(a, dim=-1), F.normalize(b, dim=-1))
    torch.testing.assert_close(score.distances(a, b), expected, rtol=1e-6, atol=1e-6)
    score(a, a.detach()).sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    score.pairs(a, a.detach()).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_fusion_is_an_mlp_on_the_concatenation() -> None:
    score = FusionMLP(6, 4, 16).double()
    a, b = rand(5, 6), rand(5, 4, seed=1)
    joined = torch.cat([a, b], 1)
    expected = score.out(F.relu(score.hidden(joined)))
    torch.testing.assert_close(score.logits(a, b), expected)
    torch.testing.assert_close(score(a, b).diagonal(), expected[:, 1] - expected[:, 0])
    assert (
        sum(p.numel() for p in FusionMLP(512, 512).parameters()) == 1024 * 128 + 128 + 128 * 2 + 2
    )


# --- maps


REDUCERS = {
    "max": lambda values: max(values),
    "mean": lambda values: sum(values) / len(values),
    "lse": lambda values: math.log(sum(math.exp(10 * v) for v in values) / len(values)) / 10,
}


def brute(video: Tensor, audio: Tensor, cells: Tensor, steps: Tensor, score: ScoreMap) -> float:
    """One pair (T, S, D), (U, D) with plain loops; for aligned scores U = T."""
    table: dict[int, dict[tuple[int, int], float]] = {}
    for u in range(audio.shape[0]):
        for t in range(video.shape[0]):
            for s in range(video.shape[1]):
                if not (steps[u] and cells[t, s]) or (score.aligned and t != u):
                    continue
                x, y = video[t, s], audio[u]
                lengths = {"both": x.norm() * y.norm(), "steps": y.norm(), "none": 1}
                value = float(x @ y / lengths[score.normalize])
                table.setdefault(u, {})[(0 if score.aligned else t, s)] = value
    if not table:
        return 0.0
    if score.space == "mean" and score.time == "max":
        columns: dict[tuple[int, int], list[float]] = {}
        for row in table.values():
            for cell, value in row.items():
                columns.setdefault(cell, []).append(value)
        return REDUCERS["mean"]([max(v) for v in columns.values()])
    return REDUCERS[score.time]([REDUCERS[score.space](list(r.values())) for r in table.values()])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("space", ["max", "mean", "lse"])
@pytest.mark.parametrize("time", ["max", "mean"])
@pytest.mark.parametrize("normalize", ["both", "steps", "none"])
def test_score_map_against_loops(aligned: bool, space: Any, time: Any, normalize: Any) -> None:
    score = ScoreMap(space, time, aligned, normalize, chunk=2)
    steps = 3 if aligned else 5
    video, audio = rand(4, 3, 6, 8), rand(5, steps, 8, seed=1)
    g = torch.Generator().manual_seed(2)
    cells, valid = torch.rand(4, 3, 6, generator=g) < 0.7, torch.rand(5, steps, generator=g) < 0.7
    cells[1, 2], cells[2], valid[3] = False, False, False
    for c, v in ((cells, valid), (None, valid), (cells, None), (None, None)):
        c_all = torch.ones(4, 3, 6, dtype=torch.bool) if c is None else c
        v_all = torch.ones(5, steps, dtype=torch.bool) if v is None else v
        expected = [
            [brute(video[q], audio[k], c_all[q], v_all[k], score) for k in range(5)]
            for q in range(4)
        ]
        got = score(video, audio, c, v)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
        rows = score.pairs(video, audio[:4], c, None if v is None else v[:4])
        torch.testing.assert_close(rows, got[:, :4].diagonal())


def test_dense_av_constant_features_give_the_log_of_the_batch() -> None:
    for aligned in (False, True):
        score = ScoreMap(aligned=aligned, normalize="none")
        video, audio = rand(1, 1, 1, 8).expand(12, 4, 9, 8), rand(1, 1, 8).expand(12, 10, 8)
        loss = info_nce(score(video, audio), *chance_mask(12))
        assert loss.tolist() == pytest.approx([math.log(12)] * 12)


@pytest.mark.parametrize("aligned", [False, True])
def test_dense_av_order_of_cells_is_free(aligned: bool) -> None:
    score = ScoreMap(aligned=aligned)
    video, audio = rand(3, 4, 9, 8), rand(5, 10, 8, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    changed = video.clone()
    changed[1] = video[1][:, order]
    torch.testing.assert_close(score(changed, audio), score(video, audio), rtol=0, atol=1e-12)
    # The order of the bins is free unless the score is aligned in time.
    swapped = score(video.flip(1), audio)
    assert torch.allclose(swapped, score(video, audio)) is (not aligned)


def test_absent_audio_steps_do_not_matter() -> None:
    for aligned in (False, True):
        score = ScoreMap(aligned=aligned)
        video, audio = rand(3, 4, 9, 8), rand(2, 8, 8, seed=1).requires_grad_()
        valid = torch.arange(8).expand(2, -1) < torch.tensor([[8], [5]])
        scores = score(video, audio, None, valid)
        noisy = torch.where(valid[..., None], audio.detach(), torch.full((), 1e4).double())
        torch.testing.assert_close(score(video, noisy, None, valid), scores)
        scores.sum().backward()
        assert audio.grad is not None
        assert torch.equal(audio.grad.abs().sum(-1) > 0, valid)
        nothing = score(video, audio, None, torch.zeros_like(valid))
        assert nothing.abs().sum() == 0
        assert torch.isfinite(torch.autograd.grad(nothing.sum(), audio)[0]).all()


@pytest.mark.parametrize("space", ["max", "mean", "lse"])
def test_gradients_stay_finite_without_valid_cells(space: Any) -> None:
    video, audio = rand(2, 3, 4, 8).requires_grad_(), rand(2, 3, 8, seed=1)
    cells = torch.zeros(2, 3, 4, dtype=torch.bool)
    cells[0, 0] = True
    ScoreMap(space)(video, audio, cells).sum().backward()
    assert video.grad is not None
    assert torch.isfinite(video.grad).all()
    assert video.grad[1].abs().sum() == 0


def test_maps_show_the_cell_that_makes_the_score() -> None:
    video, audio = rand(3, 4, 9, 8), rand(3, 4, 8, seed=1)
    aligned = ScoreMap(aligned=True)
    shown = aligned.maps(video, audio)
    assert shown.shape == (3, 4, 9)
    torch.testing.assert_close(shown.max(-1).values.mean(-1), aligned.pairs(video, audio))
    cosine = F.cosine_similarity(video[1, 2, 5], audio[1, 2], dim=0)
    torch.testing.assert_close(shown[1, 2, 5], cosine)
    free = ScoreMap("mean", "mean")
    torch.testing.assert_close(free.maps(video, audio).mean((1, 2)), free.pairs(video, audio))
    peak = ScoreMap("max", "max")
    torch.testing.assert_close(peak.maps(video, audio).amax((1, 2)), peak.pairs(video, audio))
    valid = torch.tensor([[True, True, False, False]]).expand(3, -1)
    masked = aligned.maps(video, audio, valid)
    assert masked[:, 2:].abs().sum() == 0
    assert torch.equal(masked[:, :2], shown[:, :2])
    kept = free.maps(video, audio, valid)
    torch.testing.assert_close(kept, free.maps(video, audio[:, :2]))


def test_bins_average_the_audio_of_their_own_time() -> None:
    audio = rand(2, 6, 3)
    even, _ = to_bins(audio, None, 3)
    torch.testing.assert_close(even, audio.reshape(2, 3, 2, 3).mean(2))
    valid = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    some, bins = to_bins(audio, valid, 3)
    assert bins is not None
    assert bins.tolist() == [[True, True, False], [True, True, True]]
    torch.testing.assert_close(some[0, 0], audio[0, 0])
    assert some[0, 2].abs().sum() == 0
    ragged, _ = to_bins(audio[:, :5], None, 2)  # 2.5 steps per bin
    expected = (audio[:, 0] + audio[:, 1] + audio[:, 2] / 2) / 2.5
    torch.testing.assert_close(ragged[:, 0], expected)
    finer, _ = to_bins(audio[:, :2], None, 4)  # half a step per bin
    torch.testing.assert_close(finer, audio[:, [0, 0, 1, 1]])
    # 10 steps at 2.5 per bin reach bin 3; a fourth bin has no audio.
    longer, reached = to_bins(rand(1, 8, 3), None, 4, steps_per_bin=2.5)
    assert reached is not None
    assert reached.tolist() == [[True, True, True, True]]
    beyond = to_bins(rand(1, 7, 3), None, 4, steps_per_bin=2.5)[1]
    assert beyond is not None
    assert beyond.tolist() == [[True, True, True, False]]
    assert longer.shape == (1, 4, 3)
    same, untouched = to_bins(audio, None, 6)
    assert same is audio
    assert untouched is None


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("aligned", [False, True])
def test_chunks_change_nothing_but_memory(aligned: bool) -> None:
    grads, peaks = [], []
    for chunk in (0, 3):
        video, audio = rand(24, 4, 16, 8).requires_grad_(), rand(24, 6, 8, seed=1).requires_grad_()
        score = ScoreMap(aligned=aligned, chunk=chunk)
        with LargestTensor() as seen:
            loss = info_nce(10 * score(video, audio), *chance_mask(24)).sum()
            loss.backward()
        grads.append([loss.detach(), video.grad, audio.grad])
        peaks.append(seen.elements)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    per_row = 24 * 4 * 16 * (1 if aligned else 6)
    assert peaks[0] == 24 * per_row
    assert peaks[1] == max(3 * per_row, 24 * 4 * 16 * 8)  # the video itself is not chunked


def test_unknown_reducer_is_named() -> None:
    with pytest.raises(ValueError, match="max, mean, lse or soft, got 'median'"):
        ScoreMap("median")  # type: ignore[arg-type]
