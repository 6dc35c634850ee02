"""Utterance mixing."""

import pytest
import torch

from mmssl.views.mix import mix_utterances, plan_mix
from mmssl.views.wave import normalize

SEEDS = torch.arange(300)
LENGTHS = 200 + SEEDS % 100


def waves(rows=300, samples=300, lengths=None, seed=0):
    x = torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((rows,), samples) if lengths is None else lengths
    return x * (torch.arange(samples) < lengths[:, None]) * (0.1 + torch.arange(rows)[:, None] / 99)


def test_power_ratio_and_region():
    """Row by row: what was added is a stretch of the unmixed partner at the drawn ratio."""
    x = waves(lengths=LENGTHS)
    before = x.clone()
    out = mix_utterances(x, LENGTHS, SEEDS, probability=1.0)
    plan = plan_mix(LENGTHS, SEEDS, 1.0)
    assert torch.equal(x, before)
    assert plan.mixed_P.all()
    assert (plan.length_P <= LENGTHS // 2).all()
    assert plan.length_P.max() > 120
    ratios = []
    for i in range(300):
        j, n = int(plan.second_P[i]), int(plan.length_P[i])
        start, origin = int(plan.start_P[i]), int(plan.from_P[i])
        assert start + n <= LENGTHS[i]
        assert origin + n <= LENGTHS[j]
        added = (out[i] - x[i]).double()
        assert not added[:start].any()
        assert not added[start + n :].any()
        part = x[j, origin : origin + n].double()
        if n < 10:
            continue
        gain = (added[start : start + n] @ part) / (part @ part)
        assert torch.allclose(added[start : start + n], gain * part, atol=1e-5)
        main, second = (x[k, : LENGTHS[k]].double().square().mean() for k in (i, j))
        ratio = 10 * torch.log10(main / (gain.square() * second))
        assert ratio.item() == pytest.approx(plan.ratio_P[i].item(), abs=1e-3)
        ratios.append(ratio)
    ratios = torch.stack(ratios)
    assert -5 <= ratios.min() < -4.8
    assert 4.8 < ratios.max() <= 5
    assert ratios.mean().abs() < 0.6


def test_probability_zero_gives_the_batch_bit_for_bit():
    x = waves(lengths=LENGTHS)
    x[0, 0] = -0.0
    out = mix_utterances(x, LENGTHS, SEEDS, probability=0.0, normalize=True)
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_a_share_of_the_rows_is_mixed_and_the_others_stay():
    seeds = torch.arange(5000)
    lengths = torch.full((5000,), 40)
    x = waves(5000, 40)
    plan = plan_mix(lengths, seeds)
    out = mix_utterances(x, lengths, seeds)
    assert plan.mixed_P.double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(out[~plan.mixed_P], x[~plan.mixed_P])
    assert not plan.noise_P.any()
    # Length uniform in 0 .. 20, both ends included; partners uniform, the row itself included.
    counts = plan.length_P.bincount(minlength=21).double() / 5000
    assert (counts - 1 / 21).abs().max() < 0.015
    assert len(counts) == 21
    partners = plan.second_P.double() / 5000
    assert partners.mean().item() == pytest.approx(0.5, abs=0.02)
    assert plan.second_P.max() < 5000
    pair = plan_mix(torch.tensor([40, 40]).repeat(1000), torch.arange(2000))
    assert (pair.start_P + pair.length_P).max() == 40
    assert (pair.from_P + pair.length_P).max() == 40


def test_all_but_the_partner_is_the_rows_own():
    plan = plan_mix(LENGTHS, SEEDS)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    equal = torch.full((300,), 280)
    short = plan_mix(equal[:7], SEEDS[:7])
    long = plan_mix(equal, SEEDS)
    for name in ("mixed_P", "noise_P", "ratio_P"):
        assert torch.equal(
            getattr(plan_mix(LENGTHS[order], SEEDS[order]), name), getattr(plan, name)[order]
        )
    for name in ("mixed_P", "ratio_P", "length_P", "start_P", "from_P"):
        assert torch.equal(getattr(short, name), getattr(long, name)[:7])


def test_padding_stays_and_changes_nothing():
    x = waves(lengths=LENGTHS)
    out = mix_utterances(x, LENGTHS, SEEDS, 1.0, normalize=True)
    longer = mix_utterances(
        torch.nn.functional.pad(x, (0, 50)), LENGTHS, SEEDS, 1.0, normalize=True
    )
    assert not out[torch.arange(300) >= LENGTHS[:, None]].any()
    assert not longer[:, 300:].any()
    assert torch.allclose(longer[:, :300], out, atol=1e-5)


def test_mixed_rows_are_normalised_again():
    x = torch.stack([normalize(row) for row in waves(seed=3)])
    lengths = torch.full((300,), 300)
    plain = mix_utterances(x, lengths, SEEDS, 0.5)
    out = mix_utterances(x, lengths, SEEDS, 0.5, normalize=True)
    mixed = plan_mix(lengths, SEEDS, 0.5).mixed_P
    assert 100 < mixed.sum() < 200
    assert torch.equal(out[~mixed], x[~mixed])
    for i in mixed.nonzero()[:, 0].tolist():
        assert torch.allclose(out[i], normalize(plain[i]), atol=1e-5)


def test_noise_clips_and_their_ratio():
    x = waves(lengths=LENGTHS)
    noise = waves(5, 450, torch.tensor([450, 300, 90, 20, 0]), seed=9)
    clips = torch.tensor([450, 300, 90, 20, 0])
    out = mix_utterances(x, LENGTHS, SEEDS, 1.0, noise, clips, noise_probability=0.5)
    plan = plan_mix(LENGTHS, SEEDS, 1.0, clips, 0.5)
    assert plan.noise_P.double().mean().item() == pytest.approx(0.5, abs=0.1)
    assert plan.ratio_P[plan.noise_P].max() > 17
    assert plan.ratio_P[~plan.noise_P].max() <= 5
    assert out.isfinite().all()
    for i in plan.noise_P.nonzero()[:, 0].tolist():
        j, n = int(plan.second_P[i]), int(plan.length_P[i])
        assert n <= clips[j]
        added = (out[i] - x[i]).double()
        if j == 4:  # an empty clip adds nothing
            assert not added.any()
            continue
        start, origin = int(plan.start_P[i]), int(plan.from_P[i])
        power = [w.double().square().mean() for w in (x[i, : LENGTHS[i]], noise[j, : clips[j]])]
        gain = (power[0] / power[1] / 10 ** (plan.ratio_P[i] / 10)).sqrt()
        expected = gain * noise[j, origin : origin + n]
        assert torch.allclose(added[start : start + n], expected.double(), atol=1e-5)
    whole = mix_utterances(x, LENGTHS, SEEDS, 1.0, noise[:1], noise_probability=1.0)
    assert not torch.equal(whole, x)


def test_silence_adds_nothing_and_noise_must_be_given():
    x = waves(6, 50)
    x[1:] = 0.0
    lengths = torch.full((6,), 50)
    out = mix_utterances(x, lengths, torch.arange(6), 1.0)
    itself = plan_mix(lengths, torch.arange(6), 1.0).second_P[0] == 0
    assert torch.equal(out[1:], x[1:])
    assert torch.equal(out[0], x[0]) or itself
    with pytest.raises(ValueError, match="there is no noise"):
        mix_utterances(x, lengths, torch.arange(6), noise_probability=0.1)
