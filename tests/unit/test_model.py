"""Laws of the whole model: absent rows, pass sharing, gradients, sub-configurations."""

import pytest
import torch
from small_methods import small
from tiny_run import TREE, absent_rows, gradients, take_rows, tiny_batch, tiny_model, tiny_spec

from mmssl import config
from mmssl.build import build_model
from mmssl.check import SPECIAL, VOCABULARY
from mmssl.specs import RunSpec
from mmssl.types import UserError


def _furthest(a, b):
    """Largest max|difference| / max|gradient| over the tensors."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)) for n in a)


def test_every_parameter_has_a_finite_gradient_and_every_term_reaches_the_trunk():
    model = tiny_model()
    batch = tiny_batch()
    _, grads = gradients(model, batch)
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(g.isfinite().all() for g in grads.values())
    for name in model.tasks:
        alone = tiny_spec(tasks={name: TREE["tasks"][name]})
        trunk = {
            n: g
            for n, g in gradients(tiny_model(alone), batch)[1].items()
            if n.startswith("trunk.")
        }
        assert max(float(g.abs().max()) for g in trunk.values()) > 0, name


def test_appended_absent_rows_change_neither_loss_nor_gradient():
    model = tiny_model(dtype=torch.float64)
    loss, grads = gradients(model, tiny_batch())
    loss_more, grads_more = gradients(model, absent_rows(tiny_batch(), 3))
    assert float(abs(loss - loss_more)) <= 1e-6 * float(loss)
    assert _furthest(grads, grads_more) <= 1e-6


def test_a_batch_without_a_modality_runs_every_module_with_zero_gradient():
    model = tiny_model()
    batch = take_rows(tiny_batch(), [1])  # the row without audio
    assert batch.views["audio"].dummy
    loss, grads = gradients(model, batch)
    assert loss.isfinite()
    assert set(grads) == {n for n, _ in model.named_parameters()}
    audio = [n for n in grads if n.startswith("towers.audio.")]
    assert audio
    assert all(float(grads[n].abs().max()) == 0.0 for n in audio)


def test_text_only_rows_leave_the_video_tokeniser_untouched():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    for name in ("audio", "video"):
        batch.views[name] = take_rows(absent_rows(batch, 6), list(range(6, 12))).views[name]
    _, grads = gradients(model, batch)
    assert all(float(g.abs().max()) == 0.0 for n, g in grads.items() if ".video.stem" in n)
    assert any(float(g.abs().max()) > 0 for n, g in grads.items() if n.startswith("trunk."))


def test_each_view_is_encoded_once_per_mask(monkeypatch):
    model = tiny_model()
    seen = []
    for name, tower in model.towers.items():
        encode = tower.encode
        monkeypatch.setattr(
            tower,
            "encode",
            lambda view, position, mask=None, encode=encode, name=name: (
                seen.append((name, mask.name if mask else "")) or encode(view, position, mask)
            ),
        )
    model(tiny_batch(), 0, 10)
    assert sorted(seen) == sorted(
        [(m, "") for m in ("audio", "video", "text")]
        + [(m, f"masked_{m}") for m in ("audio", "video", "text")]
    )


def test_a_subset_of_the_run_builds_trains_and_loads_the_matching_weights():
    whole = tiny_model()
    tree = {
        **TREE,
        "joints": {},
        "towers": {"audio": TREE["towers"]["audio"]},
        "views": {"audio": TREE["views"]["audio"]},
        "tasks": {"masked_audio": TREE["tasks"]["masked_audio"]},
    }
    part = build_model(RunSpec.model_validate(tree), VOCABULARY, SPECIAL)
    state = whole.state_dict()
    assert set(part.state_dict()) <= set(state)
    part.load_state_dict({n: state[n] for n in part.state_dict()})
    batch = tiny_batch()
    batch.views = {"audio": batch.views["audio"]}
    _, terms = part.train()(batch, 0, 10)
    _, all_terms = whole.train()(tiny_batch(), 0, 10)
    torch.testing.assert_close(terms["masked_audio"], all_terms["masked_audio"])
    assert gradients(part, batch)[0].isfinite()


def test_evaluation_is_deterministic_and_leaves_training_mode():
    model = tiny_model().train()
    batch = tiny_batch()
    first, second = model.embed(batch), model.embed(batch)
    assert model.training
    for key, (vectors, present) in first.items():
        assert torch.equal(vectors, second[key][0])
        assert torch.equal(present, batch.views[key[0]].present_B)
        norms = vectors[present].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    assert model.space_for("audio", "video") == "av"
    assert model.space_for("text", "audio") == "avt"


def test_embeddings_do_not_depend_on_the_rest_of_the_batch():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    whole, alone = model.embed(batch), model.embed(take_rows(batch, [4]))
    for key, (vectors, _) in whole.items():
        torch.testing.assert_close(vectors[4:5], alone[key][0], atol=1e-5, rtol=0)


def test_match_logits_are_those_of_the_chosen_partner():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    own = model.match_logit(batch, torch.arange(6))
    rolled = model.match_logit(batch, torch.arange(6).roll(1))
    assert not torch.allclose(own, rolled)
    swapped = take_rows(batch, list(range(6)))
    audio = take_rows(batch, [5, 0, 1, 2, 3, 4]).views["audio"]
    swapped.views["audio"] = audio
    order = audio.rows_P.argsort()
    audio.data, audio.rows_P = audio.data[order], audio.rows_P[order]
    audio.data = batch.views["audio"].data.roll(1, 0)
    torch.testing.assert_close(model.match_logit(swapped, torch.arange(6)), rolled)


def test_masked_stats_add_up_to_the_loss():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    stats = model.masked_stats(batch)["masked_audio"]
    _, terms = model.eval()(batch, 0, 10)
    term = terms["masked_audio"]
    assert float(stats["error_sum"] / stats["count"]) == pytest.approx(
        float(term.sum / term.count), rel=1e-5
    )
    assert float(stats["cells"]) * len(stats["target_sum"]) == float(stats["count"])


def test_localization_features_cover_the_clip():
    model = tiny_model()
    batch = tiny_batch(missing=False)
    dense = model.dense(batch)
    assert dense.grid == (2, 2, 2)
    assert dense.video.shape == (6, 2, 4, 8)
    # four frames at 4 fps, two per bin: bins are centred on 0.125 s and 0.625 s
    torch.testing.assert_close(dense.times_s[0], torch.tensor([0.125, 0.625]))
    maps = model.score_maps(dense.video, dense.audio, dense.audio_valid)
    assert maps.shape == (6, 2, 4)
    assert float(maps.abs().max()) <= 1 + 1e-6


def test_policy_scales_freezes_and_spares_vectors_from_decay():
    towers = {**TREE["towers"], "audio": {**TREE["towers"]["audio"], "lr_scale": 0.1}}
    towers["video"] = {**TREE["towers"]["video"], "freeze": True}
    shared = {**TREE["shared"], "layer_decay": 0.5, "layers": 2}
    model = tiny_model(tiny_spec(towers=towers, shared=shared))
    policy = model.parameter_policy()
    assert policy["towers.audio.stem.proj.weight"].lr_scale == pytest.approx(0.1)
    assert policy["towers.video.stem.proj.weight"].frozen
    assert not model.get_parameter("towers.video.stem.proj.weight").requires_grad
    blocks = (
        [policy[f"trunk.blocks.{i}.attention.qkv.weight"].lr_scale for i in range(2)]
        if ("trunk.blocks.0.attention.qkv.weight" in policy)
        else [
            next(p.lr_scale for n, p in policy.items() if n.startswith(f"trunk.blocks.{i}."))
            for i in range(2)
        ]
    )
    assert blocks == [0.25, 0.5]
    assert not policy["towers.audio.stem.proj.bias"].decay
    assert not any(p.decay for n, p in policy.items() if ".extra." in n or ".positions." in n)
    assert policy["towers.audio.stem.proj.weight"].decay


def test_decay_does_not_depend_on_the_names_that_users_give():
    spec = small("swav_frames_tiny")
    renamed = spec.model_copy(update={"tasks": {"prototypes": spec.tasks["swav"]}})
    policy = {
        n.removeprefix("tasks.prototypes."): p.decay
        for n, p in tiny_model(renamed).parameter_policy().items()
        if n.startswith("tasks.")
    }
    kept = tiny_model(spec).parameter_policy()
    assert policy == {
        n.removeprefix("tasks.swav."): p.decay for n, p in kept.items() if n.startswith("tasks.")
    }
    assert not policy["prototypes"]
    assert any(policy.values())


def test_gains_of_norms_have_no_decay_whatever_their_shape():
    model = tiny_model(small("lim_tiny"))
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    policy = model.parameter_policy()
    gains = [n for n in policy if n.rsplit(".", 1)[0] in norms]
    assert len(gains) > 4
    assert not any(policy[n].decay for n in gains)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"views": {**TREE["views"], "video": {"modality": "video", "tower": "films"}}},
            "no tower 'films'",
        ),
        (
            {"views": {**TREE["views"], "audio": {"modality": "audio", "hz": 8000, "crop_s": 1}}},
            "sample_rate of towers.audio is 16000",
        ),
        ({"shared": None}, "no `shared` transformer"),
        ({"tasks": {"m": {**TREE["tasks"]["masked_audio"], "view": "sound"}}}, "no view 'sound'"),
        ({"tasks": {"m": {**TREE["tasks"]["masked_text"], "view": "audio"}}}, "needs a text view"),
        (
            {
                "tasks": {
                    "p": {
                        "kind": "pairs",
                        "pairs": {"x": {"between": ["audio", "video"], "score": {"kind": "map"}}},
                    }
                }
            },
            "in this order",
        ),
        (
            {
                "tasks": {
                    "p": {
                        "kind": "pairs",
                        "pairs": {"x": {"between": ["audio", "video"], "space": "zz"}},
                    }
                }
            },
            "no space 'zz'",
        ),
        ({"joints": {}}, "is no joint tower"),
    ],
)
def test_wrong_names_are_refused_with_their_key(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_model(tiny_spec(**changes))


def test_text_towers_need_a_tokenizer():
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        build_model(tiny_spec(), 0)


def test_a_masked_pass_drops_no_tokens():
    """A hidden token that was dropped would be predicted from nothing."""
    towers = {**TREE["towers"], "audio": {**TREE["towers"]["audio"], "drop_tokens": 0.5}}
    tasks = {"masked_audio": TREE["tasks"]["masked_audio"]}
    dropping = tiny_model(tiny_spec(towers=towers, tasks=tasks))
    keeping = tiny_model(tiny_spec(tasks=tasks))
    keeping.load_state_dict(dropping.state_dict())
    assert torch.equal(gradients(dropping, tiny_batch())[0], gradients(keeping, tiny_batch())[0])


@pytest.mark.parametrize("name", ["runs/vq_wav2vec_tiny", "audio/cola"])
def test_activations_of_convolutions_are_not_checkpointed(name):
    with pytest.raises(UserError, match=r"train\.checkpoint_activations.*has none; set false"):
        build_model(config.load(name, ["train.checkpoint_activations=true"]))
