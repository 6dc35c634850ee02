"""`mmssl scoreboard` on made-up tones in the places of FSDD and ESC-10, with a run of two steps."""

import json
import math
import wave as wavefile
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data_tools import make_shards
from mmssl import cli, config, stages
from mmssl.build import build_model
from mmssl.check import fake_batch
from mmssl.data.ordered import eval_batches
from mmssl.eval import board, corpora, results, scoreboard
from mmssl.eval.features import pooled
from mmssl.eval.folds import Labels
from mmssl.eval.layers import GRID, layer_steps, nested
from mmssl.frontends.patches import zero_behind
from mmssl.specs import DataSpec
from mmssl.types import UserError

HZ = 8000
RUN = """
method: audio/apc
name: small
towers:
  audio:
    use: frames_gru_tiny
    frontend: {n_mels: 8}
    cut: {patch: [1, 8]}
    backbone: {width_in: 8, width: 8, layers: 2}
views: {x: {crop_s: 0.2, hz: 8000}}
data: {train: runs/NAME/shards/train, workers: 0, isolate: false}
optim: {lr: 1.0e-3}
train: {steps: 2, batch: 4, threads: 1}
"""


def write_tone(path, tone_hz, seed):
    noise = np.random.default_rng(seed).standard_normal(HZ // 4)
    wave = 0.3 * np.sin(2 * np.pi * tone_hz * np.arange(HZ // 4) / HZ) + 0.02 * noise
    path.parent.mkdir(parents=True, exist_ok=True)
    with wavefile.open(str(path), "wb") as out:
        out.setparams((1, 2, HZ, 0, "NONE", ""))
        out.writeframes(np.round(wave * 32767).astype("<i2").tobytes())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three speakers and folds of three tones; modules run in this process."""
    for digit in range(3):
        for s, speaker in enumerate(("ann", "ben", "cem")):
            for take in (0, 1, 5, 6):
                name = f"fsdd/recordings/{digit}_{speaker}_{take}.wav"
                write_tone(tmp_path / name, 300 * 3**digit * (1 + 0.1 * s), 100 * digit + take)
    for fold in (1, 2, 3):
        for k, name in enumerate(("rain", "rooster")):
            for take in "AB":
                file = tmp_path / "esc10" / name / f"{fold}-{fold}0{k}-{take}.ogg"
                write_tone(file, 500 + 1500 * k, ord(take) + fold)  # a WAV all the same
    (tmp_path / "esc10" / "ATTRIBUTION.md").write_text("not a sound")
    for corpus in corpora.CORPORA.values():
        file = tmp_path / "configs" / "runs" / f"small{corpus.suffix}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(RUN.replace("NAME", corpus.name))
    monkeypatch.chdir(tmp_path)
    mains = {"mmssl.cli": cli.main, "data_tools.make_shards": make_shards.main}
    called = []

    def module(name, *words):
        called.append([name, *words])
        assert mains[name](list(words)) == 0

    monkeypatch.setattr(corpora, "module", module)
    return called


WORDS = ["scoreboard", "--data", ".", "--methods=small", "out=board"]


def test_rows_table_and_picture(data, tmp_path, capsys):
    assert cli.main(WORDS) == 0
    row = results.read(tmp_path / "board" / "fsdd" / "small.json")
    assert (row["run"], row["steps"], row["batch"], row["seed"]) == ("small_tiny", 2, 4, 0)
    assert (row["n"], row["held_out"], len(row["checkpoints"])) == (36, False, 1)
    assert set(row["trained"]["groups"]) == {"ann", "ben", "cem"}
    assert row["random"]["mean"] > 0.5  # even 8 random units hear some difference
    assert results.read(tmp_path / "board" / "fsdd" / "log_mel.json")["trained"]["mean"] == 1.0
    assert 0 <= row["abx"]["trained"] <= row["speaker"]["trained"] <= 1
    assert set(row["trained"]["c"].values()) <= set(GRID)
    units = 3 * 8 * (8 + 8) + 6 * 8  # of a GRU layer that reads 8 and has 8
    assert row["parameters"] == 2 * units
    assert row["minutes"]["training_cpu"] >= 0 < row["minutes"]["training"]
    sounds = results.read(tmp_path / "board" / "esc10" / "small.json")
    assert (sounds["held_out"], len(set(sounds["checkpoints"])), sounds["n"]) == (True, 3, 12)
    assert "abx" not in sounds
    table = (tmp_path / "board" / "scoreboard.md").read_text()
    assert f"| small | {row['trained']['mean']:.3f} [" in table  # not bold: beats nothing
    assert "which hears the test speaker's recordings, too" in table
    assert "one pretraining per fold, which never hears it" in table
    machine = "{processor}, {cores} cores, {device}".format(**row["machine"])
    assert f"Rows by machine: {machine}: 2; torch" in table
    picture = ElementTree.parse(tmp_path / "board" / "scoreboard.svg")
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("small") == 2
    assert "log-mel 1.000" in texts
    assert "fsdd 1/1 small: " in capsys.readouterr().out
    trained = [words for words in data if words[0] == "mmssl.cli"][1:]
    for fold, words in zip("123", trained, strict=True):  # never hears the fold of its test
        (shards,) = (w.removeprefix("data.train=") for w in words if w.startswith("data.train="))
        batches = list(eval_batches(shards, DataSpec(isolate=False), {}, 8, None, workers=0))
        heard = {meta["fold"] for batch in batches for meta in batch.meta}
        assert heard == set("123") - {fold}


def test_what_is_done_stays(data, tmp_path, capsys):
    words = [*WORDS, "sets=fsdd"]
    cli.main(words)
    path = tmp_path / "board" / "fsdd" / "small.json"
    before, count = results.read(path), len(data)
    assert cli.main(words) == 0
    assert len(data) == count
    path.unlink()  # evaluated again, not trained again
    assert cli.main(words) == 0
    assert len(data) == count
    after = results.read(path)
    assert after["trained"] == before["trained"]
    assert after["minutes"]["training"] == before["minutes"]["training"]
    assert cli.main([*words, "seed=1"]) == 2
    assert "was made with seed=0, not 1" in capsys.readouterr().err
    path.unlink()
    (tmp_path / "board" / "fsdd" / "log_mel.json").unlink()
    assert cli.main([*words, "seed=1"]) == 2
    assert "small.done.json was made by `mmssl.cli train small_tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=small"], "name the folder of the data, as --data DIR"),
        (["data=.", "sets=librispeech"], "no set `librispeech`; there are fsdd, esc10"),
        (["data=.", "methods=smal"], "`smal`: no run of that name"),
        (["data=.", "methods=rotnet"], "`rotnet`: it reads video"),
        (["data=.", "methods=mae_audio"], "`mae_audio`: it is made for other sounds (runs/quick"),
        (["data=.", "methods=unispeech"], "`unispeech`: it reads labels of the clips (letters)"),
        (["data=.", "methods=small", "minute=3"], "did you mean `minutes=...`?"),
        (["data=configs", "methods=small"], "needs clips of three or more of the field speaker"),
    ],
)
def test_bad_words(data, capsys, words, message):
    assert cli.main(["scoreboard", *words]) == 2
    assert message in capsys.readouterr().err
    assert data == []


def test_a_failing_module_is_an_error():
    with pytest.raises(UserError, match="no_such_module ended with exit status 1"):
        corpora.module("mmssl.no_such_module")


def test_stages_make_the_labels_of_their_own_row(data, tmp_path):
    found = {entry.name: entry for entry in scoreboard.entries(corpora.CORPORA["fsdd"])[0]}
    first, second = found["hubert_it1"], found["hubert_it2"]
    assert (first.file, first.stage, first.before) == ("hubert", "it1", None)
    assert (second.stage, second.before) == ("it2", first)
    other = found["wavlm_base"]  # another file that begins as that of HuBERT
    assert (other.file, other.folder, other.before) == ("wavlm", "hubert", first)
    options = scoreboard.BoardSpec(data=".", out="board", seed=3)
    one = scoreboard.Board(corpora.CORPORA["fsdd"], options)
    seeds = one.seeds(first)
    assert seeds == ["mfcc.seed=3", "it1.train.seed=3"]
    plan = stages.plan(one.stages_of(first), [*seeds, "shards=s", "out=o"])
    assert [stage.name for stage in plan] == ["mfcc", "it1"]
    whole = stages.plan("hubert", [*seeds, "shards=s", "out=o"])
    assert [s.digest for s in plan] == [s.digest for s in whole[:2]]  # the second row goes on
    theirs = stages.plan(one.stages_of(other), [*one.seeds(other), "shards=s", "out=o"])
    assert [s.digest for s in theirs[:3]] == [
        s.digest for s in stages.plan("hubert", [*one.seeds(second), "shards=s", "out=o"])[:3]
    ]


def test_a_row_is_told_apart_from_the_one_it_starts_from(data, tmp_path, monkeypatch):
    """Minutes of earlier trainings are `before`; stages that two files share are trained once."""
    found = {entry.name: entry for entry in scoreboard.entries(corpora.CORPORA["fsdd"])[0]}
    one = scoreboard.Board(corpora.CORPORA["fsdd"], scoreboard.BoardSpec(data=".", out="board"))
    minutes = {"hubert_it1": 10.0, "hubert_it2": 3.0, "wavlm_base": 4.0}
    asked = {}

    def once(mark, words):
        name = mark.name.removesuffix(".done.json")
        asked.setdefault(name, []).append(words)
        return {"minutes": minutes[name], "cpu_minutes": 2 * minutes[name]}

    monkeypatch.setattr(scoreboard, "once", once)
    folder, cost = one._pretrain(found["hubert_it1"], "")
    assert folder.parts[-2:] == ("hubert", "it1")
    assert cost == {"training": 10, "training_cpu": 20, "before": 0, "before_cpu": 0}
    for name, stage in (("hubert_it2", "it2"), ("wavlm_base", "wavlm")):
        folder, cost = one._pretrain(found[name], "")
        assert folder.parts[-2:] == ("hubert", stage)
        own = minutes[name]
        assert cost == {"training": own, "training_cpu": 2 * own, "before": 10, "before_cpu": 20}
    assert len({tuple(words) for words in asked["hubert_it1"]}) == 1
    identity = one._identity(found["wavlm_base"])["config"]
    file = tmp_path / "configs" / "runs" / "wavlm.yaml"
    file.write_text(config.find("wavlm").read_text().replace("layer: 3", "layer: 2"))
    other = {e.name: e for e in scoreboard.entries(corpora.CORPORA["fsdd"])[0]}["wavlm_base"]
    assert one._identity(other)["config"] != identity  # it starts from other labels


def test_a_run_behind_two_kinds_of_stages_is_refused(data, tmp_path):
    file = tmp_path / "configs" / "runs" / "wavlm.yaml"
    file.write_text(config.find("wavlm").read_text().replace("[50, 200, 500]", "[50, 200, 501]"))
    with pytest.raises(UserError, match="train hubert_it1_tiny behind different"):
        scoreboard.entries(corpora.CORPORA["fsdd"])


def test_minutes_of_a_row():
    spent = {"training": 9.0, "training_cpu": 14.0, "evaluation": 2.0, "evaluation_cpu": 2.0}
    value = {"mean": 0.5, "ci": [0.4, 0.6], "beats": True}
    row = {"method": "m", "trained": value, "random": value, "gain": value, "over_log_mel": value}
    row |= {"parameters": 1e6, "steps": 1, "batch": 2, "minutes": spent}
    assert board._cells(row, False, 10)[-1] == "11.0 (16.0) (!)"
    row["minutes"] = spent | {"before": 30.0, "before_cpu": 40.0}
    assert board._cells(row, False, 15)[-1] == "11.0 (16.0) + 30.0 (40.0)"


# --- the probe


def problem(seed=0):
    """Four groups of 12 clips of three classes: columns of noise and some that tell the class."""
    rng = np.random.default_rng(seed)
    ids = np.tile(np.arange(3), 16)
    groups = np.repeat(list("abcd"), 12)
    noise = rng.standard_normal((48, 8)).astype(np.float32)
    noise[:, :3] = np.eye(3, dtype=np.float32)[ids] + 0.6 * noise[:, :3]
    return noise, ids, groups


def labels_of(ids):
    return Labels(list("xyz"), np.eye(3, dtype=bool)[ids], multi=False)


def test_the_test_group_has_no_say_in_the_choice():
    chosen = set()
    for seed in range(6):
        x_ND, ids, groups = problem(seed)
        plain = nested(x_ND, labels_of(ids), groups)
        turned = np.where(groups == "a", (ids + 1) % 3, ids)
        other = nested(x_ND, labels_of(turned), groups, ["a"])
        assert other.c == {"a": plain.c["a"]}
        assert other.accuracy["a"] < plain.accuracy["a"]
        chosen.add(plain.c["a"])
    assert len(chosen) > 1  # there is a choice


def test_nested_probe_is_that_of_scikit_learn():
    x_ND, ids, groups = problem(1)
    found = nested(x_ND, labels_of(ids), groups)
    x_ND = x_ND.astype(np.float64)

    def accuracy(out, test, c):
        train = ~np.isin(groups, out)
        scale = StandardScaler().fit(x_ND[train])
        model = LogisticRegression(C=c, max_iter=500).fit(scale.transform(x_ND[train]), ids[train])
        rows = groups == test
        return float((model.predict(scale.transform(x_ND[rows])) == ids[rows]).mean())

    for own in "abcd":
        others = [name for name in "abcd" if name != own]

        def inner(c, own=own, others=others):
            return math.fsum(accuracy([own, dev], dev, c) for dev in others) / 3

        c = max(GRID, key=inner)
        assert found.c[own] == c
        assert found.accuracy[own] == accuracy([own], own, c)


def test_difference_beats_only_where_the_interval_is_above_zero():
    base = dict.fromkeys("abcde", 0.5)
    better = board.difference({k: 0.6 for k in base}, base, seed=0)
    assert better["beats"]
    assert better["ci"] == pytest.approx([0.1, 0.1])
    values = dict(zip("abcde", (0.9, 0.4, 0.45, 0.6, 0.4), strict=True))
    mixed = board.difference(values, base, seed=0)
    assert mixed["mean"] > 0 > mixed["ci"][0]
    assert not mixed["beats"]


# --- layers


def tower_and_view(name):
    spec = config.load(name)
    torch.manual_seed(0)
    model = build_model(spec).eval()
    view = next(iter(fake_batch(spec, 2, 0, False).views.values()))
    return model.towers[next(iter(spec.towers))], view


@pytest.mark.parametrize(
    ("name", "count"),
    [("apc_tiny", 3), ("simclr_tiny", 4), ("lim_tiny", 1), ("hubert_it1_tiny", 3)],
)
def test_layers_by_time_step(name, count):
    tower, view = tower_and_view(name)
    with torch.inference_mode():
        layers = layer_steps(tower, view)
        tokens = tower.encode(view, 1.0)
    steps, *cells = tokens.grid
    assert len(layers) == count
    width = int(np.prod(cells)) * tower.width
    for x, pad in layers if name != "simclr_tiny" else layers[-1:]:
        assert pad.shape == (2, steps)
        assert x.shape == (2, steps, width)
    last, _ = layers[-1]
    assert torch.equal(last.reshape(tokens.x_PND.shape), tokens.x_PND)


@pytest.mark.parametrize(
    ("name", "parts"), [("byol_a_tiny", [6, 10, 11]), ("simclr_tiny", [5, 12, 19])]
)
def test_layers_of_a_convolutional_network(name, parts):
    """Its last maps of every stride above 1, those before its poolings, and its output."""
    tower, view = tower_and_view(name)
    frames = tower.inputs(view).shape[2]
    view.lengths_P = torch.tensor([view.data.shape[-1], view.data.shape[-1] // 2])
    with torch.inference_mode():
        *layers, _ = layer_steps(tower, view)
        maps = zero_behind(tower.inputs(view), tower.frames(view))
        expected = {}
        for i, part in enumerate(tower.network.features):
            maps = part(maps)
            expected[i] = maps.clone()  # the next part may work in place
    assert len(layers) == len(parts)
    for (x, pad), i in zip(layers, parts, strict=True):
        side_by_side = expected[i].permute(0, 2, 3, 1).flatten(2)
        assert torch.allclose(x, side_by_side, atol=1e-6)
        share = tower.frames(view)[1].item() / frames
        assert (~pad).sum(1).tolist() == [x.shape[1], pytest.approx(share * x.shape[1], abs=1)]


def test_pooling_of_valid_steps():
    x = torch.tensor([[[1.0], [3.0], [99.0]], [[-5.0], [-2.0], [-2.0]]])
    pad = torch.tensor([[False, False, True], [False, False, False]])
    found = pooled(x, pad, "mean_std_max")
    assert torch.allclose(found, torch.tensor([[2.0, 1.0, 3.0], [-3.0, 2**0.5, -2.0]]))
    empty = pooled(x, torch.ones_like(pad), "mean_std_max")
    assert torch.equal(empty, torch.zeros(2, 3))


def test_rows_name_where_they_come_from(data, tmp_path):
    clips = corpora.read_clips(corpora.CORPORA["fsdd"], tmp_path)
    meta = clips[tmp_path / "fsdd/recordings/2_ben_5.wav"]
    assert meta == {"digit": "2", "speaker": "ben", "index": 5, "letters": "t w o"}
    sounds = corpora.read_clips(corpora.CORPORA["esc10"], tmp_path)
    corpora.make_shards(corpora.CORPORA["esc10"], sounds, tmp_path / "w", "2")
    lines = (tmp_path / "w/shards/without_2.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in lines} == {"100", "101", "300", "301"}
