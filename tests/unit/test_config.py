"""The laws of the configuration: layers, strictness, places of errors, round trip."""

import textwrap
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mmssl import config
from mmssl.specs import Number, Spec
from mmssl.types import UserError
from mmssl.yamlfile import parse_value, read_yaml


class Mel(Spec):
    kind: Literal["mel"]
    hz: int = 16000


class Pixels(Spec):
    kind: Literal["pixels"]


class Trunk(Spec):
    kind: Literal["trunk"]
    width: int = Field(gt=0)
    layers: int = 1


class Net(Spec):
    kind: Literal["net"]


class Single(Spec):
    kind: Literal["single"]
    modality: Literal["audio", "video", "text"]
    frontend: Annotated[Mel | Pixels, Field(discriminator="kind")]
    backbone: Literal["shared"] | Annotated[Trunk | Net, Field(discriminator="kind")] = "shared"
    drop: Number = 0.0


class Joint(Spec):
    kind: Literal["joint"]
    of: list[str]


class View(Spec):
    modality: Literal["audio", "video", "text"]
    crop_s: float = 0.0
    options: list[dict[str, Any]] = []


class Pairs(Spec):
    kind: Literal["pairs"]
    between: tuple[str, str]
    weight: Number = 1.0


class Masked(Spec):
    kind: Literal["masked"]
    view: str


class Data(Spec):
    train: str | dict[str, float] = ""
    val: str = ""
    workers: int = 2


class Train(Spec):
    steps: int = Field(1000, gt=0)
    batch: int = 32


class Optim(Spec):
    lr: float = 1e-3
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.98)
    ema: Number = 0.0


class Run(Spec):
    """A small stand-in for `RunSpec` with every construction that the real one uses."""

    name: str
    paper: str = ""
    shared: Trunk | None = None
    towers: dict[str, Annotated[Single | Joint, Field(discriminator="kind")]]
    views: dict[str, View]
    tasks: dict[str, Annotated[Pairs | Masked, Field(discriminator="kind")]]
    optim: Optim = Optim()
    train: Train = Train()
    data: Data = Data()
    checks: Optim = Field(Optim(), alias="validate")


METHOD = """
name: duo
paper: A paper
towers:
  audio: {use: small, drop: 0.5}
  video: {use: small, modality: video, frontend: {kind: pixels, hz: null}}
views:
  a: {modality: audio, crop_s: 2.0}
  v: {modality: video, crop_s: 2.0}
tasks:
  av: {kind: pairs, between: [a, v]}
  hide: {kind: masked, view: a}
optim: {lr: 1e-3}
validate: {lr: 0.5}
"""
PRESET = """
kind: single
modality: audio
frontend: {kind: mel, hz: 8000}
backbone: {kind: trunk, width: 32, layers: 3}
drop: 0.1
"""
RUN = """
name: first
method: av/duo
data: toys
train: {steps: 7, batch: 4}
"""
TOYS = "train: shards/train\nworkers: 1\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a small configs folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "RunSpec", Run)
    write(tmp_path / "configs/methods/av/duo.yaml", METHOD)
    write(tmp_path / "configs/towers/small.yaml", PRESET)
    write(tmp_path / "configs/runs/first.yaml", RUN)
    write(tmp_path / "configs/data/toys.yaml", TOYS)
    write(tmp_path / "configs/data/other.yaml", "val: elsewhere\n")
    return tmp_path


def refusal(what, *overrides):
    with pytest.raises(UserError) as caught:
        config.load(what, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- layers


def test_layers_win_in_the_documented_order():
    spec = config.load("first", ["train.batch=8"])
    assert (spec.name, spec.paper) == ("first", "A paper")  # run over method; method where alone
    assert (spec.train.steps, spec.train.batch) == (7, 8)  # override over run
    assert spec.towers["audio"].drop == 0.5  # leaf beside `use` over preset
    assert spec.towers["video"].drop == 0.1  # preset
    assert spec.towers["video"].backbone.width == 32
    assert spec.data.train == "shards/train"


def test_override_reaches_into_a_preset():
    spec = config.load("first", ["towers.audio.backbone.width=64", "data.workers=0"])
    assert spec.towers["audio"].backbone.width == 64
    assert spec.towers["video"].backbone.width == 32
    assert (spec.data.workers, spec.data.train) == (0, "shards/train")


def test_another_data_set_by_name_replaces_the_first_wholly():
    spec = config.load("first", ["data.workers=5", "data=other"])
    assert (spec.data.val, spec.data.train, spec.data.workers) == ("elsewhere", "", 2)
    spec = config.load("first", ["data=other", "data.workers=5"])
    assert (spec.data.val, spec.data.workers) == ("elsewhere", 5)


def test_literal_data_needs_no_preset(folder):
    write(folder / "run.yaml", RUN.replace("toys", "{train: {x/y.z: 0.3, w: 0.7}}"))
    assert config.load("run.yaml").data.train == {"x/y.z": 0.3, "w": 0.7}


def test_null_removes_an_entry():
    assert set(config.load("first", ["tasks.hide=null"]).tasks) == {"av"}
    assert config.load("first", ["towers.audio.drop=null"]).towers["audio"].drop == 0


def test_override_changes_method():
    assert "no such name in configs/methods" in refusal("first", "method=av/dou")
    assert config.load("first", ["method=av/duo"]) == config.load("first")


def test_override_of_a_list_entry(folder):
    write(folder / "m.yaml", METHOD.replace("crop_s: 2.0}", "options: [{p: 1}, {q: 2}]}", 1))
    spec = config.load("m.yaml", ["views.a.options.1.q=0.25"])
    assert spec.views["a"].options == [{"p": 1}, {"q": 0.25}]


def test_environment_variable(folder, monkeypatch):
    monkeypatch.setenv("SHARDS", "/somewhere")
    write(folder / "run.yaml", RUN.replace("toys", "{train: '${oc.env:SHARDS}/train'}"))
    assert config.load("run.yaml").data.train == "/somewhere/train"
    monkeypatch.delenv("SHARDS")
    assert "SHARDS" in refusal("run.yaml")


# ---------------------------------------------------------------- lookup


@pytest.mark.parametrize(
    "name", ["av/duo", "configs/methods/av/duo.yaml", "methods/av/duo", "configs/methods/av/duo"]
)
def test_every_spelling_of_a_method_finds_it(name, folder):
    assert config.find(name).samefile(folder / "configs/methods/av/duo.yaml")


def test_path_of_the_source_tree_finds_the_builtin_file(folder, monkeypatch):
    """Outside the clone, too, `configs/...` as printed by `mmssl list` is understood."""
    monkeypatch.setattr(config, "builtin_root", lambda: folder / "configs")
    (folder / "away").mkdir()
    monkeypatch.chdir(folder / "away")
    assert config.find("configs/runs/first.yaml") == folder / "configs/runs/first.yaml"


def test_own_configs_come_before_the_builtin_ones(folder, monkeypatch):
    write(folder / "builtin/towers/small.yaml", "kind: joint\n")
    write(folder / "builtin/towers/large.yaml", "kind: joint\n")
    monkeypatch.setattr(config, "builtin_root", lambda: folder / "builtin")
    assert config.find("small", ("towers",)).parts[0] == "configs"
    assert config.find("large", ("towers",)) == folder / "builtin/towers/large.yaml"
    assert config.names(("towers",)) == ["large", "small"]


def test_unknown_name_lists_the_nearest():
    assert "nearest: first" in refusal("frist")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "train.stps=3",
            "override `train.stps=3`: `train.stps`: unknown key; did you mean `steps`?",
        ),
        ("tain.steps=3", "`tain`: unknown key; did you mean `train`?"),
        ("train.steps=soon", "`train.steps`: must be a valid integer"),
        ("train.steps=0", "`train.steps`: must be greater than 0, found 0"),
        ("tasks.av.kind=pears", "`tasks.av`: unknown kind 'pears'; did you mean `pairs`?"),
        ("views.a.modality=audoi", "did you mean `audio`?"),
        ("towers.audio.drop={kind: linaer}", "`towers.audio.drop.kind`"),
        ("towers.audio.drop=many", "must be a valid number"),
        ("optim.ema={kind: steps}", "`optim.ema`: a `steps` schedule needs `points`"),
        ("towers.audio.backbone.wdth=3", "did you mean `width`?"),
        ("tasks.new={kind: masked}", "`tasks.new.view`: this key is required and missing"),
        ("tasks.new={view: a}", "`tasks.new`: needs a `kind` (valid: masked, pairs)"),
        ("tasks.av.between=[a]", "`tasks.av.between`: too few entries"),
        (
            "towers.audio.use=smal",
            "override `towers.audio.use=smal`: `towers.audio.use`: smal: no such",
        ),
        ("data={use: 3}", "expected a name, found 3"),
        ("train.steps.x=3", "`train.steps`: must be a valid integer"),
    ],
)
def test_refused_override_names_key_problem_and_remedy(change, message):
    text = refusal("first", change)
    assert message in text
    assert change in text.splitlines()[0]


@pytest.mark.parametrize("change", ["steps", "=3", "a..b=3", "train.steps=", "a=[", "a=b: c: d"])
def test_malformed_override(change):
    assert f"override `{change}`" in refusal("first", change)


def test_one_line_per_problem_with_file_and_line(folder):
    path = write(
        folder / "bad.yaml",
        METHOD.replace("crop_s: 2.0}\n  v", "crps: 2.0}\n  v").replace("lr: 1e-3", "lr: fast"),
    )
    lines = refusal(path).splitlines()
    assert lines[0].startswith(f"{path}:7: `views.a.crps`: unknown key; did you mean `crop_s`?")
    assert lines[1].startswith(f"{path}:12: `optim.lr`: must be a valid number")
    assert len(lines) == 2


def test_error_in_a_preset_names_the_preset(folder):
    path = write(folder / "configs/towers/small.yaml", PRESET.replace("layers", "lyers"))
    assert f"{path.relative_to(folder)}:4: `towers.audio.backbone.lyers`" in refusal("first")


def test_presets_do_not_chain(folder):
    write(folder / "configs/towers/small.yaml", "use: other\n")
    assert "configs/towers/small.yaml:1: `use`: a preset cannot use" in refusal("first")
    write(folder / "configs/methods/av/duo.yaml", "method: other\n")
    assert "configs/methods/av/duo.yaml:1: `method`: a method cannot" in refusal("first")


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "2:11", "`c` stands twice (first in line 2)"),
        ("a: 1\nb: [1\n", "3:1", "not valid YAML"),
        ("a: b: c\n", "1:5", "not valid YAML"),
        ("a: &x 1\nb: *x\n", "1:4", "anchors"),
        ("a: 1\n---\nb: 2\n", "2:1", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "1:3", "plain word"),
        ("- 1\n", "", "found a list"),
        ("word\n", "", "found a single value ('word')"),
        ("a: \x07\n", "", "not valid YAML"),
    ],
)
def test_bad_yaml_names_line_and_column(folder, text, place, problem):
    path = write(folder / "bad.yaml", text)
    message = refusal("bad.yaml")
    assert message.startswith(f"{path.name}:{place}")
    assert problem in message


def test_unreadable_file(folder):
    (folder / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml: cannot be read as a text file" in refusal("bad.yaml")


# ---------------------------------------------------------------- scalars and round trip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.5E+3", 1500.0), (".5", 0.5), ("-2.", -2.0), ("1_000", 1000),
        ("true", True), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("~", None), ("null", None), ("''", ""), ("010", 10), ("[1, {a: 2}]", [1, {"a": 2}]),
        (".inf", float("inf")), ("1e", "1e"), ("e3", "e3"), ("'3'", "3"),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text, value):
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_keys_remember_their_lines(folder):
    layer = read_yaml(write(folder / "x.yaml", "a:\n  b: 1\n  c:\n    - d: 2\n"))
    assert layer.lines == {
        (): 0, ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", "0"): 4, ("a", "c", "0", "d"): 4
    }  # fmt: skip


def test_resolved_form_reloads_to_the_same_spec(folder):
    spec = config.load("first", ["optim.eps=1e-12", "towers.audio.drop={kind: cosine, end: 1}"])
    path = folder / "resolved.yaml"
    path.write_text(config.dump(spec))
    again = config.load(path)
    assert again == spec
    assert config.dump(again) == config.dump(spec)
    assert config.digest(again) == config.digest(spec)
    assert list(again.tasks) == list(spec.tasks)  # order of tasks is order of parameters


def test_digest_depends_on_values_not_on_spelling(folder):
    first = config.digest(config.load("first"))
    assert len(first) == 16
    assert first == config.digest(config.load("first", ["train.steps=7", "optim.lr=0.001"]))
    assert first != config.digest(config.load("first", ["train.steps=8"]))


WORDS = [
    "010",
    "018",
    "1e3",
    "1:30",
    "yes",
    "null",
    "~",
    "",
    "1_0",
    "0x1",
    "=",
    "<<",
    ".inf",
    "- a",
]
VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(WORDS),
    st.floats(allow_nan=False),
    st.integers(),
    st.booleans(),
    st.lists(st.floats(allow_nan=False), max_size=3),
)


@given(st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8), VALUES, max_size=4))
def test_options_of_any_content_survive_the_round_trip(tmp_path_factory, options):
    spec = config.load("first")
    view = spec.views["a"].model_copy(update={"options": [options]})
    spec = spec.model_copy(update={"views": {**spec.views, "a": view}})
    path = tmp_path_factory.mktemp("round") / "resolved.yaml"
    path.write_text(config.dump(spec), encoding="utf-8", newline="")
    assert config.load(path) == spec
