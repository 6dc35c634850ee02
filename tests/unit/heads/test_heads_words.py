"""Heads of ids and sentences."""

import torch
from torch.nn import functional as F

from mmssl.frontends.summed import EmbeddingTables, SummedEmbedding, second_segment
from mmssl.heads.words import IdHead, SentenceHead, TiedHead


def tables(**options):
    torch.manual_seed(0)
    return EmbeddingTables(50, 8, places=12, **options)


def test_the_sum_of_the_tables_is_normed():
    part = tables(segments=2, eps=1e-12)
    ids, split = torch.tensor([[7, 8, 9, 7]]), torch.tensor([3])
    x = part(ids, split)
    want = part.table.weight[ids] + part.positions.axis0[:4]
    want = want + part.segments.weight[torch.tensor([[0, 0, 0, 1]])]
    torch.testing.assert_close(x, F.layer_norm(want, (8,), eps=1e-12))
    bare = tables(norm=False)
    torch.testing.assert_close(bare(ids), bare.table.weight[ids] + bare.positions.axis0[:4])


def test_a_split_of_zero_is_one_segment():
    ids = torch.zeros(3, 4).long()
    found = second_segment(ids, torch.tensor([0, 2, 3]))
    assert found.tolist() == [[False] * 4, [False, False, True, True], [False] * 3 + [True]]
    assert not second_segment(ids, None).any()


def test_borrowed_tables_are_read_but_not_owned():
    part = tables()
    owner, guest = SummedEmbedding(part, 8), SummedEmbedding(part, 6, borrowed=True)
    assert {n for n, _ in guest.named_parameters()} == {"proj.weight", "proj.bias"}
    assert owner.proj is None
    ids = torch.tensor([[7, 8]])
    x, grid = guest(ids)
    assert grid == guest.grid((2,)) == (2,)
    torch.testing.assert_close(x, guest.proj(owner(ids)[0]))
    x.sum().backward()
    assert part.table.weight.grad.abs().sum() > 0


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
