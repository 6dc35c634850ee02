"""`init`, `freeze`, `lr_scale` and `layer_decay`: how the parts of a run start and learn."""

import pytest
import torch
from safetensors.torch import save_file
from small_methods import small, small_model
from tiny_run import TREE, gradients, tiny_batch, tiny_model, tiny_spec

from mmssl.train.commit import commit
from mmssl.train.start import load_start_weights
from mmssl.types import UserError


@pytest.fixture
def source():
    """A model with other weights than `tiny_model()`."""
    return tiny_model(seed=7)


@pytest.fixture
def weights(source, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    return str(path)


def with_init(**paths):
    """The tiny run whose named parts start from files."""
    towers = {n: {**t, "init": paths.get(n, "")} for n, t in TREE["towers"].items()}
    shared = {**TREE["shared"], "init": paths.get("shared", "")}
    joints = {"av": {**TREE["joints"]["av"], "init": paths.get("av", "")}}
    return tiny_spec(towers=towers, shared=shared, joints=joints)


PREFIX = {"audio": "towers.audio.", "shared": "trunk.", "av": "joints.av."}


@pytest.mark.parametrize("part", PREFIX)
def test_a_part_takes_its_weights_and_the_rest_stays(part, source, weights):
    spec = with_init(**{part: weights})
    model, fresh, theirs = tiny_model(spec), tiny_model(spec).state_dict(), source.state_dict()
    loaded = load_start_weights(model, spec)
    ours = model.state_dict()
    assert loaded == [n for n in ours if n.startswith(PREFIX[part])]
    assert loaded
    for name, value in ours.items():
        assert torch.equal(value, (theirs if name in loaded else fresh)[name]), name


def test_without_init_nothing_is_read():
    spec = tiny_spec()
    assert load_start_weights(tiny_model(spec), spec) == []


def test_a_run_that_starts_from_all_parts_encodes_like_its_source(source, weights):
    spec = with_init(audio=weights, video=weights, text=weights, shared=weights, av=weights)
    model = tiny_model(spec)
    load_start_weights(model, spec)
    batch = tiny_batch()
    for view in batch.views:
        ours = model.eval().passes(batch).tokens(view).x_PND
        assert torch.equal(ours, source.eval().passes(batch).tokens(view).x_PND)


def checkpoint(folder, **files):
    """A complete checkpoint folder of a run with these weight files."""

    def write(writer):
        for name, state in files.items():
            writer.tensors(f"{name}.safetensors", state, "")

    commit(folder / "checkpoints" / "step-00000001", write, {"step": 1})
    return str(folder)


def test_a_run_folder_gives_its_averaged_weights_and_else_its_trained_ones(tmp_path):
    trained, averaged = tiny_model(seed=1).state_dict(), tiny_model(seed=2).state_dict()
    name = "towers.audio.stem.proj.weight"
    for folder, files, want in (
        ("both", {"weights": trained, "ema": averaged}, averaged),
        ("one", {"weights": trained}, trained),
    ):
        run = checkpoint(tmp_path / folder, **files)
        spec = with_init(audio=run)
        model = tiny_model(spec)
        load_start_weights(model, spec)
        assert torch.equal(model.state_dict()[name], want[name])


# ---------------------------------------------------------------- errors


def test_a_missing_path_is_named_with_its_key():
    spec = with_init(audio="nowhere.safetensors")
    with pytest.raises(UserError, match=r"towers\.audio\.init: nowhere\.safetensors: no such file"):
        load_start_weights(tiny_model(spec), spec)
    spec = with_init(av="no/run")
    with pytest.raises(UserError, match=r"joints\.av\.init: no/run: no complete checkpoint"):
        load_start_weights(tiny_model(spec), spec)


def test_missing_tensors_are_named_with_key_and_path(source, tmp_path):
    state = {n: t for n, t in source.state_dict().items() if "video.stem" not in n}
    path = str(tmp_path / "part.safetensors")
    save_file(state, path)
    spec = with_init(video=path)
    with pytest.raises(
        UserError, match=r"towers\.video\.init: .*part\.safetensors lacks towers\.video\.stem"
    ):
        load_start_weights(tiny_model(spec), spec)


def test_tensors_of_another_shape_are_named_with_both_shapes(weights):
    wider = {**TREE["shared"], "hidden": 48, "init": weights}
    spec = tiny_spec(shared=wider)
    with pytest.raises(
        UserError,
        match=r"shared\.init: trunk\.\S+ has shape \(32, 16\) in .* and \(48, 16\) in this run",
    ):
        load_start_weights(tiny_model(spec), spec)


def test_a_tower_of_another_name_is_not_mistaken(source, tmp_path):
    state = {n.replace("towers.audio.", "towers.ears."): t for n, t in source.state_dict().items()}
    path = str(tmp_path / "ears.safetensors")
    save_file(state, path)
    spec = with_init(audio=path)
    with pytest.raises(UserError, match=r"towers\.audio\.init: .* lacks towers\.audio"):
        load_start_weights(tiny_model(spec), spec)


# ---------------------------------------------------------------- freeze, lr_scale, layer_decay


def test_a_frozen_part_gets_no_gradient_and_the_rest_does():
    towers = {**TREE["towers"], "video": {**TREE["towers"]["video"], "freeze": True}}
    model = tiny_model(tiny_spec(towers=towers))
    _, grads = gradients(model, tiny_batch())
    frozen = {n for n, p in model.named_parameters() if n.startswith("towers.video.")}
    assert frozen
    assert set(grads) == {n for n, _ in model.named_parameters()} - frozen
    assert {n for n, p in model.parameter_policy().items() if p.frozen} == frozen


def test_a_frozen_trunk_leaves_the_towers_trainable():
    model = tiny_model(tiny_spec(shared={**TREE["shared"], "freeze": True}))
    _, grads = gradients(model, tiny_batch())
    assert not any(n.startswith("trunk.") for n in grads)
    assert float(grads["towers.audio.stem.proj.weight"].abs().max()) > 0


def test_layers_learn_the_slower_the_deeper_they_lie():
    spec = small(
        "avt/vatt_mbs",
        "towers.video.backbone.layers=3",
        "towers.video.layer_decay=0.5",
        "towers.video.lr_scale=0.8",
    )
    policy = small_model(spec).parameter_policy()
    scale = {n.removeprefix("towers.video."): p.lr_scale for n, p in policy.items()}
    top = scale["own_trunk.norm.parts.shared.weight"]
    blocks = [scale[f"own_trunk.blocks.{i}.norm1.parts.shared.weight"] for i in range(3)]
    assert [top, *reversed(blocks)] == pytest.approx([0.8, 0.4, 0.2, 0.1])
    # what lies below the layers is the deepest, the norm of the positions as well
    for name in (
        "stem.proj.weight",
        "positions.axis0",
        "positions.norm.weight",
        "extra.globals_GD",
    ):
        assert scale[name] == pytest.approx(0.05), name
    assert {p.lr_scale for n, p in policy.items() if not n.startswith("towers.video.")} == {1.0}


def test_a_projection_behind_the_layers_is_on_top():
    spec = small("avt/vatt_ma", "towers.audio.layer_decay=0.5", "shared.layer_decay=0.5")
    policy = small_model(spec).parameter_policy()
    assert policy["towers.audio.post.linear.weight"].lr_scale == 1.0
    assert policy["towers.audio.pre.linear.weight"].lr_scale == 0.5
    assert policy["trunk.norm.parts.shared.weight"].lr_scale == 1.0
    assert policy["trunk.blocks.0.attention.qkv.weight"].lr_scale == 0.5


def test_norms_inside_a_stem_are_below_the_layers():
    towers = {**TREE["towers"], "audio": {**TREE["towers"]["audio"], "layer_decay": 0.5}}
    policy = tiny_model(tiny_spec(towers=towers)).parameter_policy()
    norms = [n for n in policy if n.startswith("towers.audio.stem.") and ".norm" in n]
    assert norms
    assert {policy[n].lr_scale for n in norms} == {0.5}
