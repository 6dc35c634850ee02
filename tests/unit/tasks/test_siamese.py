"""The siamese task: what is a constant, what moves, and two views of any modalities."""

import math
from dataclasses import replace

import pytest
import torch
from small_methods import full_batch, small, small_model, values
from tiny_run import TREE, absent_rows, gradients, take_rows, tiny_model, tiny_spec
from torch.nn import functional as F

from mmssl import config
from mmssl.types import UserError

HEAD = {"widths": [16, 8]}
KINDS = {
    "byol": {"predictor": HEAD, "decay": 0.9, "objective": {"kind": "byol"}},
    "simsiam": {"predictor": HEAD, "objective": {"kind": "cosine"}},
    "barlow": {"objective": {"kind": "cross_correlation"}},
    "moco": {"decay": 0.9, "objective": {"kind": "queue", "size": 10, "symmetric": True}},
}
PAIRS = {"audio-visual": ("audio", "video"), "audio-text": ("audio", "text")}


def crossed(kind, between=("audio", "video"), **changes):
    """A method between two modalities over the shared transformer."""
    names = set(between)
    task = {"kind": "siamese", "between": between, "projector": HEAD, **KINDS[kind], **changes}
    return tiny_spec(
        towers={n: t for n, t in TREE["towers"].items() if n in names},
        views={n: v for n, v in TREE["views"].items() if n in names},
        joints={},
        tasks={"s": task},
    )


def crossed_model(kind, between=("audio", "video"), **changes):
    return tiny_model(crossed(kind, between, **changes)).train()


# ---------------------------------------------------------------- two modalities, one config line


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_modalities_learn_from_each_other(kind, pair):
    """Every parameter has a gradient, which for one modality depends on the other's rows."""
    first, second = PAIRS[pair]
    model = crossed_model(kind, (first, second))
    batch = full_batch(model.spec, 6)
    _, grads = gradients(model, batch)
    assert set(grads) == {n for n, _ in model.named_parameters()}
    view = batch.views[second]
    other = full_batch(model.spec, 6, seed=5).views[second]
    batch.views[second] = replace(view, data=other.data)
    _, moved = gradients(model, batch)
    name = f"tasks.s.projectors.{first}.layers.0.weight"
    assert float((moved[name] - grads[name]).abs().max()) > 1e-2 * float(grads[name].abs().max())


@pytest.mark.parametrize("kind", ["byol", "barlow"])
def test_training_relates_the_two_modalities(kind):
    """40 steps on one batch halve the loss; sounds with the frames of others are told apart."""
    model = crossed_model(kind)
    batch = full_batch(model.spec, 8)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    start = values(model, batch)["s"]
    for step in range(40):
        loss, _ = model(batch, step, 40)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.after_step(step, 40)
    end = values(model, batch)["s"]
    assert end < 0.5 * start
    video = batch.views["video"]
    batch.views["video"] = replace(video, data=video.data.roll(1, 0))
    assert values(model, batch)["s"] > 2 * end


def test_the_published_method_becomes_audio_visual_by_naming_a_view():
    """BYOL-A between sound and frames: two lines for the tower and its view, one for the task."""
    video = "{modality: video, crop_s: 0.5, fps: 4, size: 32}"
    pool = "{audio: mean_max, video: mean}"
    words = [
        "towers.video={use: video_resnet18}",
        f"views.second={video.replace('{', '{hz: null, ', 1)}",
        f"tasks.byol.pool={pool}",
    ]
    spec = config.load("audio/byol_a", [*shrunk(), *words])
    model = small_model(spec).train()
    _, grads = gradients(model, full_batch(spec, 4))
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert {n.split(".")[3] for n in grads if "predictors" in n} == {"audio", "video"}


def shrunk():
    heads = ("projector", "predictor")
    words = [f"tasks.byol.{head}.widths=[16, 16]" for head in heads]
    return [*words, "views.first.crop_s=0.4", "towers.audio.backbone.hidden=16"]


@pytest.mark.parametrize("name", ["audio/byol_a", "general/barlow_twins"])
def test_a_method_runs_on_the_shared_transformer(name):
    """`backbone: shared` with patches of the signal in the place of the network."""
    spec = small(name)
    (tower,) = spec.towers
    patch = [8, 8] if tower == "audio" else [1, 8, 8]
    task = next(iter(spec.tasks))
    old = {"byol_a": ("version", "bands", "hidden"), "resnet50": ("zero_init",)}
    keys = old[spec.towers[tower].backbone.kind]
    shared = config.load(
        name,
        [
            "shared={width: 16, layers: 1, head_size: 8, hidden: 32}",
            *(f"towers.{tower}.backbone.{k}=null" for k in keys),
            f"towers.{tower}.backbone=shared",
            f"towers.{tower}.cut={{kind: patches, patch: {patch}}}",
            *(f"views.{v}.crop_s={s.crop_s}" for v, s in spec.views.items()),
            *(f"views.{v}.size={s.size}" for v, s in spec.views.items()),
            f"tasks.{task}.projector.widths={spec.tasks[task].projector.widths}",
            *(
                f"tasks.{task}.predictor.widths={spec.tasks[task].predictor.widths}"
                for p in [spec.tasks[task].predictor]
                if p
            ),
        ],
    )
    model = small_model(shared).train()
    _, grads = gradients(model, full_batch(shared, 4))
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert any(n.startswith("trunk.") for n in grads)


# ---------------------------------------------------------------- vectors of two modalities


def cosines(model, batch):
    """(B,) between the two modalities of a row, in the task's space."""
    vectors = model.embed(batch)
    (audio, there), (video, _) = vectors["audio", "s"], vectors["video", "s"]
    return (audio * video).sum(1)[there]


@pytest.mark.parametrize(
    ("kind", "loss"), [("byol", lambda c: 4 - 4 * c), ("simsiam", lambda c: -c)]
)
def test_the_cosine_of_two_modalities_is_what_the_loss_asks_for(kind, loss):
    model = crossed_model(kind)
    batch = full_batch(model.spec, 6)
    with torch.no_grad():  # a teacher that is not the network itself
        for p in model.towers.parameters():
            p.mul_(1.1)
    model.after_step(0, 10)
    assert model.spaces() == {("audio", "s"): "audio", ("video", "s"): "video"}
    assert model.space_for("video", "audio") == "s"
    want = values(model.eval(), batch)["s"]
    assert float(loss(cosines(model, batch)).mean()) == pytest.approx(want, rel=1e-5)
    alone = replace(batch, views={"video": batch.views["video"]})
    assert set(model.embed(alone)) == {("video", "s")}
    torch.testing.assert_close(model.embed(alone)["video", "s"], model.embed(batch)["video", "s"])


def test_a_queue_compares_query_with_key_both_ways():
    model = crossed_model("moco").eval()
    task, batch = model.tasks["s"], full_batch(model.spec, 6)
    passes = model.passes(batch)
    q = {v: F.normalize(task._online[0](passes, v).detach()) for v in ("audio", "video")}
    k = {v: F.normalize(task._target(passes, v, None)) for v in q}
    want = ((q["audio"] * k["video"]).sum(1) + (q["video"] * k["audio"]).sum(1)) / 2
    torch.testing.assert_close(cosines(model, batch), want)


def test_correlated_projections_are_compared_in_standard_units_of_the_training():
    model = crossed_model("barlow", projector={"widths": [8], "norm": "none"})
    task, batch = model.tasks["s"], full_batch(model.spec, 64)
    for norm in task.norms.values():
        norm.momentum = 1.0
    model(batch, 0, 10)
    found = model.embed(batch)
    for v in ("audio", "video"):
        z = task._online[0](model.passes(batch), v).detach()
        units = (z - z.mean(0)) / (z.var(0) + 1e-5).sqrt()
        torch.testing.assert_close(found[v, "s"][0], F.normalize(units), atol=1e-4, rtol=0)
    other = full_batch(model.spec, 4, seed=1)
    alone = model.eval().embed(take_rows(other, [2]))["audio", "s"][0]
    torch.testing.assert_close(alone, model.embed(other)["audio", "s"][0][2:3])


def test_two_views_of_one_modality_have_no_space():
    assert small_model(small("byol_a_tiny")).spaces() == {}


# ---------------------------------------------------------------- constants


def test_simsiams_target_is_a_constant():
    """The gradient is that of a regression of detached projections, one view at a time."""
    model = crossed_model("simsiam")
    batch = full_batch(model.spec, 6)
    _, got = gradients(model, batch)
    task = model.tasks["s"]
    model.zero_grad(set_to_none=True)
    passes = model.passes(batch, 0.0)
    z = {v: task._online[0](passes, v) for v in ("audio", "video")}
    p = {v: task.predictors[v](z[v]) for v in z}
    pairs = ((p["audio"], z["video"]), (p["video"], z["audio"]))
    loss = sum(-F.cosine_similarity(a, b.detach()).mean() for a, b in pairs) / 2
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_barlow_has_no_constant_and_no_predictor():
    model = crossed_model("barlow")
    task = model.tasks["s"]
    assert task.teacher is None
    assert not task.predictors
    batch = full_batch(model.spec, 6)
    z = {v: task._online[0](model.passes(batch), v).double() for v in ("audio", "video")}
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in z.values())
    c = a.T @ b / 6
    want = (1 - c.diagonal()).square().sum()
    want = want + 0.0051 * (c.square().sum() - c.diagonal().square().sum())
    assert values(model, batch)["s"] == pytest.approx(float(want.detach()), rel=1e-5)


# ---------------------------------------------------------------- the moving average


def test_the_target_network_is_a_moving_average_with_statistics_of_its_own_batch():
    model = crossed_model("byol")
    task, batch = model.tasks["s"], full_batch(model.spec, 6)
    twin = task.teacher.twin
    start = {n: b.clone() for n, b in twin.named_buffers()}
    trained = dict(task._online[0].named_parameters())
    assert set(trained) < set(start)
    assert any(n.startswith("trunk.") for n in trained)  # the shared transformer is copied, once
    assert all(torch.equal(start[n], p) for n, p in trained.items())
    loss, _ = model(batch, 0, 10)
    loss.backward()
    assert all(not b.requires_grad for b in twin.buffers())
    assert all(torch.equal(start[n], twin.get_buffer(n)) for n in trained)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.5)
    model.after_step(0, 10)
    for name, p in trained.items():
        torch.testing.assert_close(
            twin.get_buffer(name), 0.9 * start[name] + 0.1 * p, atol=1e-7, rtol=0
        )
    assert all(m.training for m in twin.modules() if "Norm" in type(m).__name__)
    assert not any(m.training for m in model.eval().tasks["s"].teacher.twin.modules())


def test_a_fresh_target_network_gives_what_the_online_one_gives():
    model = crossed_model("byol")
    task, batch = model.tasks["s"], full_batch(model.spec, 6)
    passes = model.passes(batch, 0.0)
    online = {v: task._online[0](passes, v) for v in ("audio", "video")}
    target = task._targets(passes, online)
    torch.testing.assert_close(target["audio"], online["video"].detach())
    torch.testing.assert_close(target["video"], online["audio"].detach())
    assert not any(t.requires_grad for t in target.values())


def test_byol_is_the_sum_of_both_squared_distances():
    model = crossed_model("byol")
    task, batch = model.tasks["s"], full_batch(model.spec, 6)
    passes = model.passes(batch, 0.0)
    z = {v: task._online[0](passes, v).detach() for v in ("audio", "video")}
    p = {v: F.normalize(task.predictors[v](z[v])) for v in z}
    gaps = [(p[a] - F.normalize(z[b])).square().sum(1).mean() for a, b in (z, reversed(z))]
    assert values(model, batch)["s"] == pytest.approx(float(sum(gaps)), rel=1e-5)


# ---------------------------------------------------------------- the queue


def moco(**changes):
    return small_model(small("moco_v2_tiny", *(f"{k}={v}" for k, v in changes.items()))).train()


def test_every_entry_is_a_key_of_its_step_and_the_loss_does_not_see_its_own():
    model = moco()
    task = model.tasks["moco"]
    queue = task.queues["of_query"]
    assert queue.rows_K.norm(dim=1).tolist() == pytest.approx([1] * 16)
    keys = []
    for step in range(3):
        batch = full_batch(model.spec, 6, seed=step)
        batch.source_B += 100 * step
        before = queue.rows_K.clone()
        passes = model.passes(model._augmented(batch, step / 10), step / 10)
        target = task._targets(passes, {})["query"]
        keys.append(F.normalize(target, dim=-1))
        loss, _ = model(batch, step, 10)
        loss.backward()
        assert torch.equal(queue.rows_K, before)
        model.after_step(step, 10)
    want = torch.cat(keys)  # 18 keys, of which the newest two lie over the oldest
    torch.testing.assert_close(queue.rows_K, torch.cat([want[16:], want[2:16]]), atol=1e-6, rtol=0)
    assert int(queue.next) == 2


def test_queue_loss_is_cross_entropy_and_spares_the_own_recording():
    model = moco()
    task, batch = model.tasks["moco"], full_batch(model.spec, 6)
    queue = task.queues["of_query"]
    batch = model._augmented(batch, 0.0)
    passes = model.passes(batch, 0.0)
    q = F.normalize(task._online[0](passes, "query").detach())
    k = F.normalize(task._targets(passes, {})["query"])
    queue.source_K[:3] = batch.source_B[0]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.rows_K.T], 1) / 0.2
    logits[0, 1:4] = -math.inf
    want = float(F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)))
    found = task(passes, batch)[""]
    assert float(found.sum.detach() / found.count) == pytest.approx(want, rel=1e-5)
    assert "key" not in task.last  # the keys' side is not encoded by the online network


def test_keys_have_unit_length_in_bf16():
    model = moco()
    with torch.autocast("cpu", torch.bfloat16):
        model(full_batch(model.spec, 6), 0, 10)
    model.after_step(0, 10)
    lengths = model.tasks["moco"].queues["of_query"].rows_K.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(16), atol=1e-6, rtol=0)


def test_only_training_feeds_the_queue():
    model = moco().eval()
    model(full_batch(model.spec, 6), 0, 10)
    model.after_step(0, 10)
    assert int(model.tasks["moco"].queues["of_query"].filled) == 0


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", KINDS)
def test_absent_rows_change_neither_loss_nor_gradient(kind):
    model = crossed_model(kind).double()  # batch norms of 5 rows magnify rounding
    batch = full_batch(model.spec, 5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loss, grads = gradients(model, batch)
    model.load_state_dict(state)
    more, grads_more = gradients(model, absent_rows(batch, 3))
    torch.testing.assert_close(more, loss)
    torch.testing.assert_close(grads_more, grads, atol=1e-6, rtol=1e-4)


def test_without_the_predictor_constant_vectors_are_the_optimum():
    """The control of BYOL and SimSiam: equal vectors have the smallest loss there is."""
    for kind, least in (("byol", 0.0), ("simsiam", -1.0)):
        model = crossed_model(kind)
        task = model.tasks["s"]
        for head in (*task.projectors.values(), *task.predictors.values()):
            torch.nn.init.zeros_(head.layers[-1].weight)
            torch.nn.init.ones_(head.layers[-1].bias)
        if task.teacher is not None:
            task.teacher.decay = 0.0
            model.after_step(0, 10)
        assert values(model, full_batch(model.spec, 4))["s"] == pytest.approx(least, abs=1e-5)
        assert all(float(z.std(0).max()) < 1e-6 for z in task.last.values())  # what is watched


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"between": ["audio", "audio"]}, "`between` needs two views"),
        ({"predictor": None}, "`byol` collapses without a `predictor`"),
        ({"predictor": {"widths": [16]}}, "ends at width 16, the `projector` at 8"),
        ({"objective": {"kind": "cross_correlation"}}, "leave `predictor` and `decay` out"),
        ({"objective": {"kind": "queue"}, "decay": None}, "give `decay`"),
    ],
)
def test_a_task_that_cannot_work_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        crossed("byol", **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"between": ["audio", "film"]}, r"tasks\.s\.between: no view 'film'"),
        ({"objective": {"kind": "queue"}}, r"symmetric: the second view has a tower of its own"),
        ({"pool": "median"}, r"tasks\.s\.pool: 'median' is not known"),
        ({"pool": {"audio": "mean"}}, "says nothing about video"),
    ],
)
def test_names_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(UserError, match=match):
        crossed_model("byol", **changes)


def test_candidates_are_refused():
    spec = crossed("byol", ("audio", "text"))
    text = spec.views["text"].model_copy(update={"candidates": 2})
    with pytest.raises(UserError, match=r"views\.text\.candidates: tasks\.s reads one per row"):
        tiny_model(spec.model_copy(update={"views": {**spec.views, "text": text}}))
