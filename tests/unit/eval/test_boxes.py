"""Still maps against boxes: readers of annotations, the suite, its baselines and its decision."""

import json

import numpy as np
import pytest
import torch

import mmssl.data.ordered
import mmssl.eval.load
from mmssl.eval import boxes, ciou, results, suites
from mmssl.eval.annotations import read_annotations
from mmssl.specs import DataSpec
from mmssl.types import UserError


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


def test_annotations_that_cannot_be_read(tmp_path):
    for name, text, message in (
        ("a.json", "{}}", "not a file of VGG-SS"),
        ("b.json", '[{"file": "x"}]', "not a file of VGG-SS"),
        ("c.json", '[{"file": "x", "bbox": [[1, 2, 3]]}]', "x: a box needs four numbers"),
        ("d.json", '[{"file": "x", "bbox": [[1, 2, 300, 4]]}]', "x: boxes far beyond the picture"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read_annotations(tmp_path / name)
    with pytest.raises(UserError, match="no such file or folder"):
        read_annotations(tmp_path / "none.json")
    (tmp_path / "xml").mkdir()
    with pytest.raises(UserError, match="holds no XML file"):
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
    with pytest.raises(UserError, match="by another field than name=class"):
        suites.main("boxes", str(run), [*words, "name=class"])


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
