"""From shards to side-cars: MFCCs and layers, the same bytes from any number of workers."""

from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_run import TREE, tiny_model, tiny_spec
from tone_shards import HZ, PART_S, SCORES, tones, write_tones

from data_tools import label_features, label_shards
from data_tools.label_features import Mfcc, TowerFrames, encode_frames, frame_source
from mmssl.data.collate import Item, collate
from mmssl.data.labels import check
from mmssl.data.sidecars import SideCar
from mmssl.eval.units import joint_counts, unit_quality
from mmssl.files import sha256
from mmssl.specs import LabellingSpec, ViewSpec
from mmssl.targets.clusters import Clusters
from mmssl.types import Tokens, UserError, View


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("tones") / "train", SCORES)


def score_of(key):
    return SCORES[int(key[1])]


def options(**changes):
    small = {"clusters": (3,), "fit_share": 1.0, "sweeps": 2, "points": 1000, "restarts": 2}
    return LabellingSpec(**{**small, **changes})


def test_tones_become_units(shards, tmp_path):
    """98 labels of each second; the unit tells the tone, but where two tones share a window."""
    out = tmp_path / "deep" / "l.safetensors"
    made = label_shards.label_shards(shards, out, options())
    car = SideCar(out)
    assert (made.samples, made.unread, made.warnings) == (5, 0, ())
    classes, units = [], []
    for key in car:
        score = score_of(key)
        seconds = len(score) * PART_S
        assert len(car.ids(key)) == 1 + (round(seconds * HZ) - 400) // 160
        assert car.seconds(key) == seconds
        centre = 0.0125 + np.arange(len(car.ids(key))) / 100
        classes += [score[int(t / PART_S)] for t in centre]
        units += car.ids(key)[:, 0].tolist()
    quality = unit_quality(joint_counts(classes, units, 3, 3))
    assert quality.phone_purity > 0.97
    assert quality.pnmi > 0.9
    assert made.labels == car.labels == len(units)
    assert car.info.source == Mfcc().source
    assert check(car, 50.0) == []


def test_any_number_of_workers_gives_the_same_bytes(shards, tmp_path):
    for name, workers in (("0", 0), ("2", 2), ("again", 0)):
        label_shards.label_shards(shards, tmp_path / name / "l", options(workers=workers))
    files = [
        [(tmp_path / n / f).read_bytes() for f in ("l", "l.kmeans-3.safetensors")]
        for n in ("0", "2", "again")
    ]
    assert files[0] == files[1] == files[2]


def test_an_ensemble_and_its_reuse(shards, tmp_path):
    made = label_shards.label_shards(shards, tmp_path / "l", options(clusters=(3, 6)))
    car = SideCar(tmp_path / "l")
    assert car.info.classes == (3, 6)
    assert [k.name for k in made.kmeans] == ["l.kmeans-3.safetensors", "l.kmeans-6.safetensors"]
    books = [Clusters.load(path) for path in made.kmeans]
    assert car.info.codebooks == tuple(book.digest for book in books)

    other = write_tones(tmp_path / "other", [[1, 0], [2]], silent=(1,))
    again = label_shards.label_shards(other, tmp_path / "l2", options(kmeans=made.kmeans))
    second = SideCar(tmp_path / "l2")
    assert (second.info.classes, second.info.codebooks) == (car.info.classes, car.info.codebooks)
    assert second.info.shards != car.info.shards
    assert again.kmeans == made.kmeans
    lengths = sorted(len(second.ids(key)) for key in second)
    assert lengths == [0, 98]
    assert any("1 of 2 samples have no label" in warning for warning in again.warnings)


def test_labelling_goes_on_from_the_clustering(shards, tmp_path, monkeypatch):
    """What was fitted before a failure is kept; nothing half written is."""
    whole = label_shards.label_shards(shards, tmp_path / "a", options())

    def broken(*_):
        raise RuntimeError("power failure")

    with monkeypatch.context() as patch:
        patch.setattr(Clusters, "assign", broken)
        with pytest.raises(RuntimeError, match="power failure"):
            label_shards.label_shards(shards, tmp_path / "b", options())
    kept = tmp_path / "b.kmeans-3.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] in ".b") == [kept.name]
    label_shards.label_shards(shards, tmp_path / "b", options(kmeans=(kept,)))
    assert (tmp_path / "b").read_bytes() == whole.path.read_bytes()


def test_the_fit_reads_its_share_only(shards, tmp_path, monkeypatch):
    seen = []
    real = label_shards.eval_batches

    def watched(*args, rows, **kwargs):
        seen.append(list(rows))
        return real(*args, rows=rows, **kwargs)

    monkeypatch.setattr(label_shards, "eval_batches", watched)
    label_shards.label_shards(shards, tmp_path / "l", options(fit_share=0.4, sweeps=1))
    assert [len(rows) for rows in seen] == [2, 5]  # the sample holds both
    seen.clear()
    label_shards.label_shards(shards, tmp_path / "l", options(fit_share=0.4, sweeps=1, points=9))
    assert [len(rows) for rows in seen] == [2, 2, 5]
    assert seen[0] == seen[1] == sorted(seen[0])
    for seed in (1, 2, 3):
        again = options(fit_share=0.4, sweeps=0, seed=seed)
        label_shards.label_shards(shards, tmp_path / "l2", again)
    assert len({tuple(rows) for rows in seen if len(rows) == 2}) > 1


def test_errors(shards, tmp_path):
    for changes, message in (
        ({"layer": 2}, "--features mfcc has no --layer, --tower and --codes"),
        ({"clusters": (9999,), "points": 99999}, "9999 clusters of"),
        ({"features": "no/such/run"}, "no/such/run"),
        ({"kmeans": (tmp_path / "none",)}, "no such clustering"),
    ):
        with pytest.raises(UserError, match=message):
            label_shards.label_shards(shards, tmp_path / "l", options(**changes))
    with pytest.raises(UserError, match="no such shard folder"):
        label_shards.label_shards(tmp_path / "none", tmp_path / "l", options())
    foreign = Clusters(np.zeros((3, 39), np.float32), changed(Mfcc().source, rate_hz=50.0))
    foreign.save(tmp_path / "k")
    with pytest.raises(UserError, match="use the features it was fitted to"):
        label_shards.label_shards(shards, tmp_path / "l", options(kmeans=(tmp_path / "k",)))
    assert not (tmp_path / "l").exists()


def test_command_line(shards, tmp_path, capsys):
    out = tmp_path / "l.safetensors"
    arguments = [str(shards), str(out), "--clusters", "3,4", "--fit-share", "1", "--workers", "0"]
    assert label_shards.main([*arguments, "--sweeps", "1", "--restarts", "1"]) == 0
    text = capsys.readouterr().out
    assert f"{out}: {SideCar(out).labels} labels of 5 samples" in text
    assert "l.kmeans-3.safetensors: 3 clusters, mean squared distance " in text
    assert "warning" not in text
    for option, value, message in (
        ("fit-share", "2", "2.0: Input should be less than or equal to 1"),
        ("fit-share", "0", "0.0: Input should be greater than 0"),
        ("workers", "-1", "-1: Input should be greater than or equal to 0"),
        ("clusters", "3,3", "(3, 3): Value error, give one or several different sizes"),
    ):
        assert label_shards.main([str(shards), str(out), f"--{option}", value]) == 2
        assert capsys.readouterr().err == f"error: --{option} {message}\n"
    with pytest.raises(SystemExit):
        label_shards.main([*arguments[:2], "--clusters", "many"])
    assert "invalid comma-separated list value: 'many'" in capsys.readouterr().err


# ---------------------------------------------------------------- features


def batch_of(*waves, hz=HZ):
    views = {"x": ViewSpec(modality="audio", hz=hz)}
    items = [
        Item(str(i), "s", i, [], {"x": [View(wave.float(), float(hz), 0.0, i)]})
        for i, wave in enumerate(waves)
    ]
    return collate(items, views).views["x"]


def test_normalised_mfccs_forget_gain_and_colour():
    wave = torch.randn(HZ, generator=torch.Generator().manual_seed(0))
    louder = 3 * wave
    found = [label_features.Mfcc(n).frames(batch_of(w, hz=16000))
             for n in ("mfcc", "mfcc_cmvn") for w in (wave, louder)]  # fmt: skip
    assert abs(found[0] - found[1]).max() > 1
    np.testing.assert_allclose(found[2], found[3], atol=1e-3)
    np.testing.assert_allclose(found[2].mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found[2].std(0), 1, atol=1e-3)
    assert label_features.frame_source("mfcc_cmvn").source.features == "mfcc_cmvn"


def test_mfcc_frames_stand_at_every_ten_milliseconds():
    wave = torch.from_numpy(tones([0, 1, 2]))
    features = Mfcc().frames(batch_of(wave))
    assert (features.shape, features.dtype) == ((148, 39), np.float32)
    later = Mfcc().frames(batch_of(wave[1600:]))
    np.testing.assert_allclose(features[10:, :13], later[:, :13], atol=1e-3)
    # differences of a row of numbers: (-2 -1 0 1 2) / 10 over five frames
    slope = sum(k * features[20 + k, :13] for k in (-2, -1, 1, 2)) / 10
    np.testing.assert_allclose(features[20, 13:26], slope, atol=1e-3)
    assert Mfcc().frames(batch_of(wave[:399])).shape == (0, 39)
    assert Mfcc().frames(batch_of(wave[:400])).shape == (1, 39)


@pytest.fixture
def spec():
    return tiny_spec(shared=TREE["shared"] | {"layers": 3})


@pytest.fixture
def model(spec):
    return tiny_model(spec).eval()


@pytest.fixture
def run(model, spec, tmp_path, monkeypatch):
    """A run folder as far as features look at it."""
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(label_features, "load_model", lambda _: (model, spec, None))
    monkeypatch.setattr(label_features.checkpoint, "find", lambda *_: tmp_path)
    return tmp_path


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layers_are_those_of_the_transformer(model, layer):
    """Peer: the transformer's own list of hidden states, behind the global tokens."""
    tower, view = model.towers["audio"], batch_of(torch.randn(HZ), torch.randn(HZ))
    entered = []
    hook = model.trunk.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    output, rate = encode_frames(view, tower)
    hook.remove()
    with torch.inference_mode():
        last, hidden = model.trunk(entered[0], None, "audio", return_hidden=True)
    front = tower.extra.count(tower.extra.names)
    found, same_rate = encode_frames(view, tower, model.trunk.blocks[layer - 1])
    assert rate == same_rate == 25.0
    for i in range(2):
        torch.testing.assert_close(found[i], hidden[layer - 1][i, front:])
        torch.testing.assert_close(output[i], last[i, front:])
    assert not model.trunk.blocks[layer - 1]._forward_hooks


def test_padding_is_cut_off(model):
    waves = torch.randn(HZ), torch.randn(HZ // 2)
    together, _ = encode_frames(batch_of(*waves), model.towers["audio"])
    alone, _ = encode_frames(batch_of(waves[1]), model.towers["audio"])
    assert together[1].shape == alone[0].shape
    assert len(together[0]) > 1.8 * len(together[1])


def test_a_run_labels_shards(run, shards, tmp_path):
    features = TowerFrames(run, layer=2)
    assert features.source.features == "tiny/audio"
    assert (features.source.rate_hz, features.source.layer) == (25.0, 2)
    assert features.source.checkpoint_sha256 == sha256(run / "weights.safetensors")
    assert features.width == 16
    assert (features.view.crop_s, features.view.augment) == (0.0, [])
    made = label_shards.label_shards(
        shards, tmp_path / "l", options(features=str(run), layer=2, clusters=(4,))
    )
    car = SideCar(tmp_path / "l")
    assert car.info.source == features.source
    assert made.samples == 5
    assert {len(car.ids(k)) - round(25 * car.seconds(k)) for k in car} <= {-1, 0, 1}
    assert check(car, 25.0) == []
    with pytest.raises(UserError, match="use the features it was fitted to"):
        label_shards.label_shards(
            shards, tmp_path / "l", options(features=str(run), layer=1, kmeans=made.kmeans)
        )


def test_averaged_weights_are_named_where_there_are_some(run):
    save_file({"x": torch.ones(1)}, run / "ema.safetensors")
    assert TowerFrames(run).source.checkpoint_sha256 == sha256(run / "ema.safetensors")


def test_wrong_towers_and_layers(run, spec, model, monkeypatch):
    for changes, message in (
        ({"layer": 4}, "the tower audio has 3 transformer layers"),
        ({"layer": -1}, "the tower audio has 3 transformer layers"),
        ({"tower": "video"}, "--tower video: the run tiny has the audio towers audio"),
    ):
        with pytest.raises(UserError, match=message):
            frame_source(str(run), **changes)
    audio = spec.towers["audio"]
    towers = spec.model_copy(update={"towers": {"audio": audio, "b": audio}})
    monkeypatch.setattr(label_features, "load_model", lambda _: (model, towers, None))
    with pytest.raises(UserError, match=r"--tower \(none\): .* audio towers audio, b"):
        frame_source(str(run))
    with pytest.raises(UserError, match="no view is read by the tower b"):
        frame_source(str(run), "b")


class Framer(torch.nn.Module):
    """Mean of 400 samples every 320, as local as Conv7."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode(self, view, position):
        if view.data.shape[1] < 400:
            raise UserError("too short")
        x = view.data.unfold(1, 400, 320).mean(-1, keepdim=True)
        pad = torch.zeros(x.shape[:2], dtype=torch.bool)
        grid = (x.shape[1],)
        return Tokens(x, pad, x, pad, grid, grid, {}, 50.0, 50.0, view)


def framed():
    features = object.__new__(TowerFrames)
    features._tower, features._block, features._rate, features.width = Framer(), None, 50.0, 1
    return features


@pytest.mark.parametrize("samples", [400, 16000, 16100, 16399, 16400, 32000, 52801, 64000])
def test_long_clips_are_encoded_in_chunks_without_a_seam(monkeypatch, samples):
    wave = torch.randn(samples)
    whole = framed().frames(batch_of(wave))
    monkeypatch.setattr(label_features, "_CHUNK_S", 1.0)
    chunked = framed().frames(batch_of(wave))
    assert len(whole) == 1 + (samples - 400) // 320
    np.testing.assert_array_equal(chunked, whole)


def test_a_clip_shorter_than_a_window_has_no_frame():
    assert framed().frames(batch_of(torch.randn(399))).shape == (0, 1)


def test_a_longer_clip_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(label_features, "_SHORT_S", 0.01)
    with pytest.raises(UserError, match="too short"):
        framed().frames(batch_of(torch.randn(399)))
