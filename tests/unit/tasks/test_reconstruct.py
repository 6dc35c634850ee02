"""`reconstruct` and the gap of `classify`: what is read and said, who takes part, which terms."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from torch.nn import functional as F

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.types import UserError

CBOW, SKIP, GAP = "audio2vec_cbow_tiny", "audio2vec_skipgram_tiny", "audio2vec_gap_tiny"
NARROW = "towers.audio.cut.channels=[8, 8, 8, 8, 8, 8]"


def changed(batch, **changes):
    return replace(batch, views={"x": replace(batch.views["x"], **changes)})


def frames_of(model, batch):
    """(P, 1, T, F) that the tower reads, as a leaf."""
    return model.towers["audio"].inputs(batch.views["x"]).detach().requires_grad_()


def heard(model, batch, name="slices"):
    return model.tasks[name].encode(model.passes(batch, 0.0), batch)


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize("name", [CBOW, SKIP])
def test_vectors_read_their_own_slices_and_the_truth_is_the_others(name):
    """Slices of 6 frames with 4 between them: 0-5, 10-15, 20-25; nothing reads what is between."""
    model = small_model(small(name)).eval()
    batch = full_batch(model.spec, 2)
    signal = frames_of(model, batch)
    found = heard(model, changed(batch, signal=signal))
    around = name == CBOW
    assert found.x_PND.shape == (2, 1, 32 if around else 16)
    (grad,) = torch.autograd.grad(found.x_PND[1].sum(), signal)
    seen = grad.abs().sum((1, 3)).nonzero()
    assert set(seen[:, 0].tolist()) == {1}
    sides, middle = {*range(6), *range(20, 26)}, set(range(10, 16))
    assert set(seen[:, 1].tolist()) == (sides if around else middle)
    said = signal[:, 0, 10:16][:, None]
    if not around:
        said = torch.stack([signal[:, 0, :6], signal[:, 0, 20:26]], 1)
    assert torch.equal(found.truth.signal, said)
    assert not found.truth.signal.requires_grad
    term = model.tasks["slices"](model.passes(batch, 0.0), batch)[""]
    assert int(term.count) == (2 if around else 4)


def test_past_and_future_are_no_set():
    model = small_model(small(CBOW)).eval()
    batch = full_batch(model.spec, 3)
    x = frames_of(model, batch).detach()
    swapped = x.clone()
    swapped[:, :, :6], swapped[:, :, 20:26] = x[:, :, 20:26], x[:, :, :6]
    one, two = (values(model, changed(batch, signal=s))["slices"] for s in (x, swapped))
    assert abs(one - two) > 1e-4


@pytest.mark.parametrize("name", [CBOW, GAP])
def test_items_too_short_take_no_part_not_even_in_batch_norms(name):
    spec = small(name)
    hop, task = 40, next(iter(spec.tasks))
    need = 26 if name == CBOW else 7
    samples = {n: hop * (n - 1) for n in (need, need - 1)}
    model, batch = small_model(spec).train(), full_batch(spec, 3)
    short = changed(batch, lengths_P=torch.tensor([2000, samples[need], samples[need - 1]]))
    _, terms = model(short, 0, 10)
    assert int(terms[task].count) == 2
    twin = small_model(spec).train()
    loud = changed(short, data=torch.cat([batch.views["x"].data[:2], 0.9 * torch.ones(1, 2400)])
                   if name == CBOW else short.views["x"].data)  # fmt: skip
    _, again = twin(loud, 0, 10)
    assert float(again[task].sum) == pytest.approx(float(terms[task].sum), rel=1e-6)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    none = changed(batch, lengths_P=torch.tensor([40, 40, 40]))
    loss, terms = model(none, 0, 10)
    assert loss.item() == 0
    assert int(terms[task].count) == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_audio2vec_runs_on_the_shared_transformer_by_one_line():
    shared = "shared={width: 16, layers: 1, head_size: 8, hidden: 32}"
    cut = "towers.audio={cut: {kind: patches, patch: [4, 20]}, positions: {grid: [4, 2]}}"
    small_decoder = "tasks.slices.decoder.channels=[8, 8]"
    spec = config.load(CBOW, ["towers.audio.backbone=shared", cut, shared, small_decoder])
    model = small_model(spec).train()
    loss, terms = model(full_batch(spec), 0, 10)
    loss.backward()
    assert int(terms["slices"].count) == 6
    assert float(model.trunk.blocks[0].attention.qkv.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------- the gap


def gap_logits(model, value):
    """The head says one number for all."""
    last = model.tasks["gap"].head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, value)


def test_floors_of_the_gap():
    """ln 2 untrained, 0.6365 at the best constant: targets are soft."""
    spec = small(GAP)
    model = small_model(spec).eval()
    one = full_batch(spec, 1).views["x"]
    many = torch.arange(20000)
    items = {k: v.expand(len(many), *v.shape[1:]) for k, v in one.columns().items()}
    items |= {"rows_P": many, "slots_P": 0 * many, "seeds_P": many + 7}
    signal = torch.zeros(1, 1, 1, 40).expand(len(many), 1, 161, 40)
    items |= {"signal": signal, "present_BL": torch.ones(len(many), 1, dtype=torch.bool)}
    batch = full_batch(spec, 1)
    batch = replace(
        batch,
        views={"x": replace(one, **items)},
        keys=[""] * len(many),
        source_B=many,
        text_B=many,
        index_B=many,
    )
    model.tasks["gap"]._pooled = lambda passes, view: torch.zeros(2 * len(many), 16)
    for constant, floor in ((0.5, math.log(2)), (1 / 3, 0.63651)):
        gap_logits(model, math.log(constant / (1 - constant)))
        _, terms = model(batch, 0, 10)
        assert int(terms["gap"].count) == len(many)
        assert float(terms["gap"].sum) / len(many) == pytest.approx(floor, abs=0.003)
    # the mean of |1/3 - d| for the triangular density 2 (1 - d)
    assert float(terms["gap.error"].sum) / len(many) == pytest.approx(16 / 81, abs=0.003)


class Told(torch.nn.Module):
    """A head that knows the logit of d from the first and last numbers of both vectors."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def forward(self, pairs):
        first, second = pairs.chunk(2, -1)
        d = (first[..., :1] - second[..., :1]).abs() / self.room
        return torch.logit(d.clamp(1e-6, 1 - 1e-6))


def test_a_perfect_guess_costs_half_a_nat_and_knows_where_a_clip_ends():
    """Frames hold their own number; the slice's mean tells its place, the length the largest d."""
    spec = small(GAP, "towers.audio.backbone.shift=6")
    model, rows = small_model(spec).eval(), 4000
    batch = fake_batch(spec, rows, missing=False)
    frames = torch.arange(161.0).view(1, 1, -1, 1).expand(rows, 1, 161, 40)
    lengths = torch.full((rows,), 3200)  # 81 frames of 161
    batch = changed(batch, signal=frames, lengths_P=lengths)
    task = model.tasks["gap"]
    task._pooled = lambda passes, view: view.signal.mean((1, 2))[:, :16]
    task.head = Told(81 - 6)
    _, terms = model(batch, 0, 10)
    assert float(terms["gap"].sum) / rows == pytest.approx(0.5, abs=0.01)
    assert float(terms["gap.error"].sum) / rows < 1e-5


def test_the_order_of_two_slices_does_not_matter():
    model = small_model(small(GAP)).eval()
    batch, task, said = full_batch(model.spec, 3), model.tasks["gap"], []
    task.head.register_forward_hook(lambda _, __, out: said.append(out))
    model(batch, 0, 10)
    both = task._pooled
    task._pooled = lambda *args: both(*args).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    model(batch, 0, 10)
    one, two = said
    assert (one[0] - one[1]).abs().max().item() > 1e-4
    torch.testing.assert_close(one.mean(0), two.mean(0))


# ---------------------------------------------------------------- words


def test_zeros_are_heard_in_training_alone_and_never_said():
    plain = small_model(small("audio/audio_word2vec")).train()
    noisy = small_model(small("audio/audio_word2vec", "tasks.words.zeros=0.3")).train()
    batch = full_batch(plain.spec, 4)
    read = []
    for model in (plain, noisy):
        model.towers["audio"].stem.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    one, two = heard(plain, batch, "words"), heard(noisy, batch, "words")
    assert torch.equal(one.truth.signal, two.truth.signal)
    assert torch.equal(read[0], one.truth.signal)
    zero = read[1] == 0
    assert float(zero.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(read[1][~zero], read[0][~zero])
    assert values(noisy, batch)["words"] != values(plain, batch)["words"]
    assert values(noisy.eval(), batch) == values(plain.eval(), batch)


# ---------------------------------------------------------------- codes


def test_the_loss_of_a_vq_vae_is_that_of_the_paper():
    """Equation 3 derived anew, term by term and slope by slope."""
    spec = small("audio/vq_vae", NARROW, "tasks.codes.weights.commitment=0.7")
    model = small_model(spec).double().train()
    task, batch = model.tasks["codes"], full_batch(spec, 3)
    batch = changed(batch, data=batch.views["x"].data.double())
    with torch.no_grad():
        task.quantizer.codebook.normal_().mul_(0.3)
    found = task.encode(model.passes(batch, 0.0), batch)
    z = found.x_PND
    book = task.quantizer.codebook[0]
    ids = torch.cdist(z.detach(), book.detach()[None]).argmin(-1)
    e = book[ids]
    through = z + (e - z).detach()
    level = found.truth.signal[:, 0]
    level = (
        (level.sign() * (1 + 255 * level.abs()).log() / math.log(256) + 1) / 2 * 255 + 0.5
    ).long()
    logits = task.decoder.logits(
        level, through, batch.classes("speaker", spec.tasks["codes"].decoder.speaker.classes)
    )
    fit = (e - z.detach()).square().mean() + 0.25 * (e.detach() - z).square().mean()
    expected = F.cross_entropy(logits.flatten(0, 1), level.flatten()) + 0.7 * fit
    mine, yours = ([*model.towers.parameters(), *task.parameters()] for _ in range(2))
    slopes = torch.autograd.grad(expected, yours)
    loss, terms = model(batch, 0, 10)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float(terms["codes.commitment"].sum / terms["codes.commitment"].count) == pytest.approx(
        float(fit), rel=1e-9
    )
    for a, b in zip(torch.autograd.grad(loss, mine), slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_decoder_reaches_latents_unchanged_and_never_the_codebook():
    spec = small("audio/vq_vae", NARROW, "tasks.codes.weights.commitment=0")
    model = small_model(spec).train()
    task, batch = model.tasks["codes"], full_batch(spec, 2)
    kept = {}
    task.quantizer.register_forward_pre_hook(lambda _, x: kept.update(z=x[0]))
    task.decoder.register_forward_pre_hook(lambda _, x: kept.update(q=x[0]))
    loss, _ = model(batch, 0, 10)
    kept["z"].retain_grad()
    kept["q"].retain_grad()
    loss.backward()
    assert torch.equal(kept["z"].grad, kept["q"].grad)
    assert float(kept["z"].grad.abs().max()) > 0
    assert not task.quantizer.codebook.grad.any()


def test_an_averaged_codebook_follows_the_steps_and_not_the_gradient():
    spec = small("vq_vae_tiny", "tasks.codes.quantizer.restart=0")
    model = small_model(spec).train()
    quantizer = model.tasks["codes"].quantizer
    before = quantizer.codebook.clone()
    loss, terms = model(full_batch(spec), 0, 10)
    loss.backward()
    assert torch.equal(quantizer.codebook, before)
    assert not [n for n, _ in model.named_parameters() if "codebook" in n]
    model.after_step(0, 10)
    assert not torch.equal(quantizer.codebook, before)
    total = int(terms["codes.commitment"].count)
    mean = 0.99 * 8 + 0.01 * total  # of 8 entries, each chosen once before
    assert float(quantizer.chosen_CV.sum()) == pytest.approx(mean, rel=1e-5)
    held = quantizer.codebook.clone()
    model.eval()(full_batch(spec), 1, 10)
    model.after_step(1, 10)
    assert torch.equal(quantizer.codebook, held)


def test_padding_of_a_waveform_is_quantised_to_nothing_and_not_said():
    spec = small("vq_vae_tiny")
    model, batch = small_model(spec).eval(), full_batch(spec, 2)
    batch = changed(batch, lengths_P=torch.tensor([2048, 1000]))
    loud = batch.views["x"].data.clone()
    loud[1, 1000:] = 0.5
    _, one = model(batch, 0, 10)
    _, two = model(changed(batch, data=loud), 0, 10)
    assert int(one["codes"].count) == 3048
    assert int(one["codes.commitment"].count) == 32 + 1000 // 64
    for name, term in one.items():
        torch.testing.assert_close(two[name].sum, term.sum)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (CBOW, "tasks.slices.view=y", r"tasks\.slices\.view: no view 'y'"),
        (CBOW, "tasks.slices.slices={past: 0, future: 0}", "has no neighbours; give `past`"),
        (CBOW, "tasks.slices.pool=''", r"slices\.decoder: `conv` needs slices and a pool"),
        (CBOW, "tasks.slices.pool=agg", r"tasks\.slices\.pool"),
        (CBOW, "views.x.crop_s=0.2", r"slices\.slices: spans 56 frames .* the view has 41 x 40"),
        (CBOW, "tasks.slices.slices.frames=12", r"slices\.slices: audio2vec reads .* 16 frames"),
        (CBOW, "tasks.slices.decoder.channels=[4, 4, 4, 4, 4]", "cannot be halved 5 times"),
        (CBOW, "tasks.slices.decoder={kind: sequence, channels: null}", "`sequence` needs a pool"),
        (GAP, "tasks.gap.target.frames=300", r"gap\.target\.frames: spans 301 frames"),
        ("audio_word2vec_tiny", "tasks.words.pool=''", "`sequence` needs a pool"),
        ("vq_vae_tiny", "tasks.codes.pool=mean", "`wavenet` needs tokens of a waveform"),
        ("audio/vq_vae", "data.labels=[]", r"speaker\.field: 'speaker' is not read; add it"),
        (
            "vq_wav2vec_kmeans_tiny",
            "towers.audio.quantizer.ema=0.9",
            "only tasks of kind `reconstruct` move averages",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name, override, message):
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(config.load(name, [override]), 0, None)


def test_ids_are_no_signal_and_a_network_of_maps_has_no_tokens_in_time():
    text = {"modality": "text", "frontend": {"kind": "ids"}, "cut": {"kind": "embedding"},
            "backbone": {"kind": "identity", "width": 8}}  # fmt: skip
    task = {"kind": "reconstruct", "view": "x", "pool": "mean", "decoder": {"kind": "sequence"}}
    tree = {"name": "t", "towers": {"text": text}, "views": {"x": {"modality": "text"}}}
    spec = config.RunSpec.model_validate(tree | {"tasks": {"words": task}})
    with pytest.raises(UserError, match=r"tasks\.words\.view: ids are no signal"):
        build_model(spec, 100, None)
    wave = {"modality": "audio", "frontend": {"kind": "waveform"}, "cut": {"kind": "whole"},
            "backbone": {"kind": "wave_resnet18", "channels": 8}}  # fmt: skip
    tree["towers"], tree["views"] = {"audio": wave}, {"x": {"modality": "audio", "crop_s": 0.4}}
    task = {"kind": "reconstruct", "view": "x", "decoder": {"kind": "wavenet"}}
    spec = config.RunSpec.model_validate(tree | {"tasks": {"codes": task}})
    with pytest.raises(UserError, match=r"codes\.decoder: `wavenet` reads tokens in time"):
        build_model(spec, 0, None)
