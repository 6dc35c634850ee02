"""Languages are drawn in proportion to their size to a power."""

import json
import shutil

import pytest
import torch
import yaml

from data_tools.make_shards import make_shards
from mmssl import config
from mmssl.data.blend import temperature_weights, train_weights
from mmssl.data.loader import train_loader
from mmssl.rng import seed_of
from mmssl.specs import DataSpec, ViewSpec
from mmssl.types import UserError

SIZES = {"en": 1000, "sw": 10}


@pytest.mark.parametrize(("alpha", "small"), [(0.5, 1 / 11), (1.0, 10 / 1010), (0.0, 0.5)])
def test_shares_are_those_of_the_formula(alpha, small):
    shares = temperature_weights(SIZES, alpha)
    assert shares["sw"] == pytest.approx(small, abs=1e-12)
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """1000 and 10 captions in shards of their own."""
    root = tmp_path_factory.mktemp("languages")
    for name, count in SIZES.items():
        rows = [{"caption": f"{name} {i}", "source": f"{name}-{i}"} for i in range(count)]
        manifest = root / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        make_shards(manifest, root / name)
    return {name: str(root / name) for name in SIZES}


@pytest.mark.parametrize(("alpha", "small"), [(0.5, 1 / 11), (1.0, 10 / 1010), (0.0, 0.5)])
def test_sizes_are_read_from_the_shards(languages, alpha, small):
    shares = train_weights(DataSpec(train=list(languages.values()), alpha=alpha))
    assert list(shares) == list(languages.values())
    assert shares[languages["sw"]] == pytest.approx(small, abs=1e-12)


def test_given_weights_stand_for_the_sizes(languages):
    hours = {languages["en"]: 900.0, languages["sw"]: 100.0}
    assert list(train_weights(DataSpec(train=hours)).values()) == pytest.approx([0.9, 0.1])
    tempered = train_weights(DataSpec(train=hours, alpha=0.5))
    assert list(tempered.values()) == pytest.approx([0.75, 0.25])


def test_the_loader_draws_a_small_language_as_often_as_asked(languages, tokenizer):
    data = DataSpec(train=list(languages.values()), alpha=0.5, workers=0)
    views = {"text": ViewSpec(modality="text", length=4)}
    loader = train_loader(data, views, 100, 0, 0, 1, tokenizer)
    drawn = torch.cat([next(loader).source_B for _ in range(25)])
    loader.close()
    small = torch.tensor([seed_of("source", f"sw-{i}") for i in range(SIZES["sw"])])
    share = float(torch.isin(drawn, small).float().mean())
    # standard deviation of 2500 draws: 0.0057
    assert share == pytest.approx(1 / 11, abs=0.02)


def test_a_named_data_set_blends_several_folders(languages, tokenizer, tmp_path, monkeypatch):
    """The example's three folders with their weights 5, 3 and 2, all the way from the file."""
    example = config.builtin_root() / "data" / "blend.yaml"
    known = yaml.safe_load(example.read_text())["train"]
    assert list(known.values()) == [5, 3, 2]
    places = []
    for k in range(3):
        rows = [{"caption": f"{k} {i}", "source": f"set-{k}"} for i in range(10 + 30 * k)]
        (tmp_path / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        make_shards(tmp_path / f"{k}.jsonl", tmp_path / f"s{k}")
        places.append(f"file://{tmp_path}/s{k}" if k == 2 else str(tmp_path / f"s{k}"))
    text = example.read_text()
    for name, place in zip(known, places, strict=True):
        text = text.replace(f"  {name}:", f"  {place}:")
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "mine.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    data = config.load("avt/flagship", ["data=mine", "data.workers=0"]).data
    assert train_weights(data) == pytest.approx(
        dict(zip(places, (0.5, 0.3, 0.2), strict=True)), abs=1e-12
    )
    loader = train_loader(
        data, {"text": ViewSpec(modality="text", length=4)}, 100, 0, 0, 1, tokenizer
    )
    drawn = torch.cat([next(loader).source_B for _ in range(20)])
    loader.close()
    shares = [float((drawn == seed_of("source", f"set-{k}")).float().mean()) for k in range(3)]
    # standard deviation of 2000 draws: at most 0.011
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.035)


def test_another_alpha_is_another_data_order(languages, tokenizer):
    views = {"text": ViewSpec(modality="text", length=4)}

    def loader(alpha):
        data = DataSpec(train=list(languages.values()), alpha=alpha, workers=0)
        return train_loader(data, views, 4, 0, 0, 1, tokenizer)

    first, other = loader(0.5), loader(0.6)
    next(first)
    with pytest.raises(UserError, match="other shards or blend weights"):
        other.restore(first.state())
    first.close()


def test_bad_folders_are_named(languages, tmp_path):
    en = languages["en"]
    with pytest.raises(UserError, match="is named twice"):
        train_weights(DataSpec(train=[en, en]))
    with pytest.raises(UserError, match=r"data\.train is empty"):
        train_weights(DataSpec(train=[]))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"data\.train: the weight of .*en is {wrong}"):
            train_weights(DataSpec(train={en: wrong, languages["sw"]: 1.0}))
    with pytest.raises(UserError, match="nowhere: no such shard folder"):
        train_weights(DataSpec(train={en: 1.0, "nowhere": 1.0}))
    shutil.copytree(en, tmp_path / "bare")
    (tmp_path / "bare" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"bare: no manifest\.json"):
        train_weights(DataSpec(train=[en, str(tmp_path / "bare")]))


def test_the_method_asks_for_one_half():
    spec = config.load("speech/xlsr", ["data.train=[shards/en, shards/sw]"])
    assert (spec.data.train, spec.data.alpha) == (["shards/en", "shards/sw"], 0.5)
