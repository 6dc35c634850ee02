"""The separation task: what is mixed with what, what the outputs are, and what is refused."""

from dataclasses import replace

import pytest
import torch
from small_methods import small, small_model
from tiny_run import take_rows
from torchaudio.models import ConvTasNet

from mmssl import config
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.objectives.separation import si_sdr
from mmssl.types import UserError

PIT, MIXIT, DENOISING = "separation/pit", "separation/mixit", "separation/denoising"


def model_of(name=PIT, *overrides, seed=0):
    return small_model(small(name, *overrides), seed, torch.float64).train()


def batch_of(model, rows=5, seed=0, lengths=None):
    batch = fake_batch(model.spec, rows, seed, missing=False)
    views = {}
    for name, view in batch.views.items():
        data = view.data.double()
        lengths_P = view.lengths_P if lengths is None else torch.tensor(lengths)
        views[name] = replace(view, data=data, lengths_P=lengths_P)
    return replace(batch, views=views)


def power(sound_S, length):
    return float(sound_S[:length].square().mean())


# ---------------------------------------------------------------- mixtures


def test_a_mixture_is_the_clip_and_another_at_its_level():
    model = model_of()
    batch = batch_of(model, lengths=[6400, 3000, 5000, 6400, 2000])
    view, task = batch.views["x"], model.tasks["separate"]
    mixed = task.mixtures(batch, 2, (3.0, 3.0))
    assert mixed.valid_P.all()
    torch.testing.assert_close(mixed.heard.data, mixed.sound_PKS.sum(1))
    for row, (own, other) in enumerate(mixed.sound_PKS):
        length = int(view.lengths_P[row])
        torch.testing.assert_close(own[:length], view.data[row, :length])
        assert not own[length:].any()
        (partner,) = (
            i
            for i in range(5)
            if abs(float(torch.nn.functional.cosine_similarity(other, view.data[i], 0))) > 0.5
        )
        assert partner != row
        longer = int(view.lengths_P[partner])
        ratio = power(own, length) / power(other, longer)
        assert ratio == pytest.approx(10**0.3, rel=1e-6)
        assert int(mixed.heard.lengths_P[row]) == max(length, longer)


def test_mixtures_are_seeded_and_do_not_depend_on_the_batch_around_them():
    model = model_of(MIXIT)
    task, batch = model.tasks["separate"], batch_of(model, 6)
    first = task.mixtures(batch, 4, (-5.0, 5.0))
    shuffled = take_rows(batch, [3, 1, 5, 0, 4, 2])  # other rows, the items in their old order
    again = task.mixtures(shuffled, 4, (-5.0, 5.0))
    torch.testing.assert_close(again.sound_PKS, first.sound_PKS, rtol=0, atol=0)
    other = replace(batch.views["x"], seeds_P=batch.views["x"].seeds_P + 1)
    changed = task.mixtures(replace(batch, views={"x": other}), 4, (-5.0, 5.0))
    assert not torch.equal(changed.sound_PKS[:, 1:], first.sound_PKS[:, 1:])


def test_rows_of_one_source_are_not_mixed():
    model = model_of()
    batch = batch_of(model, 4)
    batch = replace(batch, source_B=torch.tensor([1, 1, 1, 1]))
    term = model.tasks["separate"](model.passes(batch, 0.0), batch)[""]
    assert (float(term.sum.detach()), int(term.count)) == (0.0, 0)


def test_a_silent_clip_is_no_reference():
    model = model_of()
    batch = batch_of(model, 2)
    view = batch.views["x"]
    silent = view.data * torch.tensor([[1.0], [0.0]])
    batch = replace(batch, views={"x": replace(view, data=silent)})
    loss, terms = model(batch, 0, 10)
    assert int(terms["separate"].count) == 1  # beside the silent one nothing is loud
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- outputs


def test_outputs_are_those_of_conv_tasnet():
    """torchaudio's network with the same weights, encoder and decoder included."""
    model = model_of(PIT)
    tower, head = model.towers["audio"], model.tasks["separate"].head
    peer = ConvTasNet(2, 16, 16, 3, 16, 16, 2, 2, "relu").double()
    ours = [tower.stem.convs[0], *_parts(tower.trunk), head.masks, tower.stem.decoder]
    masks = peer.mask_generator
    theirs = [peer.encoder, masks.input_norm, masks.input_conv]
    for block in masks.conv_layers:
        theirs += [*block.conv_layers, *filter(None, (block.res_out, block.skip_out))]
    theirs += [masks.output_prelu, masks.output_conv, peer.decoder]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                p.copy_(torch.randn_like(p) * 0.3)
                q.copy_(p.reshape(q.shape))
    view = batch_of(model, 2).views["x"]
    for samples in (800, 797):
        cut = replace(view, data=view.data[:, :samples], lengths_P=torch.tensor([samples] * 2))
        batch = replace(batch_of(model, 2), views={"x": cut})
        found = model.tasks["separate"].separate(model.passes(batch), cut)
        torch.testing.assert_close(found, peer(cut.data[:, None]), rtol=1e-9, atol=1e-10)


def _parts(trunk):
    yield from (trunk.norm, trunk.enter)
    for b in trunk.blocks:
        yield from (b.enter, b.activations[0], b.norms[0], b.along, b.activations[1], b.norms[1])
        yield from filter(None, (b.residual, b.skip))
    yield trunk.leave


def test_padding_changes_no_output():
    model = model_of(MIXIT)
    batch = batch_of(model, 2, lengths=[1500, 2100])
    view, task = batch.views["x"], model.tasks["separate"]
    both = task.separate(model.passes(batch), replace(view, data=_zeroed(view)))
    for row, n in enumerate((1500, 2100)):
        one = take_rows(batch, [row])
        cut = replace(one.views["x"], data=view.data[row : row + 1, :n])
        alone = task.separate(model.passes(replace(one, views={"x": cut})), cut)
        torch.testing.assert_close(both[row, :, :n], alone[0], rtol=1e-8, atol=1e-10)
        assert not both[row, :, n:].any()


def _zeroed(view):
    inside = torch.arange(view.data.shape[1]) < view.lengths_P[:, None]
    return view.data * inside


@pytest.mark.parametrize("consistency", ["equal", "learned"])
def test_outputs_add_up_to_the_mixture(consistency):
    model = model_of(MIXIT, f"tasks.separate.consistency={consistency}")
    task, batch = model.tasks["separate"], batch_of(model, 4)
    heard = task.mixtures(batch, 2, (-5.0, 5.0)).heard
    outputs = task.separate(model.passes(batch), heard)
    torch.testing.assert_close(outputs.sum(1), heard.data, rtol=0, atol=1e-5)
    assert float(outputs.detach().std(1).max()) > 0  # but they are not all alike
    plain = model_of(MIXIT, "tasks.separate.consistency=none")
    plain.load_state_dict(model.state_dict(), strict=False)
    apart = plain.tasks["separate"].separate(plain.passes(batch), heard)
    assert float((apart.sum(1) - heard.data).abs().max()) > 1e-3


def test_a_head_of_zeros_gives_silence_or_half_of_everything():
    for mask, share in (("relu", 0.0), ("sigmoid", 0.5)):
        model = model_of(PIT, f"tasks.separate.mask={mask}")
        torch.nn.init.zeros_(model.tasks["separate"].head.masks.weight)
        torch.nn.init.zeros_(model.tasks["separate"].head.masks.bias)
        batch = batch_of(model, 2)
        tokens = model.passes(batch).tokens("x")
        latents = model.tasks["separate"].head(tokens)
        torch.testing.assert_close(latents[:, 0], share * tokens.raw_PNE)


# ---------------------------------------------------------------- losses


def test_the_loss_is_that_of_the_best_order():
    model = model_of()
    task, batch = model.tasks["separate"], batch_of(model, 4)
    term = task(model.passes(batch), batch)[""]
    mixed = task.mixtures(batch, 2, (-5.0, 5.0))
    outputs = task.separate(model.passes(batch), mixed.heard)
    lengths = mixed.heard.lengths_P[:, None]
    straight, crossed = (
        si_sdr(o, mixed.sound_PKS, lengths).sum(1) for o in (outputs, outputs.flip(1))
    )
    expected = -torch.maximum(straight, crossed).sum()
    torch.testing.assert_close(term.sum, expected)
    assert int(term.count) == 8


def test_mixit_learns_nothing_of_single_sounds():
    """Sounds that change places inside a mixture of two change neither loss nor gradient."""
    model = model_of(MIXIT, "tasks.separate.sounds=4", "train.batch=4")
    task, batch = model.tasks["separate"], batch_of(model, 5)
    mixtures = task.mixtures
    found = []
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):

        def swapped(*args, order=order):
            mixed = mixtures(*args)
            return replace(mixed, sound_PKS=mixed.sound_PKS[:, order])

        task.mixtures = swapped
        model.zero_grad()
        loss, _ = model(batch, 0, 10)
        loss.backward()
        found.append((loss.detach(), model.towers["audio"].stem.decoder.weight.grad.clone()))
    torch.testing.assert_close(*found)


def test_a_denoiser_is_compared_with_the_clean_view():
    model = model_of(DENOISING)
    task, batch = model.tasks["separate"], batch_of(model, 3)
    clean = batch.views["clean"].data.requires_grad_()
    heard = batch.views["noisy"]
    term = task(model.passes(batch), batch)[""]
    (output_PS,) = task.separate(model.passes(batch), heard).unbind(1)
    torch.testing.assert_close(term.sum, -si_sdr(output_PS, clean, heard.lengths_P).sum())
    assert int(term.count) == 3


@pytest.mark.parametrize("name", [PIT, MIXIT, DENOISING])
def test_the_shared_transformer_takes_its_place(name):
    shared = "shared={width: 16, layers: 1, head_size: 8, hidden: 32}"
    model = model_of(name, shared, "towers.audio.backbone=shared")
    loss, _ = model(batch_of(model, 5), 0, 10)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert float(model.trunk.blocks[0].attention.out.weight.grad.abs().max()) > 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("towers.audio.cut.synthesis=false", r"tasks\.separate: towers\.audio cannot turn what"),
        ("views.x.crop_s=0", r"views\.x\.crop_s: give seconds"),
        ("tasks.separate.clean=y", r"tasks\.separate\.clean: no view 'y'"),
        ("train.batch=1", r"tasks\.separate\.sounds: 2 clips make a mixture, but train\.batch"),
        ("tasks.separate.view=y", r"tasks\.separate\.view: no view 'y'"),
    ],
)
def test_what_cannot_work_is_named(override, message):
    with pytest.raises(UserError, match=message):
        build_model(config.load(PIT, [override]))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (MIXIT, "tasks.separate.sounds=3", "`remix` needs an even number of `sounds`"),
        (PIT, "tasks.separate.sounds=7", "`permutation` compares all orders of at most 6"),
        (PIT, "towers.audio.backbone.kernel=4", r"`kernel` \(4\) must be odd"),
    ],
)
def test_records_that_do_not_fit_are_refused(name, override, message):
    with pytest.raises(UserError, match=message):
        config.load(name, [override])
