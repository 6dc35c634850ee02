"""mmssl.load: the same vector for the same clip, wherever and with whomever it is encoded."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from embed_runs import embedding, run_folder
from media_files import moving_frames, tone, write_media
from PIL import Image
from small_methods import small

import mmssl
from mmssl.data.collate import Item, collate
from mmssl.data.encode import SampleEncoder
from mmssl.data.integrity import seal
from mmssl.embed import model as model_module
from mmssl.embed import spaces as spaces_module
from mmssl.embed.sources import Row, rows
from mmssl.embed.windows import Cutter
from mmssl.eval.embed import encoded_once
from mmssl.heads.embed import pool
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Sample, UserError, View

METHODS = ["tiny", "audio/cola", "speech/hubert_it1", "avt/mmv_fac"]
CLOSE = {"atol": 1e-5, "rtol": 0}


@cache
def model_of(name):
    return embedding(name)


def noise(seconds, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    return (0.3 * rng.standard_normal(round(seconds * rate))).astype(np.float32)


def items(model, seconds, seed=0):
    """One item of each modality that a model reads."""
    made = {
        "audio": {"audio": (noise(seconds, seed=seed), 16000)},
        "video": {"video": (moving_frames(max(1, round(10 * seconds)), seed=seed), 10)},
        "text": {"text": ["rain falls", "a cat", "the sea at night", "a dog barks"][seed % 4]},
    }
    return [made[m] for m in model.modalities]


# ---------------------------------------------------------------- stability (R15)


@pytest.mark.parametrize("name", METHODS)
def test_a_vector_depends_neither_on_its_place_nor_on_its_neighbours(name):
    model = model_of(name)
    for space, held in model.spaces.items():
        for modality in held:
            clips = [
                next(i for i in items(model, s, seed=k) if modality in i)
                for k, s in enumerate((0.31, 1.7, 0.05, 0.4))
            ]
            alone = [model.encode(clip, space=space) for clip in clips]
            together = model.encode(clips, space=space)
            for place, vector in enumerate(alone):
                turned = model.encode(clips[place:] + clips[:place], space=space, batch_size=3)
                torch.testing.assert_close(turned[0], vector, **CLOSE)
                torch.testing.assert_close(together[place], vector, **CLOSE)
                assert vector.norm() == pytest.approx(1, abs=1e-5)
            apart = (torch.stack(alone)[0] - torch.stack(alone)[1]).abs().max()
            assert apart > 1e-4  # the vectors do tell clips apart


@pytest.mark.parametrize("name", METHODS)
def test_a_hundred_times_the_same_bits(name):
    model = model_of(name)
    for item in items(model, 0.3):
        space = next(s for s in model.spaces if model.supports(next(iter(item)), s))
        first = model.encode(item, space=space, threads=0)
        repeats = (model.encode(item, space=space, threads=0) for _ in range(100))
        assert all(torch.equal(vector, first) for vector in repeats)


@pytest.mark.parametrize("name", METHODS)
def test_frames_stay_the_same_with_longer_sounds_in_the_batch(name):
    model = model_of(name)
    sounds = [{"audio": (noise(s, seed=k), 16000)} for k, s in enumerate((0.29, 0.9, 0.13))]
    for sound, (together, times) in zip(sounds, model.encode_frames(sounds), strict=True):
        alone, times_alone = model.encode_frames(sound)
        torch.testing.assert_close(together, alone, **CLOSE)
        torch.testing.assert_close(times, times_alone, **CLOSE)
        seconds = len(sound["audio"][0]) / 16000
        assert (times.diff() > 0).all()
        assert times[0] >= 0
        # the last frame lies no further from the end than windows of 1000 samples and a hop do
        assert seconds - 0.4 <= times[-1] <= seconds + 0.05


def test_threads_change_nothing():
    model = model_of("tiny")
    file = write_media(moving_frames(42), tone(4.2, 16000), fps=10)
    clips = [{"audio": file, "video": file}, *items(model, 2.3)] * 3
    assert torch.equal(model.encode(clips, threads=3), model.encode(clips, threads=0))


def test_batches_encoded_at_the_same_time_do_not_mix():
    model, together = model_of("tiny"), threading.Barrier(2)

    @contextmanager
    def met(*args):
        with encoded_once(*args):
            together.wait(timeout=20)  # both batches have left their encodings
            yield

    clips = [items(model, 0.4, seed=k)[0] for k in range(8)]
    alone = torch.stack([model.encode(clip) for clip in clips])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    model.model.train()
    try:
        with mock.patch.object(spaces_module, "encoded_once", met):
            found = model.encode(clips, batch_size=2)
        assert model.model.training
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        model.model.eval()
    torch.testing.assert_close(found, alone, **CLOSE)


# ---------------------------------------------------------------- the same as evaluation


def test_vectors_are_those_of_evaluation():
    """The same bytes through the encoder of shard samples and through the interface."""
    model = model_of("tiny")
    file = write_media(moving_frames(9, seed=3), tone(0.9, 44100), fps=10, rate=44100)
    record = {"key": "s", "source": "s", "index": 0, "has": ["audio", "text", "video"]}
    record |= {"captions": ["a dog barks"], "meta": {}}
    sample = Sample("s", (), {"mp4": file, "json": seal(record, {"mp4": file})})
    views = model.spec.views
    encode = SampleEncoder(views, DataSpec(), 0, model.tokenizer, training=False)
    theirs = model.model.eval().embed(collate([encode(sample)], views))
    for (modality, space), (vector, _) in theirs.items():
        item = {modality: "a dog barks" if modality == "text" else file}
        if modality == "audio":  # sound of a file with pictures is read on the pictures' clock
            windows = model.encode_windows({"audio": file, "video": file}, spaces=[space])
            ours = next(w.vectors[space] for w in windows if w.modality == "audio")
        else:
            ours = model.encode(item, space=space)
        torch.testing.assert_close(ours, vector[0], **CLOSE)


def test_short_sounds_are_padded_no_further_than_their_tower_needs():
    """Evaluation pads to the crop; a tower without learned positions sees no difference."""
    name = "speech/hubert_it1"
    model = embedding(name, small(name, "views.x.crop_s=5.0"))
    wave = noise(1.3)
    pieces = []
    with mock.patch.object(model_module, "batched", side_effect=_recorded(pieces)):
        vector = model.encode({"audio": (wave, 16000)}, normalize=False)
    assert [piece.padded_s for piece in pieces] == [2.0]
    view = View(torch.from_numpy(wave), 16000.0, 0.0, 0)
    batch = collate([Item("a", "a", 0, [], {"x": [view]})], model.spec.views)
    assert batch.views["x"].data.shape == (1, 80_000)
    with torch.inference_mode():
        theirs = pool(model.model.passes(batch).tokens("x"), "mean")[0]
    torch.testing.assert_close(vector, theirs, **CLOSE)


def _recorded(pieces):
    batches = model_module.batched

    def record(given, size):
        for batch in batches(given, size):
            pieces.extend(batch)
            yield batch

    return record


@pytest.mark.parametrize("rate", [16000, 22050, 48000])
def test_arrays_and_files_of_any_rate_give_one_vector(tmp_path, rate):
    model = model_of("tiny")
    left, right = noise(1.0, rate, 1), 0.5 * noise(1.0, rate, 2)
    stereo = np.stack([left, right])
    path = tmp_path / "sound.wav"
    path.write_bytes(write_media(None, stereo, container="wav", rate=rate, audio_codec="pcm_f32le"))
    given = [path, str(path), path.read_bytes(), (stereo, rate), ((left + right) / 2, rate)]
    given += [(torch.from_numpy(stereo), rate), {"array": stereo, "sampling_rate": rate}]
    vectors = model.encode({"audio": given})
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), **CLOSE)
    whole = model.encode(path)
    torch.testing.assert_close(whole, vectors[0], **CLOSE)
    ints = (np.round(left * 32767)).astype(np.int16)
    a, b = model.encode({"audio": [(ints, rate), ((ints / 32768).astype("f4"), rate)]})
    torch.testing.assert_close(a, b, **CLOSE)


def test_frames_of_a_file_and_of_an_array_give_one_vector():
    model = model_of("tiny")
    frames = moving_frames(20, 24, 40)
    # FFV1 in RGB loses nothing
    file = write_media(
        frames, None, container="matroska", fps=10, video_codec="ffv1", pix_fmt="bgr0", options={}
    )
    vectors = model.encode({"video": [file, (frames, 10), {"frames": frames, "fps": 10.0}]})
    torch.testing.assert_close(vectors, vectors[:1].expand_as(vectors), **CLOSE)


def test_a_picture_is_a_film_of_one_frame(tmp_path):
    model = model_of("tiny")
    picture = moving_frames(1, 40, 60)
    Image.fromarray(picture[0]).save(tmp_path / "frame.png")
    ours, array = model.encode({"video": [tmp_path / "frame.png", (picture, 25)]})
    torch.testing.assert_close(ours, array, **CLOSE)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(("hop", "starts"), [(None, [0, 1, 1.35]), (0.5, [0, 0.5, 1, 1.35])])
def test_windows_reach_the_end_and_the_vector_is_their_mean(hop, starts):
    model = model_of("tiny")  # its windows are one second
    wave = noise(2.35)
    windows = list(model.encode_windows({"audio": (wave, 16000)}, hop_s=hop, spaces=["avt"]))
    assert [w.start_s for w in windows] == pytest.approx(starts)
    assert windows[-1].end_s == pytest.approx(2.35)
    for window in windows:
        first = round(16000 * window.start_s)
        alone = model.encode({"audio": (wave[first : first + 16000], 16000)}, space="avt")
        torch.testing.assert_close(window.vectors["avt"], alone, **CLOSE)
    stack = torch.stack([w.vectors["avt"] for w in windows])
    for how, pooled in (("mean", stack.mean(0)), ("max", stack.amax(0))):
        vector = model.encode({"audio": (wave, 16000)}, hop_s=hop, space="avt", pool=how)
        torch.testing.assert_close(vector, pooled / pooled.norm(), **CLOSE)


def test_raw_vectors_point_where_unit_vectors_do():
    model = model_of("tiny")
    item = {"audio": (noise(1.0), 16000)}
    raw, unit = model.encode(item, normalize=False), model.encode(item)
    assert abs(float(raw.norm()) - 1) > 1e-3
    torch.testing.assert_close(raw / raw.norm(), unit, **CLOSE)


def test_the_end_of_a_file_counts(tmp_path):
    model = model_of("tiny")
    wave = noise(2.35)
    other = wave.copy()
    other[-800:] = noise(0.05, seed=9)
    a, b = model.encode({"audio": [(wave, 16000), (other, 16000)]})
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("window", [0.5, 1.0, 2.0])
def test_frames_of_windows_tile_the_sound(window):
    model = model_of("tiny")
    frames, times = model.encode_frames({"audio": (noise(3.7), 16000)}, window_s=window)
    assert len(frames) == len(times)
    assert times.diff().max() <= 1.5 * times.diff().median()
    assert times.diff().min() >= 0.4 * times.diff().median()
    assert times[-1] > 3.7 - 2 * times.diff().median()


def test_whole_windows_share_their_batches_whatever_their_start():
    """The 10 s from 0.7 to 10.7 are 10.000000000000002 s, which is no reason to pad them to 11."""
    whole = ViewSpec(modality="audio", crop_s=0, hz=16000)
    (row,) = rows({"audio": [(noise(60.0), 16000)]})
    pieces = list(Cutter({"x": whole}, None, hop_s=0.7).pieces(0, row))
    assert [piece.start_s for piece in pieces] == sorted(piece.start_s for piece in pieces)
    assert any(piece.end_s - piece.start_s > 10.0 for piece in pieces)
    assert {piece.padded_s for piece in pieces} == {10.0}


def test_arrays_of_any_order_and_layout_are_read():
    model = model_of("tiny")
    wave = noise(1.0)
    film = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    for modality, plain, other in (
        ("audio", (wave, 16000), (wave.astype(">f4"), 16000)),
        ("audio", (wave[::-1].copy(), 16000), (wave[::-1], 16000)),
        ("video", (film[..., ::-1].copy(), 4), (film[..., ::-1], 4)),
    ):
        a, b = (model.encode({modality: [x]}) for x in (plain, other))
        assert torch.equal(a, b)


def test_a_long_sentence_is_no_file():
    assert model_of("tiny").encode("a dog barks " * 40).shape[-1] > 0


# ---------------------------------------------------------------- modalities and spaces


def test_what_an_item_lacks_has_no_part_in_its_vector():
    model = model_of("tiny")
    sound, film = (noise(1.0), 16000), (moving_frames(10), 10)
    both, deaf, blind = model.encode(
        {"audio": [sound, None, sound], "video": [film, film, None]}, space="avt"
    )
    a, v = model.encode({"audio": sound}, space="avt"), model.encode({"video": film}, space="avt")
    torch.testing.assert_close(deaf, v, **CLOSE)
    torch.testing.assert_close(blind, a, **CLOSE)
    torch.testing.assert_close(both, (a + v) / (a + v).norm(), **CLOSE)


def test_spaces_of_a_model_with_two():
    model = model_of("avt/mmv_fac")
    assert model.spaces["va"] == ("audio", "video")
    assert model.spaces["vat"] == ("audio", "video", "text")  # audio in evaluation only
    assert model.default_space == "vat"
    assert model.modalities == ("audio", "video", "text")
    assert model.supports("text")
    assert not model.supports("text", "va")
    widths = {len(model.encode(items(model, 0.4)[0], space=s)) for s in ("va", "vat")}
    assert len(widths) == 1 or widths == {16, 8}
    with pytest.raises(UserError, match=r"item 0, text: is not in va.*vat \(audio video text\)"):
        model.encode(["a dog"], space="va")


def test_a_model_without_spaces_gives_its_towers():
    model = model_of("speech/hubert_it1")
    (space,) = model.spaces
    assert space == f"towers.{model.audio_view().tower_name}"
    assert model.modalities == ("audio",)
    sound = {"audio": (noise(0.4), 16000)}
    frames, _ = model.encode_frames(sound)
    torch.testing.assert_close(
        model.encode(sound, normalize=False), frames.mean(0), atol=1e-4, rtol=0
    )
    layers, _ = model.encode_layers([sound])[0]
    assert len(layers) == 1 + model.spec.towers[space.removeprefix("towers.")].backbone.layers + 1
    torch.testing.assert_close(layers[-1], frames, **CLOSE)


def test_similarity_is_the_cosine():
    model = model_of("tiny")
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    wanted = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(model.similarity(a, b), wanted)
    torch.testing.assert_close(model.similarity(a[0], b), wanted[:1])
    torch.testing.assert_close(model.similarity_pairwise(a, b[:3]), wanted[:, :3].diagonal())


# ---------------------------------------------------------------- runs and hashes


def test_load_reads_a_run_and_tells_it_by_its_hash(tmp_path):
    made = run_folder(tmp_path / "run")
    loaded = mmssl.load(tmp_path / "run")
    assert loaded.hash == made.hash
    assert len(made.hash) == 64
    for item in items(made, 1.0):
        assert torch.equal(loaded.encode(item), made.encode(item))
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-3)
    assert type(loaded)(loaded.model, loaded.tokenizer).hash != made.hash
    assert type(made)(made.model, None).hash != made.hash
    with pytest.raises(UserError, match="no complete checkpoint"):
        mmssl.load(tmp_path)


def test_importing_mmssl_is_cheap():
    code = "import sys, mmssl; mmssl.load; print(sorted({'torch', 'av'} & set(sys.modules)))"
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert out.strip() == "[]"


# ---------------------------------------------------------------- bad input


SILENT = write_media(moving_frames(5), None)
BAD = [
    ([], "nothing to encode: the list is empty"),
    (3, "a int does not say what it is"),
    ([3], "item 0: expected a text, a Path or a dict of modalities, found int"),
    ({"image": "x.png"}, "no modality 'image'; there are audio, video, text"),
    ({"audio": None}, "has no modality at all"),
    ({"text": ["a", ""]}, "item 1, text: the text is empty"),
    ({"text": 5}, "text: expected a text, found int"),
    ({"text": ["a"], "audio": [None, None]}, r"lists of one length are needed \(text: 1, audio: 2"),
    ({"text": ["a"], "audio": None}, r"text: 1, audio: no list"),
    ({"audio": "nowhere.wav"}, "audio: nowhere.wav: no such file"),
    ({"audio": np.zeros(5, "f4")}, r"a ndarray has no rate; give a path, \(array, sampling_rate\)"),
    ({"audio": (np.zeros(5, "f4"), 0)}, "sampling_rate must be a number above 0, found 0"),
    ({"audio": (np.zeros(5, "f4"), 8000.5)}, "whole number of Hz"),
    ({"audio": ([0.0], 8000)}, "array must be a numpy array or a tensor, found list"),
    ({"audio": (np.zeros((500, 2), "f4"), 8000)}, r"\(channels, samples\), found \(500, 2\)"),
    ({"audio": (np.zeros(0, "f4"), 8000)}, "holds no samples"),
    ({"audio": (np.array(["a"]), 8000)}, "an array of <U1 holds no samples"),
    ({"audio": (np.zeros(9, "i8"), 8000)}, "samples of torch.int64"),
    ({"audio": (np.full(9, np.nan, "f4"), 8000)}, "not finite"),
    ({"video": (np.zeros((2, 8, 8), "u1"), 5)}, r"\(frames, height, width, 3\) uint8"),
    ({"video": (np.zeros((2, 8, 8, 3), "f4"), 5)}, "torch.float32"),
    ([{"audio": SILENT}], "item 0, audio: the file has no audio; leave it out"),
    ([{"audio": b"no media at all"}], "item 0: .*cannot be decoded"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_explained(given, message):
    with pytest.raises(UserError, match=message):
        model_of("tiny").encode(given)


def test_files_are_explained_by_name(tmp_path):
    model = model_of("tiny")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(SILENT[: len(SILENT) // 3])
    with pytest.raises(UserError, match=r"item 1: .*broken.mp4: cannot be decoded"):
        model.encode([{"text": "a dog"}, broken])
    with pytest.raises(UserError, match=r"is a file; give Path\("):
        model.encode(str(broken))
    silent = tmp_path / "silent.mp4"
    silent.write_bytes(SILENT)
    with pytest.raises(UserError, match=r"silent.mp4 has no stream that the model reads"):
        model_of("speech/hubert_it1").encode(Path(silent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "xy"}, r"no 'xy'; there are av \(audio video\)"),
        ({"pool": "median"}, "pool: 'median' is not known"),
        ({"window_s": 0}, "window_s: must be above 0"),
        ({"hop_s": -1.0}, "hop_s: must be above 0"),
        ({"batch_size": 0}, "batch_size: must be above 0"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        model_of("tiny").encode(["a dog"], **options)


def test_frames_are_of_one_medium():
    model = model_of("tiny")
    with pytest.raises(UserError, match="say of what frames are wanted"):
        model.encode_frames({"audio": SILENT, "video": SILENT})
    with pytest.raises(UserError, match="item 0, text: is not in"):
        model.encode_frames(["a dog"])
    with pytest.raises(UserError, match="no 'x' that reads audio or video; there are: audio, vid"):
        model.encode_frames({"video": SILENT}, tower="x")
    with pytest.raises(UserError, match="no tower 'x' reads sound; these do: audio"):
        model.audio_view("x")


def test_a_model_of_ids_from_a_side_car_reads_no_media():
    model = embedding("speech/vq_wav2vec_bert")
    assert model.spaces == {}
    assert model.modalities == ()
    with pytest.raises(UserError, match="reads neither sound nor pictures nor text"):
        model.encode({"audio": (noise(1.0), 16000)})


def test_a_stream_without_duration_is_refused():
    cutter = Cutter(model_of("tiny").spec.views, None)
    reader = SimpleNamespace(duration_s=0.0, has={"audio"})
    with pytest.raises(UserError, match="item 3: is empty"):
        next(cutter._windows(3, Row("item 3", {}), reader, frozenset({"audio"})))
