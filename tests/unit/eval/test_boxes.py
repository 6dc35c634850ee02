"""Still maps against boxes: readers of annotations, the suite, its baselines and its decision."""

import json

import numpy as np
import pytest
import torch

import mmssl.data.ordered
import mmssl.eval.load
from mmssl.eval import boxes, ciou, results, suites
from mmssl.eval.annotations import read_annotations
from mmssl.heads.dense import Dense
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import Batch, UserError, ViewBatch


def test_vggss(tmp_path):
    path = tmp_path / "vggss.json"
    entries = [
        {"file": "abc_000010", "class": "dog", "bbox": [[0.1, 0.2, 0.5, 1.02]]},
        {"file": "def_000020", "class": "cat", "bbox": [[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]]},
    ]
    path.write_text(json.dumps(entries))
    found = read_annotations(path)
    assert found.consensus == 1
    assert found.boxes["abc_000010"].tolist() == [[0.1, 0.2, 0.5, 1.0]]
    union = ciou.weight_map(found.boxes["def_000020"], found.consensus)
    assert union.max() == 1.0
    assert union.sum() == 112**2 + 168**2 - 56**2


def test_flickr_needs_two_of_three(tmp_path):
    box = "<object><bbox><name>x</name>" + "".join(
        f"<{tag}>{{{tag}}}</{tag}>" for tag in ("xmin", "ymin", "xmax", "ymax")
    )
    drawn = [(0, 0, 128, 128), (0, 0, 128, 256), (0, 0, 64, 64)]
    tags = ("xmin", "ymin", "xmax", "ymax")
    body = "".join(
        box.format(**dict(zip(tags, one, strict=True))) + "</bbox></object>" for one in drawn
    )
    (tmp_path / "123.xml").write_text(f"<annotation><filename>123</filename>{body}</annotation>")
    found = read_annotations(tmp_path)
    weights = ciou.weight_map(found.boxes["123"], found.consensus)
    places = {(20, 20): 1.0, (100, 100): 1.0, (200, 100): 0.5, (200, 200): 0.0}
    assert {place: weights[place] for place in places} == places


def _vggss(bbox):
    return json.dumps([{"file": "x", "bbox": bbox}])


def test_annotations_that_cannot_be_read(tmp_path):
    for name, text, message in (
        ("a.json", "{}}", "not a file of VGG-SS"),
        ("b.json", '[{"file": "x"}]', "not a file of VGG-SS"),
        ("c.json", '[{"file": "x", "bbox": [[1, 2, 3]]}]', "x: a box needs four numbers"),
        ("d.json", '[{"file": "x", "bbox": [[1, 2, 300, 4]]}]', "x: boxes far beyond the picture"),
        ("e.json", _vggss([[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]), "x: a box needs four"),
        ("f.json", _vggss([[0, 0, 1, 1, 0, 0, 1, 1]]), "f.json: x: a box needs four numbers"),
        ("g.json", _vggss([0, 0, 1, 1]), "x: a box needs four numbers"),
        ("h.json", _vggss(None), "x: a box needs four numbers"),
        ("i.json", _vggss([["a", 0, 1, 1]]), "x: a box needs four numbers"),
        ("j.json", _vggss([[0, 0, 1, 1], [0.5, 0, 0.2, 1]]), "x: corners in another order"),
        ("k.json", _vggss([[0, 0.5, 1, 0.5]]), "x: corners in another order"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_annotations(tmp_path / name)
    with pytest.raises(UserError, match="no such file or folder"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "xml").mkdir()
    with pytest.raises(UserError, match="holds no XML file"):
        read_annotations(tmp_path / "xml")
    (tmp_path / "xml" / "1.xml").write_text("<a><bbox/></a>")
    with pytest.raises(UserError, match=r"1\.xml: 1: a box needs four numbers"):
        read_annotations(tmp_path / "xml")
    (tmp_path / "xml" / "1.xml").write_text("<a><bbox><x>left</x></bbox></a>")
    with pytest.raises(UserError, match=r"1\.xml: not an annotation of Flickr-SoundNet"):
        read_annotations(tmp_path / "xml")


def test_saliency_finds_what_is_unlike_the_rest():
    rng = np.random.default_rng(0)
    stripes = 128 + 60 * np.sin(np.arange(128) * np.pi / 8)[:, None] + rng.normal(0, 4, (128, 128))
    stripes[90:100, 20:30] = rng.integers(0, 255, (10, 10))
    frame = np.repeat(stripes[..., None], 3, -1).astype(np.uint8)
    saliency = ciou.spectral_residual(frame)
    row, column = np.divmod(saliency.argmax(), 64)
    assert saliency.shape == (64, 64)
    assert 43 <= row <= 51
    assert 8 <= column <= 16


@pytest.fixture
def run(tmp_path, monkeypatch, batches, knowing_model):
    """Clips of two objects; the model knows both, and what silence is."""
    from test_suites import run_spec

    (tmp_path / "manifest.json").write_text('{"shards": []}')
    spec = run_spec(tmp_path)
    spec = spec.model_copy(update={"data": DataSpec(test=str(tmp_path))})

    class Hearing(knowing_model):
        def dense(self, batch):
            found = super().dense(batch)
            found.audio[batch.views["sound"].data.abs().amax(1) == 0] = 0.0
            return found

    def load_model(run, which="ema", random=False):
        return Hearing("noise" if random else "perfect"), spec, None

    monkeypatch.setattr(mmssl.eval.load, "load_model", load_model)
    monkeypatch.setattr(mmssl.data.ordered, "eval_batches", lambda *a, **k: iter(batches))
    for batch in batches:
        for meta, key in zip(batch.meta, batch.keys, strict=True):
            meta |= {"duration_s": 2.0, "source": f"film-{key}"}
    return tmp_path


def test_a_model_that_knows_and_what_needs_no_model(run, capsys):
    torch.manual_seed(0)
    suites.main("boxes", str(run), ["resamples=50"])
    found = results.read(run / "results_boxes.json")
    own = found["boxes"]
    # two by two cells of eight by eight, seen through bilinear scaling
    assert own["model"]["pointing"] == 1.0
    assert own["model"]["adaptive"]["at_0.5"] == 1.0
    assert own["model"]["relative"]["mean"] == pytest.approx((1 / 16) / 0.5, abs=0.01)
    assert own["n"] == own["n_wrong_audio"] == 48
    assert own["wrong_audio"]["pointing"] < 0.5 < own["averaged_audio"]["pointing"] + 0.5
    assert own["whole_image"]["mean"] == pytest.approx(1 / 16)
    assert own["center"]["pointing"] == 0.0
    assert own["saliency"]["pointing"] < 0.4
    assert own["ci"]["pointing"] == [1.0, 1.0]
    guess = found["random_encoder"]["boxes"]["model"]
    assert guess["adaptive"]["mean"] < 0.3
    items = results.read(run / "items_boxes.json")["values"]
    assert np.mean(list(items["boxes.adaptive"].values())) == own["model"]["adaptive"]["mean"]
    decided = own["decision"]
    assert decided["accepts"] == decided["rejects_silence"] == 1.0
    assert decided["auc_silence"] == 1.0
    assert decided["auc_off_screen"] > 0.6  # the other sound is sometimes that of the silent object
    assert decided["adaptive"]["loc_acc"] == 1.0
    assert decided["adaptive"]["ap"] > 0.8
    assert "wrong_audio" in capsys.readouterr().out


def test_annotations_by_the_name_of_the_clip(run):
    drawn = [{"file": f"film-clip-{n}", "bbox": [[0, 0, 0.5, 1]]} for n in range(0, 48, 3)]
    (run / "vggss.json").write_text(json.dumps(drawn))
    words = [f"annotations={run / 'vggss.json'}", "resamples=0", "random=false", "report=false"]
    suites.main("boxes", str(run), words)
    found = results.read(run / "results_boxes.json")["boxes"]
    assert (found["n"], found["unmatched"], found["empty"]) == (16, 32, 0)
    assert found["whole_image"]["mean"] == pytest.approx(0.5)
    assert found["absent"] == 0
    with pytest.raises(UserError, match="by another field than name=class"):
        suites.main("boxes", str(run), [*words, "name=class"])


def test_an_annotated_clip_without_pictures_is_counted(run, batches):
    for batch in batches:
        batch.meta[0]["stored_size"] = [0, 0]  # as of a clip without video
        film = batch.views["frames"]
        for name in ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P"):
            setattr(film, name, getattr(film, name)[1:])
        film.present_BL[0] = False
    drawn = [{"file": f"film-clip-{n}", "bbox": [[0, 0, 0.5, 1]]} for n in range(48)]
    (run / "vggss.json").write_text(json.dumps(drawn))
    words = [f"annotations={run / 'vggss.json'}", "resamples=0", "random=false", "report=false"]
    with np.errstate(all="raise"):
        suites.main("boxes", str(run), words)
    found = results.read(run / "results_boxes.json")["boxes"]
    assert [found[key] for key in ("n", "absent", "unmatched", "empty")] == [43, 5, 0, 0]


class Bright(torch.nn.Module):
    """Its map of a frame is the frame; of a sound that is not of the same middle nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen = set()

    def dense(self, batch):
        film, sound = batch.views["frames"], batch.views["sound"]
        count, times = film.data.shape[:2]
        middles = [v.start_s_P + v.data.shape[1] / v.rate / 2 for v in (film, sound)]
        self.seen.add((times, sound.data.shape[1], float(middles[1][0])))
        return Dense(
            video=film.data[..., 0].float().reshape(count, times, -1, 1),
            audio=((middles[0] - middles[1]).abs() < 0.03).float()[:, None, None],
            audio_valid=torch.ones(count, 1, dtype=torch.bool),
            present=torch.ones(count, dtype=torch.bool),
            grid=(times, 8, 8),
            times_s=film.start_s_P[:, None] + torch.arange(times) / film.rate,
        )

    def score_maps(self, video, audio, valid):
        return video[..., 0] * audio[:, :, 0]


def _moving(views):
    """Clips of 4 s whose bright quarter is at another place each second, as the loader reads."""
    places = torch.arange(100) // 25
    film = torch.zeros(100, 8, 8, 3, dtype=torch.uint8)
    for k, place in enumerate(places.tolist()):
        x, y = place % 2 * 4, place // 2 * 4
        film[k, y : y + 4, x : x + 4] = 255
    crops = {name: view.crop_s or 4.0 for name, view in views.items()}
    count = 4
    frames = _view("video", film[None, : round(crops["frames"] * 25)].repeat(count, 1, 1, 1, 1), 25)
    sound = _view("audio", torch.ones(count, round(crops["sound"] * 100)), 100)
    boxes = [[p % 2 * 4, p // 2 * 4, p % 2 * 4 + 4, p // 2 * 4 + 4] for p in places.tolist()]
    row = {"boxes": {"fps": 25, "sounding": boxes}, "stored_size": [8, 8], "duration_s": 4.0}
    rows = torch.arange(count)
    metas = [{**row, "class": str(k)} for k in range(count)]
    keys = [f"clip-{k}" for k in range(count)]
    yield Batch({"frames": frames, "sound": sound}, keys, rows, rows, rows, metas)


def _view(modality, data, rate):
    rows, zeros = torch.arange(len(data)), torch.zeros(len(data), dtype=torch.long)
    there = torch.ones(len(data), 1, dtype=torch.bool)
    lengths = torch.full_like(rows, data.shape[1])
    return ViewBatch(modality, data, lengths, rows, zeros, zeros, zeros.float(), there, float(rate))


@pytest.fixture
def short_crops(tmp_path, monkeypatch):
    """One frame and 1 s of sound of clips of 4 s."""
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    spec, model = _spec(tmp_path), Bright()
    lengths = {"frames": {"crop_s": 0.04, "fps": 25.0}, "sound": {"crop_s": 1.0}}
    views = {name: spec.views[name].model_copy(update=new) for name, new in lengths.items()}
    new = {"views": views, "data": DataSpec(test=str(tmp_path)), "tasks": {}}
    spec = spec.model_copy(update=new)
    monkeypatch.setattr(mmssl.eval.load, "load_model", lambda *_, **__: (model, spec, None))
    monkeypatch.setattr(
        mmssl.data.ordered, "eval_batches", lambda f, d, views, *_, **__: _moving(views)
    )
    return tmp_path, model, ["random=false", "resamples=0", "report=false"]


@pytest.mark.parametrize(
    ("words", "middle_s"), [([], 2.0), (["at_s=1.5"], 1.5), (["at_s=0"], 0.5), (["at_s=3.96"], 3.5)]
)
def test_short_crops_are_of_the_annotated_moment(short_crops, words, middle_s):
    folder, model, rest = short_crops
    suites.main("boxes", str(folder), words + rest)
    found = results.read(folder / "results_boxes.json")["boxes"]
    assert model.seen == {(1, 100, middle_s)}  # one frame and a second of sound, inside the clip
    if 0.5 < middle_s < 3.5:
        assert found["model"]["pointing"] == 1.0
        assert found["model"]["adaptive"]["mean"] > 0.9
    assert found["n"] == 4


def test_a_map_of_another_time_is_refused(short_crops):
    folder, _, words = short_crops
    with pytest.raises(UserError, match=r"clip-0: the boxes are of 5 s, .* 1\.04 s away"):
        suites.main("boxes", str(folder), ["at_s=5", *words])


def test_a_clip_shorter_than_the_crop_is_not_lengthened():
    batch = next(_moving({name: ViewSpec(modality="audio") for name in ("frames", "sound")}))
    long = dict.fromkeys(batch.views, ViewSpec(modality="audio", crop_s=6.0))
    found = boxes.around(batch, long, np.full(4, 2.0)).views["sound"]
    assert (found.data.shape[1], found.lengths_P.tolist()) == (600, [400] * 4)
    assert (found.data[:, 400:].any(), found.start_s_P.tolist()) == (False, [0.0] * 4)


def test_what_cannot_be_evaluated(run, monkeypatch, batches, knowing_model):
    monkeypatch.setattr(knowing_model, "dense", lambda *_: None)
    monkeypatch.setattr(
        mmssl.eval.load, "load_model", lambda *a, **k: (knowing_model(), _spec(run), None)
    )
    with pytest.raises(UserError, match="no map score"):
        suites.main("boxes", str(run), [])
    for batch in batches:
        batch.meta[:] = [{"duration_s": 2.0} for _ in batch.meta]
    with pytest.raises(UserError, match="give annotations=FILE"):
        suites.main("boxes", str(run), [])


def _spec(run):
    from test_suites import run_spec

    return run_spec(run)


def test_strangers_are_of_another_source_and_class():
    from mmssl.eval.embed import Rows

    rows = Rows(list("abcd"), [1, 1, 2, 3], [0] * 4, [{"class": c} for c in "xyxx"])
    found = boxes.strangers(rows, 0)
    assert found[1] in (2, 3)
    assert found[0] == -1  # the only other class is of the same source
    assert found[2] == found[3] == 1
