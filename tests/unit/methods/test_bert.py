"""BERT's acceptance list on its method file (Devlin et al. 2019)."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch
from text_family import (
    BERT_LAYER,
    embeddings_of,
    layers_of,
    linear_of,
    load_all,
    padded_batch,
    peer_sizes,
    seen_of,
    text_model,
    zeroed,
)
from tiny_run import absent_rows, gradients, take_rows

from mmssl import config
from mmssl.build import build_model
from mmssl.check import SPECIAL, VOCABULARY
from mmssl.specs import RunSpec
from mmssl.types import UserError


def losses(model, batch):
    total, terms = model(batch, 0, 10)
    return float(total.detach()), {n: float(t.sum / t.count) for n, t in terms.items()}


def test_zero_heads_cost_ln_of_the_vocabulary_plus_ln_2():
    model = text_model("bert").eval()
    target = model.tasks["mlm"].target
    zeroed(target.head.dense, target.sentence.out)
    total, terms = losses(model, padded_batch(model))
    assert terms["mlm"] == pytest.approx(math.log(VOCABULARY), abs=1e-5)
    assert terms["mlm.sentence"] == pytest.approx(math.log(2), abs=1e-6)
    assert total == pytest.approx(math.log(VOCABULARY) + math.log(2), abs=1e-5)
    assert math.log(30522) + math.log(2) == pytest.approx(11.0194, abs=1e-4)


def test_the_published_size():
    with torch.device("meta"):
        model = build_model(config.load("general/bert"), 30522, SPECIAL)
    # 12 x 768, segments and places; pooler, next-sentence map and the bias of the tied decoder
    assert sum(p.numel() for p in model.parameters()) == 110_106_428


def test_losses_and_hidden_states_of_transformers():
    """P12, with padding and both segments."""
    hf = pytest.importorskip("transformers")
    model = text_model("bert").eval()
    tower, target = model.towers["text"], model.tasks["mlm"].target
    peer = hf.BertForPreTraining(hf.BertConfig(**peer_sizes(model), max_position_embeddings=512))
    table, bias = tower.stem.tables.table.weight, target.head.bias_V
    with torch.no_grad():
        bias.normal_()
    weights = embeddings_of(tower, "bert.embeddings")
    weights |= layers_of(tower, "bert.encoder.layer", BERT_LAYER)
    weights |= linear_of("bert.pooler.dense", target.sentence.pooler)
    weights |= linear_of("cls.seq_relationship", target.sentence.out)
    weights |= linear_of("cls.predictions.transform.dense", target.head.dense)
    weights |= linear_of("cls.predictions.transform.LayerNorm", target.head.norm)
    weights |= {"cls.predictions.bias": bias, "cls.predictions.decoder.bias": bias}
    load_all(peer, weights | {"cls.predictions.decoder.weight": table})
    batch = padded_batch(model)
    seen, view = seen_of(model, batch), batch.views["text"]
    place = torch.arange(24)
    valid = place < view.lengths_P[:, None]
    out = peer(
        input_ids=seen.altered,
        attention_mask=valid.long(),
        token_type_ids=((place >= 6) & valid).long(),
        labels=view.data.where(seen.hidden_PN, -100),
        next_sentence_label=view.order_P,
        output_hidden_states=True,
    )
    total, _ = losses(model, batch)
    assert total == pytest.approx(float(out.loss.detach()), abs=1e-5)
    read = replace(view, data=seen.altered)
    ours, _ = tower.layers(read)
    assert len(ours) == len(out.hidden_states) == 3
    for a, b in zip(ours, out.hidden_states, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=0)


def test_both_losses_read_one_pass():
    model = text_model("bert").train()
    batch = padded_batch(model)
    passes = model.passes(batch, 0.0)
    terms = model.tasks["mlm"](passes, batch)
    assert set(terms) == {"", "sentence"}
    assert list(passes._done) == [("text", "mlm")]
    assert int(terms["sentence"].count) == 4
    assert int(terms[""].count) == int(seen_of(model, batch).hidden_PN.sum())


def test_fifteen_percent_are_chosen_and_split_80_10_10():
    model = text_model("bert", "views.text.length=128")
    view = full_batch(model.spec, 1000).views["text"]
    task, tower = model.tasks["mlm"], model.towers["text"]
    hidden = task._hidden(tower, view, 0.0)
    candidates = task.target.candidates(view)
    assert int(candidates.sum()) > 1e5
    assert not (hidden & ~candidates).any()
    assert float(hidden.sum() / candidates.sum()) == pytest.approx(0.15, abs=0.005)
    read, ids = task.target.altered(tower, view, hidden)[hidden], view.data[hidden]
    masked, kept = read == SPECIAL["mask"], read == ids
    for part, share in ((masked, 0.8), (kept, 0.1), (~masked & ~kept, 0.1)):
        assert float(part.float().mean()) == pytest.approx(share, abs=0.01)


def test_a_padded_token_changes_nothing():
    model = text_model("bert").eval()
    batch = padded_batch(model)
    view = batch.views["text"]
    before = losses(model, batch)
    vectors = model.passes(batch).tokens("text").x_PND
    other = torch.where(torch.arange(24) < view.lengths_P[:, None], view.data, 77)
    assert not torch.equal(other, view.data)
    batch.views["text"] = replace(view, data=other)
    assert losses(model, batch) == before
    after = model.passes(batch).tokens("text").x_PND
    valid = torch.arange(24) < view.lengths_P[:, None]
    assert torch.equal(after[valid], vectors[valid])


def test_segments_are_told_apart():
    model = text_model("bert").eval()
    batch = padded_batch(model)
    tables = model.towers["text"].stem.tables
    a = model.towers["text"].stem(batch.views["text"].data, batch.views["text"].split_P)[0]
    with torch.no_grad():
        tables.segments.weight[1] += 1.0 * torch.arange(16)
    b = model.towers["text"].stem(batch.views["text"].data, batch.views["text"].split_P)[0]
    assert torch.equal(a[:, :6], b[:, :6])
    assert (a[:, 6:] != b[:, 6:]).any(-1).all()


def test_rows_without_text_change_neither_loss_nor_gradient():
    model = text_model("bert")
    batch = padded_batch(model)
    loss, grads = gradients(model, batch)
    more, others = gradients(model, absent_rows(batch, 3))
    assert torch.equal(loss, more)
    assert all(torch.equal(grads[n], others[n]) for n in grads)
    empty, zero = gradients(model, take_rows(absent_rows(batch, 1), [4]))
    assert float(empty) == 0.0
    assert set(zero) == set(grads)
    assert all(not g.any() for g in zero.values())


def test_every_parameter_learns_and_the_table_is_one():
    model = text_model("bert")
    sizes = {n: p.shape for n, p in model.named_parameters() if "positions" not in n}
    large = [n for n, shape in sizes.items() if shape[0] == VOCABULARY]
    assert large == ["towers.text.stem.own.table.weight", "tasks.mlm.target.head.bias_V"]
    _, grads = gradients(model, padded_batch(model))
    assert set(grads) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.text.segments.pairing=single", r"sentence: text has no pairs; set views\.text"),
        ("towers.text.positions={kind: learned}", r"positions: a `summed` cut has its own"),
        ("towers.text.cut.vocabulary=65", r"cut\.vocabulary: 65 ids, the tokenizer has 64"),
    ],
)
def test_parts_that_do_not_fit_are_named(override, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load("general/bert", [override]), 64, SPECIAL)


def test_a_vocabulary_of_its_own_needs_no_tokenizer():
    with torch.device("meta"):
        model = build_model(config.load("general/bert", ["towers.text.cut.vocabulary=30522"]))
    assert model.tasks["mlm"].target.head.bias_V.shape == (30522,)
    assert model.towers["text"].stem.tables.table.weight.shape == (30522, 768)


def test_a_tied_head_needs_a_table():
    tree = config.load("general/bert").model_dump(by_alias=True)
    tree["towers"]["text"]["cut"] = {"kind": "embedding"}
    with pytest.raises(UserError, match=r"a tied head needs the token table.*cut\.kind to summed"):
        build_model(RunSpec.model_validate(tree), 64, SPECIAL)


def test_whole_words_need_a_tokenizer_that_tells():
    spec = config.load("general/bert", ["tasks.mlm.mask.rule=ngrams"])
    with pytest.raises(UserError, match=r"mask\.rule: `ngrams` needs a text view and a tokenizer"):
        build_model(spec, 64, SPECIAL)
