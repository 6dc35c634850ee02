"""Cutting views out of decoded clips."""

import pytest
import torch

from mmssl import rng
from mmssl.specs import AugmentSpec, ViewSpec
from mmssl.types import Clip, UserError
from mmssl.views import clip as cutting
from mmssl.views.plan import Cut

HZ = 100
CLIP = Clip(
    "k",
    "s",
    0,
    2.0,
    waveform=torch.stack([torch.arange(200.0), torch.arange(200.0) + 2]),
    audio_hz=HZ,
    audio_start_s=0.5,
    frames=(
        torch.arange(8, dtype=torch.uint8)[:, None, None, None] * torch.ones(8, 4, 6, 3)
    ).byte(),
    frame_times_s=torch.arange(8, dtype=torch.float64) / 4,
    captions=["one", "two", "three"],
)


class Letters:
    def encode(self, text, length):
        return [*list(map(ord, text))[: length - 1], 3]


def cut(modality, start=0.0, end=1.0, seed=11, **fields):
    spec = ViewSpec(modality=modality, **{"hz": HZ, "fps": 4, **fields})
    return Cut("view", spec, start, end, seed)


def test_audio_is_the_channel_mean_at_its_time():
    view = cutting.cut_audio(CLIP, cut("audio", 0.7, 1.2), training=False)
    assert view.data.tolist() == [21.0 + k for k in range(50)]
    assert (view.rate, view.start_s, view.seed) == (100.0, 0.7, 11)


def test_audio_outside_the_clip_is_silence():
    view = cutting.cut_audio(CLIP, cut("audio", 0.3, 3.0), training=False)
    assert view.data[:20].eq(0).all()
    assert view.data[20:220].tolist() == [1.0 + k for k in range(200)]
    assert view.data[220:].eq(0).all()
    assert len(view.data) == 270


def test_audio_normalised_per_crop():
    view = cutting.cut_audio(CLIP, cut("audio", 0.7, 1.2, normalize=True), training=False)
    assert view.data.mean().abs() < 1e-6
    assert view.data.square().mean() == pytest.approx(1.0, abs=1e-5)


def test_video_takes_the_nearest_frames():
    view = cutting.cut_video(CLIP, cut("video", 0.3, 1.9, fps=2.5), training=False)
    assert view.data[:, 0, 0, 0].tolist() == [1, 3, 4, 6]
    assert view.rate == 2.5


def test_nearest_takes_the_earlier_on_a_tie_and_stays_inside():
    times = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    wanted = torch.tensor([-5.0, 0.5, 0.51, 1.5, 9.0], dtype=torch.float64)
    assert cutting.nearest(times, wanted).tolist() == [0, 0, 1, 1, 2]
    assert cutting.nearest(times[:1], wanted).tolist() == [0] * 5


def test_decoding_exactly_the_wanted_frames_changes_nothing():
    """The nearest among the chosen frames is the nearest among all."""
    wanted = cut("video", 0.3, 1.9, fps=2.5)
    chosen = cutting.nearest(
        CLIP.frame_times_s, torch.tensor(wanted.frame_times_s, dtype=torch.float64)
    ).unique()
    part = Clip(
        "k", "s", 0, 2.0, frames=CLIP.frames[chosen], frame_times_s=CLIP.frame_times_s[chosen]
    )
    whole = cutting.cut_video(CLIP, wanted, training=False)
    assert torch.equal(cutting.cut_video(part, wanted, training=False).data, whole.data)


def test_missing_streams_give_no_view():
    empty = Clip("k", "s", 0, 0.0)
    assert cutting.cut_audio(empty, cut("audio"), training=True) is None
    assert cutting.cut_video(empty, cut("video"), training=True) is None
    assert cutting.cut_text([], cut("text"), Letters()) == []


def test_text_candidates_have_seeds_of_their_own():
    views = cutting.cut_text(CLIP.captions, cut("text", candidates=2, length=3), Letters())
    assert [v.data.tolist() for v in views] == [[111, 110, 3], [116, 119, 3]]
    assert views[0].seed == 11
    assert views[1].seed == rng.seed_of(11, 1)
    assert views[0].data.dtype == torch.int64


def test_augmentation_depends_on_the_seed_and_on_training():
    spec = {
        "augment": [
            AugmentSpec(kind="noise", options={"scale": [0.1, 0.1]}),
            AugmentSpec(kind="noise"),
        ]
    }
    outs = [
        cutting.cut_audio(CLIP, cut("audio", 0.7, 1.2, seed=seed, **spec), training).data
        for seed, training in ((1, True), (1, True), (2, True), (1, False))
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert outs[3].tolist() == [21.0 + k for k in range(50)]


def test_square_crop_is_central_in_evaluation_and_random_in_training():
    columns = (
        torch.arange(6, dtype=torch.uint8)[None, None, :, None] * torch.ones(8, 4, 6, 3)
    ).byte()
    clip = Clip("k", "s", 0, 2.0, frames=columns, frame_times_s=CLIP.frame_times_s)
    fixed = cutting.cut_video(clip, cut("video", size=4), training=False).data
    assert fixed[0, 0, :, 0].tolist() == [1, 2, 3, 4]
    lefts = {
        int(cutting.cut_video(clip, cut("video", size=4, seed=s), training=True).data[0, 0, 0, 0])
        for s in range(40)
    }
    assert lefts == {0, 1, 2}


@pytest.mark.parametrize(
    ("modality", "kind", "options", "message"),
    [
        ("audio", "horizontal_flip", {}, "no audio augmentation 'horizontal_flip'.*gain, noise"),
        ("text", "gain", {}, "no text augmentation 'gain' .known: none"),
        ("audio", "gain", {"dB": [0, 1]}, "gain: bad options .*dB"),
        ("audio", "gain", {"db": 3}, "gain: bad options"),
        ("video", "color_jitter", {"hue": 3}, "color_jitter: bad options"),
    ],
)
def test_wrong_augmentations_are_named(modality, kind, options, message):
    spec = ViewSpec(modality=modality, augment=[AugmentSpec(kind=kind, options=options)])
    with pytest.raises(UserError, match=rf"views\.x\.augment\[0\].*{message}"):
        cutting.check_views({"x": spec})


def test_every_augmentation_works_with_its_defaults():
    for modality, table in cutting.OPS.items():
        kinds = [AugmentSpec(kind=kind) for kind in table]
        cutting.check_views({"x": ViewSpec(modality=modality, augment=kinds, size=8)})
