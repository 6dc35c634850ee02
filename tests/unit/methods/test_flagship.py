"""The flagship as its file has it, and its literal sub-configurations at their real size."""

import pytest
import torch
from safetensors.torch import save_file
from small_methods import full_batch, small, small_model
from tiny_run import gradients

from mmssl import check, config
from mmssl.check import fake_batch
from mmssl.tasks.base import Task
from mmssl.train.start import load_start_weights
from mmssl.types import UserError

NAME = "avt/flagship"
SHORT = ["views.video.crop_s=1", "views.video.size=64", "views.audio.crop_s=1"]


def without(*entries: str) -> list[str]:
    return [f"{entry}=null" for entry in entries]


def only_tasks(*kept: str) -> list[str]:
    return without(*(f"tasks.{t}" for t in config.load(NAME).tasks if t not in kept))


def only_pairs(*kept: str) -> list[str]:
    pairs = config.load(NAME).tasks["align"].pairs
    return without(*(f"tasks.align.pairs.{p}" for p in pairs if p not in kept))


def only_towers(*kept: str) -> list[str]:
    gone = {"audio", "video", "text"} - set(kept)
    return without(*(f"{part}.{m}" for m in sorted(gone) for part in ("towers", "views")))


PARTS = {
    "audio": [*only_towers("audio"), *only_tasks("masked_audio")],
    "video": [*only_towers("video"), *only_tasks("masked_video")],
    "audio_text": [
        *only_towers("audio", "text"),
        *only_tasks("align", "masked_audio", "masked_text"),
        *only_pairs("at"),
    ],
    "audio_video": [
        *only_towers("audio", "video"),
        *only_tasks("align", "match", "masked_video"),
        *only_pairs("va", "where"),
    ],
}


@pytest.fixture(scope="module")
def whole():
    """All towers and tasks at their published widths and depths, on short views."""
    return small_model(config.load(NAME, SHORT), seed=3)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_builds_trains_and_loads_the_matching_weights(part, whole):
    masked = [n for n in config.load(NAME, PARTS[part]).tasks if n.startswith("masked")]
    everyone = [f"tasks.{name}.rows=1" for name in masked]  # in a batch of four
    spec = config.load(NAME, [*SHORT, *PARTS[part], *everyone])
    model = small_model(spec)
    theirs, ours = whole.state_dict(), model.state_dict()
    assert set(ours) <= set(theirs)
    assert set(ours) != set(theirs)
    model.load_state_dict({n: theirs[n] for n in ours})
    batch = fake_batch(spec, 4)
    with torch.no_grad():  # the same parts say the same
        for view in batch.views:
            got = model.eval().passes(batch).tokens(view).x_PND
            assert torch.equal(got, whole.eval().passes(batch).tokens(view).x_PND)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss, grads = gradients(model, batch)
    assert bool(loss.isfinite())
    assert set(grads) == set(before)  # nothing is left over that no loss reads
    optimiser.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)


def test_a_part_can_start_from_a_checkpoint_of_the_whole(whole, tmp_path):
    path = str(tmp_path / "flagship.safetensors")
    save_file(whole.state_dict(), path)
    init = [f"towers.audio.init={path}", f"shared.init={path}"]
    spec = config.load(NAME, [*SHORT, *PARTS["audio"], *init])
    model = small_model(spec)
    loaded = load_start_weights(model, spec)
    rest = {n for n in model.state_dict() if n not in loaded}
    assert all(n.startswith("tasks.masked_audio.") for n in rest)
    for name in loaded:
        assert torch.equal(model.state_dict()[name], whole.state_dict()[name])


def test_a_part_passes_the_check(capsys):
    check.check(NAME, [*SHORT, *PARTS["audio"]])
    assert "every parameter is used" in capsys.readouterr().out


def test_a_part_that_leaves_weights_idle_is_refused_by_the_check():
    """The map reads the video before the backbone: alone, it would leave that unused."""
    alone = [
        *SHORT,
        *only_towers("audio", "video"),
        *only_tasks("align"),
        *only_pairs("where"),
    ]
    with pytest.raises(UserError, match=r"unused parameters .*towers\.video"):
        check.check(NAME, alone)
    check.check(NAME, [*alone, "tasks.align.pairs.where.score.cells=backbone"])


# ---------------------------------------------------------------- the whole


def test_each_modality_is_encoded_at_most_twice():
    model = small_model(small(NAME)).train()
    passes = model.passes(full_batch(model.spec, 4), 0.0)
    for task in model.tasks.values():
        task(passes, passes.batch)
    views = [view for view, _ in passes._done]
    assert all(views.count(view) <= 2 for view in model.spec.views)
    assert set(views) == set(model.spec.views)


def test_every_term_sends_a_gradient_to_the_shared_transformer():
    model = small_model(small(NAME)).train()
    batch = full_batch(model.spec, 6)
    passes = model.passes(batch, 0.0)
    trunk = list(model.trunk.parameters())
    for name, task in model.tasks.items():
        assert isinstance(task, Task)
        task.rows = 1.0  # of a masked task: all rows of this small batch take part
        for key, term in task(passes, batch).items():
            grads = torch.autograd.grad(term.sum, trunk, retain_graph=True, allow_unused=True)
            largest = max(float(g.abs().max()) for g in grads if g is not None)
            assert largest > 0, f"{name}.{key}"


def test_masked_video_hides_tubes():
    """The small runs read motion, which compares frames: only whole tubes are safe to hide."""
    spec = config.load(NAME)
    assert spec.tasks["masked_video"].mask.rule == "tubes"


def test_all_directions_of_retrieval_and_localization_have_a_space():
    model = small_model(small(NAME))
    pairs = [("audio", "video"), ("video", "text"), ("audio", "text")]
    assert all(model.space_for(a, b) for a, b in pairs)
    batch = full_batch(model.spec, 3)
    assert {m for m, _ in model.embed(batch)} == {"audio", "video", "text"}
    dense = model.dense(batch)
    maps = model.score_maps(dense.video, dense.audio, dense.audio_valid)
    assert maps.shape == dense.video.shape[:3]
    assert model.match_logit(batch, torch.arange(3)).shape == (3,)
    assert set(model.masked_stats(batch)) == {"masked_audio", "masked_video", "masked_text"}
