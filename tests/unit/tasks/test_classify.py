"""`classify`: which pairs a match is asked about, and labels from the metadata."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_run import TREE, absent_rows, gradients, take_rows, tiny_batch, tiny_model, tiny_spec
from torch.nn import functional as F

from mmssl.heads.match import VectorMatch
from mmssl.heads.score import Distance
from mmssl.tasks.classify import Match
from mmssl.types import Term, UserError

SHIFTED = {"modality": "audio", "crop_s": 1.0, "window": "other"}


def match_spec(score="fusion", views=None, joints=None, **target):
    """A run with a match task alone."""
    scores = {"joint": {"kind": "joint", "joint": "av"}}
    task = {
        "kind": "classify",
        "target": {"kind": "match", "between": ["video", "audio"], **target},
        "score": scores.get(score, {"kind": score}),
    }
    joints = TREE["joints"] if score == "joint" and joints is None else joints or {}
    return tiny_spec(tasks={"match": task}, joints=joints, views=views or TREE["views"])


class Drawn:
    """Records which pairs a match task scored: (row of a, row of b, truth), by content."""

    def __init__(self, model, batch, monkeypatch, position=0.0):
        task = model.tasks["match"]
        assert isinstance(task, Match)
        self.pairs = []
        read = {n: task.score.read(model.passes(batch), n, n)[0] for n in ("video", "audio")}
        self.rows = {n: z.detach() for n, z in read.items()}
        original = task._term

        def term(passes, a, b, truth, rows):
            self.pairs += [(i, self._row(b[0][i]), truth) for i in rows.nonzero()[:, 0].tolist()]
            return original(passes, a, b, truth, rows)

        monkeypatch.setattr(task, "_term", term)
        self.term: Term = task(model.passes(batch, position), batch)[""]

    def _row(self, value):
        return int((self.rows["audio"] - value).abs().flatten(1).sum(1).argmin())

    def of(self, truth):
        return {i: j for i, j, t in self.pairs if t == truth}


@pytest.fixture
def drawn(monkeypatch):
    def draw(model, batch, position=0.0):
        return Drawn(model, batch, monkeypatch, position)

    return draw


# ---------------------------------------------------------------- who is whose partner


@pytest.mark.parametrize("score", ["fusion", "joint"])
def test_every_row_serves_once_with_its_own_and_once_with_another_partner(score, drawn):
    batch = tiny_batch(missing=False)
    found = drawn(tiny_model(match_spec(score)), batch)
    assert found.of(True) == {i: i for i in range(6)}
    false = found.of(False)
    assert sorted(false) == sorted(false.values()) == list(range(6))  # a permutation
    assert all(i != j for i, j in false.items())
    assert int(found.term.count) == 12


def test_partners_come_from_other_sources(drawn):
    batch = tiny_batch(missing=False)
    batch.source_B[:] = torch.tensor([1, 1, 1, 2, 2, 2])
    false = drawn(tiny_model(match_spec()), batch).of(False)
    assert len(false) == 6
    assert all(batch.source_B[i] != batch.source_B[j] for i, j in false.items())


def test_a_batch_of_one_source_has_no_false_pairs(drawn):
    batch = tiny_batch(missing=False)
    batch.source_B[:] = 5
    found = drawn(tiny_model(match_spec()), batch)
    assert found.of(False) == {}
    assert int(found.term.count) == 6


def test_rows_that_lack_a_side_take_no_part(drawn):
    found = drawn(tiny_model(match_spec()), tiny_batch())  # row 1 lacks audio, row 2 video
    assert set(found.of(True)) == {0, 3, 4, 5}
    false = found.of(False)
    assert set(false) == set(false.values()) == {0, 3, 4, 5}


def test_partners_depend_on_the_rows_and_not_on_their_layout(drawn):
    model, batch = tiny_model(match_spec()), tiny_batch(missing=False)
    whole = drawn(model, batch).of(False)
    order = [4, 2, 0, 5, 3, 1]
    moved = drawn(model, take_rows(batch, order)).of(False)
    assert {order[i]: order[j] for i, j in moved.items()} == whole
    assert drawn(model, absent_rows(batch, 4)).of(False) == whole


def test_a_coin_decides_which_rows_keep_their_partner(drawn):
    model = tiny_model(match_spec(draw="coin"))
    batch = tiny_batch(400, missing=False)
    small = {
        "video": batch.views["video"].data[:, :2],
        "audio": batch.views["audio"].data[:, :1600],
    }
    for name, data in small.items():
        full = torch.full((400,), data.shape[1])
        batch.views[name] = replace(batch.views[name], data=data, lengths_P=full)
    found = drawn(model, batch)
    own, other = found.of(True), found.of(False)
    assert set(own) | set(other) == set(range(400))
    assert not set(own) & set(other)
    assert abs(len(own) - 200) < 4 * math.sqrt(100)
    assert int(found.term.count) == 400
    # the negatives' partners are other rows, the positives' are their own
    assert all(i == j for i, j in own.items())
    assert all(i != j for i, j in other.items())


def test_a_shifted_view_of_the_same_clip_is_a_further_negative(drawn):
    views = {**TREE["views"], "late": SHIFTED}
    spec = match_spec(views=views, shifted="late")
    model, batch = tiny_model(spec), tiny_batch(spec=spec, missing=False)
    found = drawn(model, batch)
    assert int(found.term.count) == 18
    assert sum(not truth for _, _, truth in found.pairs) == 12
    # read as a sound: by the audio tower and the audio's own map
    passes = model.passes(batch)
    (late,) = model.tasks["match"].score.read(passes, "late", "audio")
    assert model.tower_of["late"] == "audio"
    last = [i for i, _, truth in found.pairs[-6:] if not truth]
    assert last == list(range(6))
    assert late.shape == found.rows["audio"].shape


def test_a_shifted_view_may_be_absent(drawn):
    views = {**TREE["views"], "late": SHIFTED}
    spec = match_spec(views=views, shifted="late", score="joint")
    model, batch = tiny_model(spec), tiny_batch(spec=spec, missing=False)
    late = take_rows(batch, list(range(6))).views["late"]
    keep = late.rows_P != 2
    columns = ("data", "lengths_P", "rows_P", "slots_P", "seeds_P", "start_s_P")
    present = late.present_BL.clone()
    present[2] = False
    batch.views["late"] = replace(
        late, present_BL=present, **{c: getattr(late, c)[keep] for c in columns}
    )
    assert int(drawn(model, batch).term.count) == 17


# ---------------------------------------------------------------- hard negatives


def test_all_hard_negatives_are_the_most_similar_other_rows(drawn):
    model, batch = tiny_model(match_spec("distance", hard=1.0)), tiny_batch(missing=False)
    found = drawn(model, batch)
    video, audio = (F.normalize(found.rows[n], dim=-1) for n in ("video", "audio"))
    table = (video @ audio.T).fill_diagonal_(-2.0)
    assert found.of(False) == dict(enumerate(table.argmax(1).tolist()))


def test_hard_negatives_are_of_other_sources_and_whole_rows(drawn):
    model, batch = tiny_model(match_spec("distance", hard=1.0)), tiny_batch()
    batch.source_B[:] = torch.tensor([1, 2, 3, 1, 4, 4])
    false = drawn(model, batch).of(False)
    assert set(false) == {0, 3, 4, 5}
    assert all(batch.source_B[i] != batch.source_B[j] for i, j in false.items())
    assert set(false.values()) <= {0, 3, 4, 5}


def test_hard_negatives_need_vectors():
    with pytest.raises(UserError, match=r"match\.target\.similar: a joint score would need a pass"):
        tiny_model(match_spec("joint", hard=0.5))
    with pytest.raises(UserError, match=r"match\.target\.similar: 'align\.x' is no space"):
        tiny_model(match_spec("joint", hard=0.5, similar="align.x"))


def test_a_joint_score_takes_the_most_similar_rows_of_a_space(drawn):
    alone = match_spec("joint", hard=1.0, similar="align.avt").model_dump()["tasks"]["match"]
    spec = tiny_spec(tasks={"align": TREE["tasks"]["align"], "match": alone})
    model, batch = tiny_model(spec), tiny_batch(missing=False)
    found = drawn(model, batch)
    vectors = model.embed(batch)
    table = (vectors["video", "avt"][0] @ vectors["audio", "avt"][0].T).fill_diagonal_(-2.0)
    assert found.of(False) == dict(enumerate(table.argmax(1).tolist()))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("score", ["fusion", "distance", "joint"])
def test_the_term_is_the_cross_entropy_of_the_drawn_pairs(score, drawn):
    model, batch = tiny_model(match_spec(score)), tiny_batch(missing=False)
    found = drawn(model, batch)
    own = model.match_logit(batch, torch.arange(6))
    false = found.of(False)
    other = model.match_logit(batch, torch.tensor([false[i] for i in range(6)]))
    want = F.softplus(-own).sum() + F.softplus(other).sum()
    assert float(found.term.sum.detach()) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("score", ["fusion", "distance", "joint"])
def test_both_towers_and_the_score_learn(score):
    model = tiny_model(match_spec(score))
    _, grads = gradients(model, tiny_batch())
    for part in ("towers.video.stem", "towers.audio.stem", "tasks.match", "trunk."):
        assert max(float(g.abs().max()) for n, g in grads.items() if n.startswith(part)) > 0, part


def test_embedding_widths_make_an_mlp_of_each_view():
    task = match_spec("distance").model_dump()["tasks"]["match"]
    spec = tiny_spec(tasks={"match": {**task, "embed": [12, 6]}}, joints={})
    score = tiny_model(spec).tasks["match"].score
    assert isinstance(score, VectorMatch)
    for view in ("video", "audio"):
        shapes = [tuple(p.shape) for p in score.reader.mlps[view].parameters()]
        assert shapes == [(12, 16), (12,), (6, 12), (6,)]
        assert [type(m).__name__ for m in score.reader.mlps[view]] == ["Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: match_spec("joint", joints={}), "is no joint tower"),
        (
            lambda: match_spec(between=["video", "text"], score="joint"),
            r"no joint tower of \['video', 'text'\]",
        ),
        (lambda: match_spec(shifted="late"), "no view 'late'"),
    ],
)
def test_wrong_matches_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        tiny_model(spec())


# ---------------------------------------------------------------- labels


def label_model(labels=("shape",), **options):
    target = {"kind": "label", "view": "audio", "field": "shape", "classes": ["circle", "square"]}
    task = {"kind": "classify", "target": target, "pool": "mean", **options}
    parts = {part: {"audio": TREE[part]["audio"]} for part in ("towers", "views")}
    data = {"labels": list(labels)}
    return tiny_model(tiny_spec(tasks={"shape": task}, joints={}, data=data, **parts))


def labelled(rows, values):
    batch = tiny_batch(rows, missing=False, spec=label_model().spec)
    batch.meta[:] = [{} if v is None else {"shape": v} for v in values]
    return batch


def test_labels_are_read_from_the_metadata():
    model = label_model().eval()
    batch = labelled(4, ["square", "circle", "circle", "square"])
    task = model.tasks["shape"]
    tokens = model.passes(batch).tokens("audio")
    logits = task.out(tokens.x_PND.mean(1))
    want = F.cross_entropy(logits, torch.tensor([1, 0, 0, 1]), reduction="sum")
    _, terms = model(batch, 0, 10)
    assert int(terms["shape"].count) == 4
    assert float(terms["shape"].sum) == pytest.approx(float(want.detach()), rel=1e-5)


def test_rows_without_a_listed_value_are_left_out():
    model = label_model()
    batch = labelled(5, ["square", None, "triangle", "circle", "square"])
    _, grads = gradients(model, batch)
    _, terms = model.train()(batch, 0, 10)
    assert int(terms["shape"].count) == 3
    rows = take_rows(batch, [0, 3, 4])
    _, alone = gradients(model, rows)
    for name in grads:
        torch.testing.assert_close(grads[name], alone[name], atol=1e-6, rtol=1e-4)


def test_rows_without_the_view_are_left_out():
    model = label_model()
    batch = tiny_batch(spec=model.spec)
    batch.meta[:] = [{"shape": "circle"}] * 6
    assert int(model(batch, 0, 10)[1]["shape"].count) == 5


def test_numbers_are_classes_by_their_digits():
    spec = label_model().spec
    target = spec.tasks["shape"].target.model_copy(update={"classes": ["0", "1"]})
    task = spec.tasks["shape"].model_copy(update={"target": target})
    model = tiny_model(spec.model_copy(update={"tasks": {"shape": task}}))
    _, terms = model(labelled(4, [1, "1", 0, 2]), 0, 10)
    assert int(terms["shape"].count) == 3


def test_a_field_that_training_does_not_read_is_refused():
    """Rows come without it: the task would never see a label."""
    with pytest.raises(UserError, match=r"field: 'shape' is not read .* add it to data\.labels"):
        label_model(labels=())


def test_no_label_at_all_is_zero_and_keeps_the_graph_whole():
    model = label_model()
    loss, grads = gradients(model, labelled(4, [None] * 4))
    assert float(loss) == 0.0
    assert set(grads) == {n for n, _ in model.named_parameters()}
    assert all(float(g.abs().max()) == 0.0 for g in grads.values())


def test_labels_can_be_learned():
    """Fine-tuning is a configuration: the class is how loud the clip is."""
    torch.manual_seed(0)
    model = label_model()
    batch = labelled(16, ["circle", "square"] * 8)
    audio = batch.views["audio"]
    gain = torch.tensor([0.02, 1.0] * 8)[:, None]
    batch.views["audio"] = replace(audio, data=audio.data * gain)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(15):
        loss, _ = model.train()(batch, step, 15)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(2), abs=0.3)
    assert losses[-1] < 0.05


# ---------------------------------------------------------------- reading a space


def space_spec(**task):
    """The tiny run with a match on the vectors of its pairs task."""
    spec = tiny_spec()
    own = {"kind": "classify", "target": {"kind": "match", "between": ["video", "audio"]}}
    own |= {"score": {"kind": "distance"}, "space": "align.av"} | task
    tree = spec.model_dump(by_alias=True)["tasks"]
    return tiny_spec(tasks={"align": tree["align"], "match": own})


@pytest.mark.parametrize("score", ["fusion", "distance"])
def test_a_match_on_a_space_reads_the_vectors_of_the_pairs_and_trains_their_heads(score):
    model, batch = tiny_model(space_spec(score={"kind": score})), tiny_batch(missing=False)
    passes = model.passes(batch, 0.0)
    align, match = model.tasks["align"], model.tasks["match"]
    vectors = align.vectors(passes)
    (got,) = match.score.reader(passes, "audio", "audio")
    assert torch.equal(got, vectors["audio", "av"][0][:, 0])
    assert not list(match.score.reader.parameters())  # they have one name, in the pairs task
    heads = list(align.embedder.heads.parameters())
    match(passes, batch)[""].sum.backward()
    assert max(float(p.grad.abs().max()) for p in heads if p.grad is not None) > 0
    assert model.match_logit(batch, torch.arange(6)).shape == (6,)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"space": "align.nowhere"}, r"tasks\.match\.space: 'align\.nowhere' is no space"),
        ({"space": "other.av"}, r"there are align\.av"),
        ({"pool": "max"}, r"tasks\.match\.pool: not read, a space makes the vectors"),
        ({"space": "", "pool": "steps"}, r"tasks\.match\.pool: `steps` needs a space"),
        ({"space": "", "pool": "best"}, r"tasks\.match\.pool: 'best' is not known; use one of"),
    ],
)
def test_a_match_that_cannot_be_read_is_refused(task, message):
    with pytest.raises(UserError, match=message):
        tiny_model(space_spec(**task))


def test_a_distance_starts_at_its_slope_and_threshold():
    score = Distance(slope=10.0, threshold=1.25)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(score.pairs(a, b).detach()) == pytest.approx(20 * (1.25 - 2**0.5), rel=1e-5)
    assert float(score.pairs(a, a).detach()) == pytest.approx(25.0, rel=1e-4)
