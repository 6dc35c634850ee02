"""ELECTRA's acceptance list on its method file (Clark et al. 2020)."""

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
from mmssl.types import UserError


def judged(model, batch):
    """What the target makes of a batch: replaced ids, their labels, and which tokens count."""
    seen = seen_of(model, batch)
    target = model.tasks["rtd"].target
    logits = target.generator.logits(seen)
    verdicts, labels, valid = target._judge(seen, logits)
    return seen, target.sampled(seen, logits), verdicts, labels, valid


def test_zero_heads_cost_ln_of_the_vocabulary_plus_50_ln_2():
    model = text_model("electra").eval()
    target = model.tasks["rtd"].target
    zeroed(target.generator.head.dense, target.head.layers[-1])
    total, terms = model(padded_batch(model), 0, 10)
    want = math.log(VOCABULARY) + 50 * math.log(2)
    assert float(total.detach()) == pytest.approx(want, abs=1e-4)
    assert math.log(30522) + 50 * math.log(2) == pytest.approx(44.9836, abs=1e-4)
    assert int(terms["rtd.replaced"].count) == 24 + 21 + 18 + 15  # every token but padding


def test_a_generator_that_samples_the_original_has_replaced_nothing(monkeypatch):
    model = text_model("electra").eval()
    batch = padded_batch(model)
    assert judged(model, batch)[3].any()
    target = model.tasks["rtd"].target

    def sure(seen):
        ids = seen.view.data[seen.hidden_PN]
        return 100.0 * torch.nn.functional.one_hot(ids, VOCABULARY)

    monkeypatch.setattr(target.generator, "logits", sure)
    seen, ids, _, labels, _ = judged(model, batch)
    assert seen.hidden_PN.any()
    assert torch.equal(ids, seen.view.data)
    assert not labels.any()


def test_a_label_says_different_not_hidden():
    model = text_model("electra", "tasks.rtd.mask.ratio=0.6").eval()
    model.tasks["rtd"].target.generator.head.bias_V.data[5:40] += 20.0  # of few ids, some are right
    batch = padded_batch(model, 40)
    batch.views["masked"].data[:, 1:5] = torch.randint(5, 40, (40, 4))
    seen, ids, _, labels, valid = judged(model, batch)
    assert torch.equal(labels, ids != seen.view.data)
    assert (labels & seen.hidden_PN).any()
    assert (seen.hidden_PN & ~labels).any()
    assert not (labels & ~seen.hidden_PN).any()
    assert not (labels & ~valid).any()


def test_the_verdicts_teach_the_generator_nothing():
    """Exactly zero on its layers and head; the shared tables learn from both."""
    model = text_model("electra", "tasks.rtd.weights.generator=0")
    _, grads = gradients(model, padded_batch(model))
    own = [n for n in grads if n.startswith(("towers.generator", "tasks.rtd.target.generator"))]
    assert len(own) > 20
    assert all(float(grads[n].abs().max()) == 0.0 for n in own)
    assert float(grads["towers.text.stem.own.table.weight"].abs().max()) > 0
    assert float(grads["towers.text.own_trunk.blocks.0.attention.qkv.weight"].abs().max()) > 0


def test_the_generator_learns_from_its_own_loss_and_leaves_the_discriminator_alone():
    model = text_model("electra", "tasks.rtd.weights.replaced=0")
    _, grads = gradients(model, padded_batch(model))
    assert float(grads["towers.generator.own_trunk.blocks.0.attention.qkv.weight"].abs().max()) > 0
    assert float(grads["towers.text.stem.own.table.weight"].abs().max()) > 0
    assert float(grads["towers.text.own_trunk.blocks.0.attention.qkv.weight"].abs().max()) == 0.0
    assert float(grads["towers.text.stem.proj.weight"].abs().max()) == 0.0


def test_tokens_and_places_belong_to_both():
    model = text_model("electra")
    names = [n for n, _ in model.named_parameters()]
    assert sum("table.weight" in n for n in names) == 1
    assert sum("positions" in n for n in names) == 1
    text, generator = model.towers["text"].stem, model.towers["generator"].stem
    assert text.tables is generator.tables
    assert (text.proj.out_features, generator.proj.out_features) == (16, 8)


def test_losses_of_transformers():
    """P14: a masked language model on the masked ids, a discriminator on the replaced ones."""
    hf = pytest.importorskip("transformers")
    model = text_model("electra").eval()
    target = model.tasks["rtd"].target
    with torch.no_grad():
        target.generator.head.bias_V.normal_()
    peers = {}
    for name, kind in (("generator", hf.ElectraForMaskedLM), ("text", hf.ElectraForPreTraining)):
        tower = model.towers[name]
        settings = hf.ElectraConfig(**peer_sizes(model, name), embedding_size=12)
        weights = embeddings_of(tower, "electra.embeddings")
        weights |= linear_of("electra.embeddings_project", tower.stem.proj)
        weights |= layers_of(tower, "electra.encoder.layer", BERT_LAYER)
        if name == "generator":
            head = target.generator.head
            weights |= linear_of("generator_predictions.dense", head.dense)
            weights |= linear_of("generator_predictions.LayerNorm", head.norm)
            weights["generator_lm_head.weight"] = tower.stem.tables.table.weight
            weights["generator_lm_head.bias"] = head.bias_V
        else:
            weights |= linear_of("discriminator_predictions.dense", target.head.layers[0])
            weights |= linear_of(
                "discriminator_predictions.dense_prediction", target.head.layers[2]
            )
        peers[name] = kind(settings)
        load_all(peers[name], weights)
    batch = padded_batch(model)
    seen, ids, _, labels, valid = judged(model, batch)
    assert labels.any()
    mask = valid.long()
    masked = peers["generator"](
        input_ids=seen.altered,
        attention_mask=mask,
        labels=seen.view.data.where(seen.hidden_PN, -100),
        output_hidden_states=True,
    )
    found = peers["text"](
        input_ids=ids, attention_mask=mask, labels=labels.long(), output_hidden_states=True
    )
    total, terms = model(batch, 0, 10)
    means = {n: float(t.sum / t.count) for n, t in terms.items()}
    assert means["rtd.generator"] == pytest.approx(float(masked.loss.detach()), abs=1e-5)
    assert means["rtd.replaced"] == pytest.approx(float(found.loss.detach()), abs=1e-5)
    want = masked.loss + 50 * found.loss
    assert float(total.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for name, read, out in (("generator", seen.altered, masked), ("text", ids, found)):
        ours, _ = model.towers[name].layers(replace(seen.view, data=read))
        for a, b in zip(ours, out.hidden_states, strict=True):
            torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=0)


def test_places_are_drawn_with_replacement_and_eighty_five_percent_become_the_mask():
    model = text_model("electra", "views.masked.length=128", "views.text.length=128")
    view = full_batch(model.spec, 1000).views["masked"]
    task, tower = model.tasks["rtd"], model.towers["generator"]
    hidden = task._hidden(tower, view, 0.0)
    candidates = int(task.target.candidates(view)[0].sum())
    draws = round(0.15 * candidates)
    distinct = candidates * (1 - (1 - 1 / candidates) ** draws)
    assert float(hidden.sum(1).float().mean()) == pytest.approx(distinct, abs=0.15)
    assert int(hidden.sum(1).max()) <= draws
    read, ids = task.target.altered(tower, view, hidden)[hidden], view.data[hidden]
    assert float((read == SPECIAL["mask"]).float().mean()) == pytest.approx(0.85, abs=0.01)
    assert ((read == SPECIAL["mask"]) | (read == ids)).all()


def test_a_rows_samples_do_not_depend_on_its_batch():
    model = text_model("electra").eval()
    batch = padded_batch(model)
    _, ids, verdicts, _, _ = judged(model, batch)
    _, some, few, _, _ = judged(model, take_rows(batch, [1, 3]))
    assert torch.equal(some, ids[[1, 3]])
    torch.testing.assert_close(few, verdicts[[1, 3]], atol=1e-5, rtol=0)


def test_a_padded_token_changes_nothing():
    model = text_model("electra").eval()
    batch = padded_batch(model)
    total, _ = model(batch, 0, 10)
    for name, view in batch.views.items():
        inside = torch.arange(24) < view.lengths_P[:, None]
        batch.views[name] = replace(view, data=torch.where(inside, view.data, 77))
    assert torch.equal(model(batch, 0, 10)[0], total)


def test_rows_without_text_change_neither_loss_nor_gradient():
    model = text_model("electra")
    batch = padded_batch(model)
    loss, grads = gradients(model, batch)
    more, others = gradients(model, absent_rows(batch, 3))
    assert torch.equal(loss, more)
    assert all(torch.equal(grads[n], others[n]) for n in grads)
    empty, zero = gradients(model, take_rows(absent_rows(batch, 1), [4]))
    assert float(empty) == 0.0
    assert set(zero) == set(grads) == {n for n, _ in model.named_parameters()}


def test_evaluation_counts_right_verdicts():
    model = text_model("electra").eval()
    batch = padded_batch(model)
    _, _, verdicts, labels, valid = judged(model, batch)
    stats = model.masked_stats(batch)["rtd"]
    right = ((verdicts > 0) == labels)[valid].sum()
    assert float(stats["correct"]) == float(right)
    assert stats["histogram"].tolist() == [int((~labels & valid).sum()), int(labels.sum())]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.rtd.target.view=masked", r"target\.view: masked must be read by another"),
        ("towers.generator.cut.of=nobody", r"cut\.of: 'nobody' is no tower with a `summed` cut"),
    ],
)
def test_parts_that_do_not_fit_are_named(override, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load("general/electra", [override]), 64, SPECIAL)
