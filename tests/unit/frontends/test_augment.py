"""The chain on a tower's spectrograms: bank, silence behind short items, one standardisation."""

from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model
from tiny_run import absent_rows, take_rows

from mmssl.types import UserError

NAME = "audio/byol_a"


@pytest.fixture
def model():
    return small_model(small(NAME)).train()


def augmented(model, batch, position=0.0):
    return model._augmented(batch, position)


def signals(model, batch, position=0.0):
    views = augmented(model, batch, position).views
    return {name: views[name].signal for name in ("first", "second")}


def plain(model, batch, view="first"):
    found = batch.views[view]
    wave = torch.nn.functional.pad(found.data, (0, 6400 - found.data.shape[1]))
    return model.towers["audio"].signal(wave)


def test_all_values_of_both_views_are_standardised_together(model):
    batch = full_batch(model.spec, 6)
    batch.views["second"] = replace(batch.views["second"], data=3 * batch.views["second"].data)
    x = signals(model, batch)
    both = torch.cat([x["first"], x["second"]])
    assert float(both.mean()) == pytest.approx(0, abs=1e-5)
    assert float(both.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float(x["second"].mean() - x["first"].mean())) > 0.05  # not each by itself


def test_the_two_views_of_one_input_differ_and_a_repeat_does_not(model):
    batch = full_batch(model.spec, 4)
    batch.views["second"] = replace(batch.views["second"], data=batch.views["first"].data)
    x = signals(model, batch)
    again = signals(model, batch)
    assert torch.equal(x["first"], again["first"])
    assert float((x["first"] - x["second"]).abs().mean()) > 0.1


def test_absent_rows_change_nothing(model):
    batch = full_batch(model.spec, 4)
    want = signals(model, batch)
    got = signals(model, absent_rows(batch, 2), 0.1)
    torch.testing.assert_close(got, want)
    model.augments["audio"].write()
    assert int(model.augments["audio"].bank.filled) == 4


def test_the_bank_holds_inputs_of_earlier_steps_as_they_were(model):
    augment = model.augments["audio"]
    augment.canvas, augment.standardize = 0, False
    first, second = full_batch(model.spec, 4), full_batch(model.spec, 3, seed=1)
    want = plain(model, first)
    torch.testing.assert_close(signals(model, first)["first"], want)  # nothing to mix with yet
    augment.write()
    torch.testing.assert_close(augment.bank.rows_K[:4], want[:, 0])
    mixed, pure = signals(model, second, 0.1)["first"], plain(model, second)
    share = [
        ((mixed[i].exp() - pure[i].exp()) / (other.exp() - pure[i].exp())).double()
        for i in range(3)
        for other in augment.bank.rows_K[:4]
    ]
    steady = [s for s in share if float(s.std()) < 1e-3 * float(s.mean().abs())]
    assert len(steady) == 3  # one entry of the bank, at one share, explains each item
    assert all(0 < float(s.mean()) < 0.4 for s in steady)


def test_short_items_are_silent_behind_their_end_and_whole(model):
    augment = model.augments["audio"]
    augment.canvas, augment.standardize = 0, False
    batch = full_batch(model.spec, 3)
    view = batch.views["first"]
    short = torch.tensor([2000, 6400, 3000])
    loud = view.data + (torch.arange(6400) >= short[:, None])  # what padding holds must not matter
    batch.views["first"] = replace(view, data=loud, lengths_P=short)
    done = augmented(model, batch).views["first"]
    assert done.lengths_P.tolist() == [6400] * 3
    silent = torch.where(torch.arange(6400) < short[:, None], view.data, 0.0)
    torch.testing.assert_close(done.signal, model.towers["audio"].signal(silent))


def test_evaluation_reads_the_plain_spectrogram(model):
    batch = full_batch(model.spec, 3)
    tower = model.eval().towers["audio"]
    with torch.no_grad():
        want = tower.encode(batch.views["first"], 1.0).x_PND
        model(batch, 0, 10)
    torch.testing.assert_close(model.passes(batch).tokens("first").x_PND.detach(), want)
    assert model.augments["audio"].bank._offered == []


def test_a_batch_without_sound_offers_nothing(model):
    batch = full_batch(model.spec, 2)
    none = {
        n: replace(v, present_BL=v.present_BL & False, dummy=True) for n, v in batch.views.items()
    }
    loss, terms = model(take_rows(replace(batch, views=none), [0, 1]), 0, 10)
    assert float(loss.detach()) == 0
    assert float(terms["byol"].count) == 0
    model.after_step(0, 10)
    assert int(model.augments["audio"].bank.filled) == 0


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("towers.audio.frontend={kind: waveform}", r"towers\.audio\.augment: changes spectrograms"),
        ("towers.audio.frontend.kind=spectrum_stack", r"of one channel, but .* spectrum_stack"),
        ("views.second.crop_s=0.3", r"lengths of \[4800, 6400\] samples; give them one crop_s"),
        (
            "views.second.augment=[{kind: gain}, {kind: mel_noise}]",
            r"views\.second\.augment: mel_noise would be undone by towers\.audio\.augment",
        ),
        ("towers.audio.augment.canvas=0.5", "`canvas` is at least 1"),
        ("towers.audio.augment.time=[1.5, 0.6]", "low <= high"),
    ],
)
def test_what_does_not_fit_is_refused(override, match):
    from mmssl import config
    from mmssl.build import build_model

    words = ["views.first.crop_s=0.4", "views.second.crop_s=0.4", override]
    if "waveform" in override:
        kept = config.load(NAME).towers["audio"].frontend.model_fields_set - {"kind"}
        words = [*words[:2], *(f"towers.audio.frontend.{k}=null" for k in kept)]
        words.append("towers.audio.frontend.kind=waveform")
    with pytest.raises(UserError, match=match):
        build_model(config.load(NAME, words))
