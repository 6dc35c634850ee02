"""SI-SDR, the thresholded SNR, and which output stands for which sound."""

from itertools import permutations, product

import pytest
import torch
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    scale_invariant_signal_distortion_ratio,
)

from mmssl.objectives.separation import (
    best_permutation,
    best_remix,
    noise_to_signal,
    remixed,
    si_sdr,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(x):
    return torch.full(x.shape[:-1], x.shape[-1])


def pairwise(estimate_PMS, reference_PKS):
    lengths = torch.full((1, 1, 1), estimate_PMS.shape[-1])
    return si_sdr(estimate_PMS[:, :, None], reference_PKS[:, None], lengths)


def pit(estimate_PMS, reference_PKS):
    cost_PMK = -pairwise(estimate_PMS, reference_PKS)
    audible_PK = torch.ones(reference_PKS.shape[:2], dtype=torch.bool)
    index_PK = best_permutation(cost_PMK, audible_PK)
    return cost_PMK.gather(1, index_PK[:, None])[:, 0], index_PK


def test_si_sdr_is_that_of_torchmetrics():
    reference = noise(5, 400) + 0.3
    estimate = 0.7 * reference + noise(5, 400, seed=1) * torch.logspace(-3, 1, 5)[:, None]
    theirs = scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True)
    ours = si_sdr(estimate, reference, full(estimate))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_what_lies_behind_the_end_does_not_count():
    estimate, reference = noise(2, 300), noise(2, 300, seed=1)
    alone = torch.stack(
        [
            si_sdr(e[:n], r[:n], torch.tensor(n))
            for e, r, n in zip(estimate, reference, (200, 300), strict=True)
        ]
    )
    torch.testing.assert_close(si_sdr(estimate, reference, torch.tensor([200, 300])), alone)


@pytest.mark.parametrize("sounds", [2, 3])
def test_the_best_order_is_that_of_torchmetrics(sounds):
    reference = noise(6, sounds, 200)
    order = torch.rand(6, sounds, generator=torch.Generator().manual_seed(2)).argsort(1)
    estimate = reference.gather(1, order[..., None].expand_as(reference))
    estimate = estimate + 0.8 * noise(6, sounds, 200, seed=1)
    loss_PK, index_PK = pit(estimate, reference)
    theirs, index = permutation_invariant_training(
        estimate, reference, scale_invariant_signal_distortion_ratio, zero_mean=True
    )
    torch.testing.assert_close(-loss_PK.mean(1), theirs, rtol=1e-9, atol=0)
    assert torch.equal(index_PK, index)
    assert (order.argsort(1) == index_PK).float().mean() > 0.5  # and mostly what was shuffled


def test_the_best_order_is_that_of_fast_bss_eval():
    peer = pytest.importorskip("fast_bss_eval", reason="pip install --no-deps -r tests/peers.txt")
    reference, estimate = noise(4, 3, 500), noise(4, 3, 500, seed=1)
    loss_PK, _ = pit(estimate, reference)
    ours = -loss_PK.mean(1)
    theirs = peer.si_sdr(reference, estimate, zero_mean=True).mean(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_references_in_any_order_give_the_same_loss():
    reference, estimate = noise(3, 3, 200), noise(3, 3, 200, seed=1)
    whole = pit(estimate, reference)[0].sum(1)
    for order in permutations(range(3)):
        torch.testing.assert_close(pit(estimate, reference[:, order])[0].sum(1), whole)


def test_references_in_reverse_are_found_and_saturate():
    reference = noise(2, 3, 200)
    loss_PK, index_PK = pit(reference.flip(1), reference)
    assert index_PK.tolist() == [[2, 1, 0]] * 2
    assert float(loss_PK.max()) < -140  # 10 log10 of the power over the machine's epsilon


def test_more_outputs_than_sounds_leave_some_out():
    reference = noise(2, 2, 200)
    estimate = torch.cat([noise(2, 2, 200, seed=1), reference.flip(1)], 1)
    assert pit(estimate, reference)[1].tolist() == [[3, 2]] * 2


def test_inaudible_references_do_not_choose():
    cost = torch.tensor([[[-1.0, -90.0], [0.0, 0.0]]])
    assert best_permutation(cost, torch.tensor([[True, True]])).tolist() == [[1, 0]]
    assert best_permutation(cost, torch.tensor([[True, False]])).tolist() == [[0, 1]]


# ---------------------------------------------------------------- mixtures of mixtures


def mixit(estimate_PMS, mixture_P2S):
    place_PM = best_remix(estimate_PMS, mixture_P2S, 30.0)
    return noise_to_signal(remixed(estimate_PMS, place_PM, 2), mixture_P2S, 30.0), place_PM


def brute(estimate_MS, mixture_2S):
    """The least of the sums over all 2^M remixes, each made and measured."""
    found = []
    for place in product(range(2), repeat=len(estimate_MS)):
        total = 0.0
        for half in range(2):
            kept = [k == half for k in place]
            remix = estimate_MS[kept].sum(0)
            power = (mixture_2S[half] ** 2).sum()
            error = ((mixture_2S[half] - remix) ** 2).sum()
            total += 10 * torch.log10(error + 1e-3 * power) - 10 * torch.log10(power)
        found.append((float(total), place))
    return min(found)


@pytest.mark.parametrize("outputs", [2, 4, 8])
def test_the_best_remix_is_that_of_brute_force(outputs):
    source = noise(3, outputs, 120)
    mixture = torch.stack([source[:, ::2].sum(1), source[:, 1::2].sum(1)], 1)
    estimate = source + 0.9 * noise(3, outputs, 120, seed=1)
    loss, place = mixit(estimate, mixture)
    for row in range(3):
        least, expected = brute(estimate[row], mixture[row])
        assert float(loss[row].sum()) == pytest.approx(least, abs=1e-9)
        assert place[row].tolist() == list(expected)


def test_values_of_perfect_and_of_silent_outputs():
    source = noise(2, 4, 300)
    mixture = torch.stack([source[:, [0, 3]].sum(1), source[:, [1, 2]].sum(1)], 1)
    loss, place = mixit(source, mixture)
    assert place.tolist() == [[0, 1, 1, 0]] * 2
    torch.testing.assert_close(loss, torch.full_like(loss, -30.0))
    silent = noise_to_signal(torch.zeros_like(mixture), mixture, 30.0)
    assert silent.numpy() == pytest.approx(0.0043, abs=5e-5)


def test_outputs_in_any_order_give_the_same_loss():
    source = noise(1, 4, 100)
    mixture = torch.stack([source[:, :3].sum(1), source[:, 3]], 1)
    estimate = source + noise(1, 4, 100, seed=1)
    whole, _ = mixit(estimate, mixture)
    for order in permutations(range(4)):
        torch.testing.assert_close(mixit(estimate[:, order], mixture)[0], whole)


def test_the_gradient_is_that_of_the_chosen_remix():
    mixture = noise(1, 2, 50)
    estimate = noise(1, 3, 50, seed=1).requires_grad_()
    loss, place = mixit(estimate, mixture)
    (ours,) = torch.autograd.grad(loss.sum(), estimate)
    chosen = torch.stack([(estimate * (place == k)[..., None]).sum(1) for k in range(2)], 1)
    (fixed,) = torch.autograd.grad(noise_to_signal(chosen, mixture, 30.0).sum(), estimate)
    torch.testing.assert_close(ours, fixed)
    assert float(ours.abs().sum()) > 0
    perfect = mixture.clone().requires_grad_()  # beyond the limit nothing pulls any more
    (none,) = torch.autograd.grad(mixit(perfect, mixture)[0].sum(), perfect)
    assert float(none.abs().max()) < 1e-12
