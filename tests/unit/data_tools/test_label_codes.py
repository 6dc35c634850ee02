"""Codes of a quantiser as labels, and the model that reads them."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_label_shards import HZ, SCORES, write_tones

from data_tools import label_features, label_shards
from data_tools.label_codes import CodeBook, observe
from data_tools.label_features import TowerCodes, frame_source
from mmssl import config
from mmssl.build import build_model
from mmssl.data.labels import LabelBook
from mmssl.data.loader import train_loader
from mmssl.data.ordered import eval_batches
from mmssl.data.sidecars import SideCar, Source
from mmssl.specs import CodesSpec, DataSpec, LabellingSpec
from mmssl.types import UserError

SOURCE = Source("run/audio/codes", 100.0)
SMALL = (
    "towers.audio.cut.channels=16",
    "towers.audio.backbone.width=16",
    "towers.audio.backbone.kernels=[2]",
    "towers.audio.quantizer.width=16",
    "towers.audio.quantizer.hidden=32",
    "towers.audio.quantizer.entries=4",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("codes") / "train", SCORES)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(config.load("speech/vq_wav2vec", SMALL)).eval()


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """A run folder as far as features look at it."""
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    monkeypatch.setattr(label_features, "load_model", lambda _: (model, model.spec, None))
    monkeypatch.setattr(label_features.checkpoint, "find", lambda *_: tmp_path)
    return tmp_path


def options(run, **changes):
    return LabellingSpec(**{"features": str(run), "codes": 16, "fit_share": 1.0, **changes})


# ---------------------------------------------------------------- tuples


def test_the_most_frequent_tuples_have_classes_and_the_rest_share_one():
    parts = [np.array([[1, 2], [0, 3], [1, 2]]), np.array([[3, 0], [0, 3], [1, 2], [2, 2]])]
    book = observe(parts, 3, SOURCE)
    assert book.tuples_KG.tolist() == [[1, 2], [0, 3], [2, 2]]  # of equal ones the smaller
    assert (book.count, book.covered) == (4, pytest.approx(6 / 7))
    assert book.assign(np.array([[2, 2], [3, 0], [1, 2], [0, 0]])).tolist() == [2, 3, 0, 3]
    wide = observe(parts, 100, SOURCE)
    assert (len(wide.tuples_KG), wide.count, wide.covered) == (4, 101, 1.0)
    assert wide.assign(np.array([[0, 0]])).tolist() == [100]
    with pytest.raises(UserError, match="no codes were observed"):
        observe([], 3, SOURCE)


def test_a_table_comes_back_as_it_was(tmp_path):
    book = observe([np.array([[1, 2], [0, 3], [1, 2]])], 2, SOURCE)
    book.save(tmp_path / "a")
    again = CodeBook.load(tmp_path / "a")
    assert (again.room, again.source, again.covered) == (2, SOURCE, 1.0)
    assert (again.digest, again.tuples_KG.tolist()) == (book.digest, [[1, 2], [0, 3]])
    save_file({"tuples": torch.zeros(1)}, tmp_path / "b")
    (tmp_path / "c").write_text("x")
    for name, message in (("b", "the format is None"), ("c", "not a table"), ("d", "no such")):
        with pytest.raises(UserError, match=message):
            CodeBook.load(tmp_path / name)


# ---------------------------------------------------------------- side-cars


def test_codes_of_a_run_become_labels(run, model, shards, tmp_path):
    made = label_shards.label_shards(shards, tmp_path / "l", options(run))
    car, (book,) = SideCar(tmp_path / "l"), made.codebooks
    assert made.kmeans[0].name == "l.codes-16.safetensors"
    assert car.info.source.features == "vq_wav2vec/audio/codes"
    assert (car.info.rate_hz, car.info.classes) == (100.0, (17,))
    assert car.info.source.first_centre_s == pytest.approx(232 / HZ)
    views = {"x": model.spec.views["x"].model_copy(update={"crop_s": 0.0})}
    for batch in eval_batches(shards, DataSpec(), views, 1, None, workers=0):
        with torch.inference_mode():
            codes = model.passes(batch).tokens("x").codes.ids_PNG[0]
        labels = car.ids(batch.keys[0])[:, 0]
        assert len(labels) == (batch.views["x"].data.shape[1] - 465) // 160 + 1
        assert labels.tolist() == book.assign(codes.numpy()).tolist()
        assert [tuple(book.tuples_KG[k]) for k in labels] == [tuple(c) for c in codes.tolist()]


def test_a_table_labels_other_shards_with_the_same_classes(run, shards, tmp_path):
    made = label_shards.label_shards(shards, tmp_path / "l", options(run))
    other = write_tones(tmp_path / "other", [[2, 1]])
    again = label_shards.label_shards(other, tmp_path / "l2", options(run, kmeans=made.kmeans))
    first, second = SideCar(tmp_path / "l").info, SideCar(tmp_path / "l2").info
    assert (first.classes, first.codebooks) == (second.classes, second.codebooks)
    assert again.kmeans == made.kmeans


def test_what_has_no_codes_is_refused(run, model, shards, tmp_path):
    for features, given, message in (
        ("mfcc", {}, "--features mfcc has no --layer, --tower and --codes"),
        (str(run), {"layer": 1}, "--codes are those of the tower's quantiser; leave --layer out"),
    ):
        with pytest.raises(UserError, match=message):
            frame_source(features, codes=True, **given)
    assert label_shards.main([str(shards), str(tmp_path / "l"), "--codes", "-1"]) == 2
    model.towers["audio"].quantizer = None
    with pytest.raises(UserError, match="--codes: the tower audio has no quantiser"):
        TowerCodes(run)


# ---------------------------------------------------------------- views of codes


@pytest.fixture
def car(run, shards, tmp_path):
    label_shards.label_shards(shards, tmp_path / "l", options(run))
    return tmp_path / "l"


def coded(*overrides):
    sizes = ("towers.audio.cut.places=64", "views.x.crop_s=0.5", "views.x.codes.classes=17")
    backbone = [f"towers.audio.backbone.{k}" for k in ("width=16", "layers=1", "head_size=8")]
    return config.load("speech/vq_wav2vec_bert", [*sizes, *backbone, *overrides])


def test_a_view_holds_the_labels_of_its_cut(shards, car):
    spec, stored = coded(), SideCar(car)
    data = DataSpec(train=str(shards), frame_labels={"codes": str(car)}, workers=0)
    loader = train_loader(data, spec.views, 3, 0, 0, 1, None)
    starts = set()
    for _ in range(6):
        batch = next(loader)
        view = batch.views["x"]
        assert (view.data.dtype, view.data.shape, view.rate) == (torch.int64, (3, 50), 100.0)
        for row, key in enumerate(batch.keys):
            first = round(float(view.start_s_P[row]) * 100)
            labels = stored.ids(key)[first : first + 50, 0].astype(np.int64) + 2
            length = int(view.lengths_P[row])
            assert view.data[row, :length].tolist() == labels.tolist()
            assert not view.data[row, length:].any()
            starts.add(first)
    assert len(starts) > 6


def test_a_padded_row_of_codes_equals_itself_alone(shards, car):
    spec = coded("views.x.crop_s=0.64")
    data = DataSpec(train=str(shards), frame_labels={"codes": str(car)}, workers=0)
    torch.manual_seed(0)
    model = build_model(spec).eval()
    batch = next(eval_batches(shards, data, spec.views, 5, None, workers=0))
    view = batch.views["x"]
    view.lengths_P[1] = 20
    tokens = model.passes(batch).tokens("x")
    again = next(eval_batches(shards, data, spec.views, 5, None, workers=0))
    again.views["x"].data = view.data[:, :20]
    again.views["x"].lengths_P = torch.full((5,), 20)
    alone = model.passes(again).tokens("x")
    torch.testing.assert_close(tokens.x_PND[1, :20], alone.x_PND[1])
    assert tokens.pad_PN[1].tolist() == [False] * 20 + [True] * (len(tokens.pad_PN[1]) - 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": CodesSpec(labels="y", classes=17)}, r"views\.x\.codes\.labels: .* 'y'"),
        ({"codes": CodesSpec(labels="codes", classes=9)}, r"codes\.classes: 9, but .* \(17,\)"),
        ({"hz": 50}, r"views\.x\.hz: 50, but .* holds 100 labels per second"),
    ],
)
def test_labels_that_a_view_cannot_hold(shards, car, changes, message):
    book = LabelBook.open({"codes": str(car)}, [shards], required=True)
    view = coded().views["x"].model_copy(update=changes)
    with pytest.raises(UserError, match=message):
        book.check_codes("views.x", view.codes, view.hz)
    data = DataSpec(train=str(shards), frame_labels={"codes": str(car)}, workers=0)
    with pytest.raises(UserError, match=message):
        train_loader(data, {"x": view}, 2, 0, 0, 1, None)


# ---------------------------------------------------------------- the file


def test_zero_heads_cost_ln_of_the_vocabulary():
    from mmssl.check import fake_batch

    for classes in (17, 13501):
        spec = coded(f"views.x.codes.classes={classes}")
        model = build_model(spec, 64, {"pad": 0})  # of a tokenizer, which is not theirs
        head = model.tasks["mlm"].target.head
        with torch.no_grad():
            head.dense.weight.zero_()
            head.dense.bias.zero_()
        _, terms = model(fake_batch(spec, 4, missing=False), 0, 10)
        value = float(terms["mlm"].sum / terms["mlm"].count)
        assert value == pytest.approx(math.log(classes + 2), abs=1e-4)


def test_two_fifths_are_hidden_in_spans_of_ten_and_altered():
    from mmssl.check import fake_batch

    spec = coded("views.x.crop_s=5.12", "towers.audio.cut.places=512")
    model = build_model(spec)
    batch = fake_batch(spec, 200, missing=False)
    task, view = model.tasks["mlm"], batch.views["x"]
    hidden = task._hidden(model.towers["audio"], view, 0.0)
    assert float(hidden.float().mean()) == pytest.approx(1 - 0.95**10, abs=0.01)
    read = task.target.altered(model.towers["audio"], view, hidden)
    assert torch.equal(read[~hidden], view.data[~hidden])
    assert float((read[hidden] == 1).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert int(read.min()) >= 1  # padding is never drawn


def test_the_size_of_bert_base():
    with torch.device("meta"):
        model = build_model(config.load("speech/vq_wav2vec_bert"))
    layers = 12 * (4 * 768**2 + 2 * 768 * 3072 + 9 * 768 + 3072)
    tables = (13503 + 2048) * 768 + 2 * 768
    head = 768**2 + 3 * 768 + 13503
    assert sum(p.numel() for p in model.parameters()) == layers + tables + head


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.x.codes=null", r"views\.x: the front-end of tower 'audio' reads ids"),
        (
            "views.y={modality: audio, hz: 100, crop_s: 1.0, codes: {labels: z, classes: 5}}",
            r"views\.y\.codes: another view of tower 'audio' has other codes",
        ),
    ],
)
def test_views_and_towers_that_do_not_fit(override, message):
    with pytest.raises(UserError, match=message):
        build_model(coded(override))


@pytest.mark.parametrize("key", ["normalize=true", "mix={probability: 0.5}", "modality=text"])
def test_codes_are_no_signal(key):
    with pytest.raises(UserError, match="`codes` need an audio view without"):
        coded(f"views.x.{key}")
