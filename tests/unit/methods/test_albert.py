"""ALBERT's acceptance list on its method file (Lan et al. 2020)."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch
from text_family import (
    ALBERT_LAYER,
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

from mmssl import config
from mmssl.build import build_model
from mmssl.check import BEGINS, SPECIAL, VOCABULARY


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_zero_heads_cost_ln_of_the_vocabulary_plus_ln_2():
    model = text_model("albert").eval()
    target = model.tasks["mlm"].target
    zeroed(target.head.dense, target.sentence.out)
    total, _ = model(padded_batch(model), 0, 10)
    assert float(total.detach()) == pytest.approx(math.log(VOCABULARY) + math.log(2), abs=1e-5)
    assert math.log(30000) + math.log(2) == pytest.approx(11.0021, abs=1e-4)


def test_depth_costs_no_parameters_but_changes_the_output():
    base = "towers.text.backbone"
    models = {
        n: text_model("albert", f"{base}.layers={n}", f"{base}.fresh=xavier").eval() for n in (4, 8)
    }
    assert count(models[4]) == count(models[8])
    models[8].load_state_dict(models[4].state_dict())
    batch = padded_batch(models[4])
    four, eight = (models[n].passes(batch).tokens("text").x_PND for n in (4, 8))
    assert (four - eight).abs().max() > 0.1


def test_the_published_size():
    with torch.device("meta"):
        model = build_model(config.load("general/albert"), 30000, SPECIAL, BEGINS)
    tables = (30000 + 512 + 2) * 128 + 2 * 128 + 128 * 768 + 768
    layer = 4 * (768 * 768 + 768) + 768 * 3072 + 3072 + 3072 * 768 + 768 + 4 * 768
    heads = 768 * 128 + 128 + 2 * 128 + 30000 + 768 * 768 + 768 + 2 * 768 + 2
    assert count(model) == tables + layer + heads == 11_813_810


def test_losses_and_hidden_states_of_transformers():
    """P13, with padding and both segments."""
    hf = pytest.importorskip("transformers")
    model = text_model("albert").eval()
    tower, target = model.towers["text"], model.tasks["mlm"].target
    sizes = peer_sizes(model)
    peer = hf.AlbertForPreTraining(hf.AlbertConfig(**sizes, embedding_size=8))
    table, bias = tower.stem.tables.table.weight, target.head.bias_V
    with torch.no_grad():
        bias.normal_()
    weights = embeddings_of(tower, "albert.embeddings")
    weights |= linear_of("albert.encoder.embedding_hidden_mapping_in", tower.stem.proj)
    root = "albert.encoder.albert_layer_groups.0.albert_layers"
    weights |= layers_of(tower, root, ALBERT_LAYER)
    weights |= linear_of("albert.pooler", target.sentence.pooler)
    weights |= linear_of("sop_classifier.classifier", target.sentence.out)
    weights |= linear_of("predictions.dense", target.head.dense)
    weights |= linear_of("predictions.LayerNorm", target.head.norm)
    weights |= {"predictions.bias": bias, "predictions.decoder.bias": bias}
    load_all(peer, weights | {"predictions.decoder.weight": table})
    batch = padded_batch(model)
    seen, view = seen_of(model, batch), batch.views["text"]
    place = torch.arange(24)
    valid = place < view.lengths_P[:, None]
    out = peer(
        input_ids=seen.altered,
        attention_mask=valid.long(),
        token_type_ids=((place >= 6) & valid).long(),
        labels=view.data.where(seen.hidden_PN, -100),
        sentence_order_label=view.order_P,
        output_hidden_states=True,
    )
    total, _ = model(batch, 0, 10)
    assert float(total.detach()) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    ours, _ = tower.layers(replace(view, data=seen.altered))
    for a, b in zip(ours, out.hidden_states, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=0)


def test_hidden_runs_are_one_to_three_whole_words():
    model = text_model("albert", "views.text.length=128")
    view = full_batch(model.spec, 300).views["text"]
    task, tower = model.tasks["mlm"], model.towers["text"]
    hidden, candidates = task._hidden(tower, view, 0.0), task.target.candidates(view)
    assert float(hidden.sum() / candidates.sum()) == pytest.approx(0.15, abs=0.005)
    assert not (hidden & ~candidates).any()
    # a candidate begins a word by its id, or behind a marker
    begins = torch.tensor(BEGINS)[view.data] | ~candidates.roll(1, 1)
    inner = candidates[:, 1:] & ~begins[:, 1:]
    assert torch.equal(hidden[:, 1:][inner], hidden[:, :-1][inner])


def test_single_tokens_are_hidden_without_their_words_by_the_plain_rule():
    """What the law above would refuse."""
    model = text_model("albert", "views.text.length=128", "tasks.mlm.mask.rule=words")
    view = full_batch(model.spec, 300).views["text"]
    hidden = model.tasks["mlm"]._hidden(model.towers["text"], view, 0.0)
    inner = ~torch.tensor(BEGINS)[view.data][:, 1:]
    assert not torch.equal(hidden[:, 1:][inner], hidden[:, :-1][inner])
