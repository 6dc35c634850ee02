"""VQ-VAE's codebook: the hand case of its losses, and entries that are moving averages."""

import numpy as np
import pytest
import torch
from torch import nn

from mmssl.quantizers import VectorQuantizer


def line(*entries, **options):
    """One group of one-dimensional entries."""
    quantizer = VectorQuantizer(1, 1, len(entries), project=False, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor(entries).view(1, -1, 1))
    if quantizer.ema:
        quantizer.sums_CVW.copy_(quantizer.codebook)
    return quantizer


def step(quantizer, z_PND, valid=None, position=0.0):
    valid = torch.ones(z_PND.shape[:2], dtype=torch.bool) if valid is None else valid
    codes = quantizer(z_PND, valid)
    quantizer.offer(z_PND, codes, valid, position)
    quantizer.write()
    return codes


def test_the_hand_case():
    """e = 0 and 1, z = 0.6: loss 0.16 for the entry, 0.04 for the latent, whose slope is -0.2."""
    quantizer, z = line(0.0, 1.0), torch.tensor([[[0.6]]], requires_grad=True)
    codes = quantizer(z)
    assert codes.vectors_PNQ.item() == 1.0
    assert codes.commitment.item() == pytest.approx(0.16 + 0.25 * 0.16)
    codes.commitment.sum().backward(retain_graph=True)
    assert z.grad.item() == pytest.approx(2 * 0.25 * (0.6 - 1))
    assert quantizer.codebook.grad.flatten().tolist() == pytest.approx([0, 2 * 0.4])
    z.grad, quantizer.codebook.grad = None, None
    (3 * codes.vectors_PNQ).sum().backward()  # a decoder's gradient goes past the entry to z
    assert z.grad.item() == 3.0
    assert quantizer.codebook.grad is None
    averaged = line(0.0, 1.0, ema=0.9)
    assert not list(averaged.parameters())
    assert averaged(z).commitment.item() == pytest.approx(0.04)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_equal_the_formula(shared):
    """Counts, sums and entries over three steps, derived anew in numpy; padding counts nowhere."""
    torch.manual_seed(0)
    groups, entries, width, decay = 2, 5, 3, 0.9
    quantizer = VectorQuantizer(6, groups, entries, shared, project=False, ema=decay).double()
    nn.init.normal_(quantizer.codebook)
    quantizer.sums_CVW.copy_(quantizer.codebook)
    book = quantizer.codebook.numpy().copy()
    books = len(book)
    n, m = np.ones((books, entries)), book.copy()
    for k in range(3):
        z = torch.randn(4, 7, 6, dtype=torch.float64)
        valid = torch.rand(4, 7) < 0.7
        step(quantizer, z, valid, k / 10)
        count, total = np.zeros_like(n), np.zeros_like(m)
        for vector in z[valid].numpy():
            for g, part in enumerate(vector.reshape(groups, width)):
                c = 0 if shared else g
                j = np.argmin(((book[c] - part) ** 2).sum(1))
                count[c, j] += 1
                total[c, j] += part
        n, m = decay * n + (1 - decay) * count, decay * m + (1 - decay) * total
        smooth = (n + 1e-5) / (n.sum(1) + entries * 1e-5)[:, None] * n.sum(1)[:, None]
        book = m / smooth[..., None]
        np.testing.assert_allclose(quantizer.chosen_CV, n, rtol=1e-12)
        np.testing.assert_allclose(quantizer.sums_CVW, m, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(quantizer.codebook, book, rtol=1e-12, atol=1e-15)


def test_micro_batches_are_one_step_and_a_step_left_out_leaves_no_trace():
    z = torch.randn(6, 2, 1, generator=torch.Generator().manual_seed(1))
    one, parts = line(-1.0, 1.0, ema=0.9), line(-1.0, 1.0, ema=0.9)
    valid = torch.ones(3, 2, dtype=torch.bool)
    parts.offer(z[:3] + 9, parts(z[:3] + 9), valid, 0.0)  # this step is never written
    for half in (z[:3], z[3:]):
        parts.offer(half, parts(half), valid, 0.1)
    parts.write()
    step(one, z)
    for a, b in zip(one.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    before = [b.clone() for b in one.buffers()]
    one.write()
    assert all(map(torch.equal, before, one.buffers()))


def test_rare_entries_become_latents_of_the_step():
    quantizer = line(0.0, 50.0, -50.0, ema=0.5, restart=0.4)
    z = torch.linspace(-1, 1, 8).view(2, 4, 1)
    step(quantizer, z)
    # chosen 0.5 + 4, 0.5 and 0.5 times: the mean is 11/6, and 0.5 is less than 0.4 of it
    assert quantizer.chosen_CV[0].tolist() == pytest.approx([4.5, 11 / 6, 11 / 6])
    fresh = quantizer.codebook[0, 1:, 0]
    assert all(float((z - e).abs().min()) < 1e-4 for e in fresh)
    assert float(fresh[0]) != pytest.approx(float(fresh[1]))
    kept = line(0.0, 50.0, -50.0, ema=0.5)
    step(kept, z)
    assert kept.codebook[0, 1:, 0].tolist() == pytest.approx([50.0, -50.0], rel=1e-3)
    silent = torch.zeros(2, 4, dtype=torch.bool)
    before = quantizer.codebook.clone()
    step(quantizer, z, silent, 0.5)  # nothing valid: nothing to restart from, nothing is NaN
    torch.testing.assert_close(quantizer.codebook, before, rtol=1e-3, atol=1e-3)


def test_indices_and_commitment_of_vector_quantize_pytorch():
    library = pytest.importorskip(
        "vector_quantize_pytorch", reason="pip install --no-deps -r tests/peers.txt"
    )
    torch.manual_seed(0)
    peer = library.VectorQuantize(dim=6, codebook_size=16, decay=0.8, commitment_weight=0.25)
    ours = VectorQuantizer(6, 1, 16, project=False, ema=0.8)
    with torch.no_grad():
        ours.codebook.normal_()
        ours.sums_CVW.copy_(ours.codebook)
        peer._codebook.embed.copy_(ours.codebook)
        peer._codebook.embed_avg.copy_(ours.codebook)
        peer._codebook.cluster_size.fill_(1)
    for k in range(3):
        z = torch.randn(3, 11, 6)
        quantised, ids, loss = peer(z)
        codes = step(ours, z, position=k / 10)
        assert torch.equal(codes.ids_PNG[..., 0], ids)
        torch.testing.assert_close(codes.vectors_PNQ, quantised)
        torch.testing.assert_close(codes.commitment / codes.count, loss.sum())
        torch.testing.assert_close(ours.codebook, peer._codebook.embed, rtol=1e-5, atol=1e-6)
