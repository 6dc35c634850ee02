"""Heads of ids and sentences."""

import torch
from torch.nn import functional as F

from mmssl.frontends.summed import EmbeddingTables
from mmssl.heads.words import IdHead, SentenceHead, TiedHead


def tables(**options):
    torch.manual_seed(0)
    return EmbeddingTables(50, 8, places=12, **options)


def test_a_tied_head_scores_with_the_table():
    part = tables()
    head = TiedHead(16, part)
    assert {n for n, _ in head.named_parameters()} == {
        "dense.weight",
        "dense.bias",
        "norm.weight",
        "norm.bias",
        "bias_V",
    }
    with torch.no_grad():
        head.bias_V.normal_()
    x = torch.randn(5, 16)
    want = F.layer_norm(F.gelu(head.dense(x)), (8,), eps=1e-12) @ part.table.weight.T + head.bias_V
    torch.testing.assert_close(head(x), want)
    head(x).sum().backward()
    assert part.table.weight.grad is not None


def test_sentences_are_read_from_the_first_token():
    head = SentenceHead(8)
    x = torch.randn(3, 4, 8)
    other = torch.cat([x[:, :1], torch.randn(3, 3, 8)], 1)
    assert torch.equal(head(x), head(other))
    torch.testing.assert_close(head(x), head.out(torch.tanh(head.pooler(x[:, 0]))))


def test_no_hidden_token_is_a_zero_with_a_gradient():
    head = IdHead(8, 4, 50)
    F.cross_entropy(head(torch.zeros(0, 8)), torch.zeros(0).long(), reduction="sum").backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
