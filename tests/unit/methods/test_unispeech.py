"""UniSpeech: size, what is contrasted with what, what CTC reaches, clips without transcript."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.objectives.frames import draw_negatives, marked, take
from mmssl.types import UserError

TINY = (
    "towers.audio.cut.channels=16",
    "towers.audio.backbone.width=32",
    "towers.audio.backbone.head_size=16",
    "towers.audio.backbone.hidden=64",
    "towers.audio.backbone.layers=2",
    "towers.audio.backbone.dropout=0",
    "towers.audio.positions.groups=4",
    "tasks.mam.target.transcripts.dropout=0",
)


def model_of(*overrides):
    torch.manual_seed(0)
    spec = config.load("runs/unispeech_tiny", [*TINY, *overrides])
    return build_model(spec, 0, None).train(), fake_batch(spec, 4, missing=False)


def terms_of(model, batch):
    return model.tasks["mam"](model.passes(batch, 0.0), batch)


def test_the_size_is_that_of_the_released_class():
    transformers = pytest.importorskip("transformers")
    spec = config.load("speech/unispeech")
    symbols = len(spec.tasks["mam"].target.transcripts.symbols)
    options = transformers.UniSpeechConfig(
        do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, hidden_size=1024,
        num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, codevector_dim=768,
        proj_codevector_dim=768, num_ctc_classes=symbols + 1,
    )  # fmt: skip
    with torch.device("meta"):
        ours = build_model(spec, 0, None)
        peer = transformers.UniSpeechForPreTraining(options)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())


def test_an_empty_head_counts_the_alignments():
    model, batch = model_of()
    with torch.no_grad():
        for parameter in model.tasks["mam"].target.readers["transcripts"].out.parameters():
            parameter.zero_()
    ctc = terms_of(model, batch)["ctc"]
    frames = model.tasks["mam"]._seen(model.passes(batch), batch).tokens.grid[0]
    # row i of the made-up batch says the first i of 15 letters, row 0 nothing
    expected = sum(
        frames * math.log(16) - math.log(math.comb(frames + u, 2 * u)) for u in (1, 2, 3)
    )
    assert float(ctc.sum.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_contrast_is_by_cosine_in_the_width_of_the_tower_with_codes_of_all_frames():
    model, batch = model_of()
    task = model.tasks["mam"]
    target = task.target
    seen = task._seen(model.passes(batch, 0.0), batch)
    latents, where = seen.features_PNE, marked(seen.hidden_PN)
    every = target._everything(latents, seen)
    codes = target._quantise(take(latents, where), where.filled_PM, seen, "gumbel")
    first, last = target.of_code
    own = last(first(codes.vectors_PNQ))
    negatives = draw_negatives(
        seen.view.seeds_P, where, 20, marked(every.valid_PN), "mam/negatives"
    )
    total = 0.0
    for row in range(4):
        for place in range(int(where.filled_PM[row].sum())):
            context = seen.tokens.x_PND[row, where.index_PM[row, place]]
            drawn = negatives.index_PMK[row, place]
            logit = F.cosine_similarity(context, own[row, place], dim=0) / 0.1
            others = F.cosine_similarity(context, every.mapped_PNF[row, drawn], dim=1) / 0.1
            same = (every.ids_PNG[row, drawn] == codes.ids_PNG[row, place]).all(-1)
            logits = torch.cat([logit[None], others[~same]])
            total += float((logits.logsumexp(0) - logit).detach())
    assert float(target(seen)["nce"].sum.detach()) == pytest.approx(total, rel=1e-4)
    # some negatives were not hidden
    assert not seen.hidden_PN.gather(1, negatives.index_PMK.flatten(1)).all()


@pytest.mark.parametrize("replace", [0.0, 1.0])
def test_what_ctc_reaches(replace):
    model, batch = model_of(f"tasks.mam.target.transcripts.replace={replace}")
    terms_of(model, batch)["ctc"].sum.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    codes = {n for n in moved if ".quantizer." in n or ".of_code." in n}
    trunk = {n for n in moved if ".own_trunk." in n}
    assert any(".stem.convs." in n for n in moved)
    assert any(".readers.transcripts.out." in n for n in moved)
    assert bool(codes) == (replace == 1.0)
    assert bool(trunk) == (replace == 0.0)


def test_half_of_the_frames_are_replaced_in_training_and_none_in_evaluation():
    model, batch = model_of()
    task = model.tasks["mam"]
    seen = task._seen(model.passes(batch, 0.0), batch)
    reader = task.target.readers["transcripts"]
    other = torch.full_like(seen.tokens.x_PND, 7.0)
    mixed = (reader._mixed(seen, other) == 7.0).all(-1)
    assert float(mixed.float().mean()) == pytest.approx(0.5, abs=0.07)
    assert torch.equal(reader.eval()._mixed(seen, other), seen.tokens.x_PND)


def test_a_clip_without_transcript_counts_for_the_contrast_only():
    model, batch = model_of()
    task = model.tasks["mam"]
    hidden = task._seen(model.passes(batch, 0.0), batch).hidden_PN.sum(1)
    terms = terms_of(model, batch)
    assert (int(terms["transcribed"].sum), int(terms["transcribed"].count)) == (3, 4)
    assert int(terms["ctc"].count) == int(hidden[1:].sum())
    assert int(terms["nce"].count) == int(hidden.sum())
    for meta in batch.meta:
        meta.clear()
    none = terms_of(model, batch)
    assert torch.equal(none["nce"].sum, terms["nce"].sum)
    assert (float(none["ctc"].sum), int(none["ctc"].count)) == (0.0, 0)
    loss, _ = model(batch, 0, 10)
    loss.backward()
    grads = [p.grad for p in model.tasks["mam"].target.readers.parameters()]
    assert all(not g.any() for g in grads)


def test_transcripts_that_cannot_be_read_are_named():
    model, batch = model_of()
    for value, shown in (("o n é", "'é'"), (7, "'7'")):
        batch.meta[1]["letters"] = value
        with pytest.raises(UserError, match=rf"row-1: 'letters' has {shown}.*mam\.target\.trans"):
            terms_of(model, batch)
    with pytest.raises(UserError, match=r"'letters' is not read; add it to data\.labels"):
        model_of("data.labels=[]")
    with pytest.raises(UserError, match="set compare_in: width"):
        model_of("tasks.mam.target.compare_in=space")
