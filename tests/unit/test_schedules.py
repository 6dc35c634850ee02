"""Numbers over the run: the laws of each kind, and that tasks and towers honour them."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_run import TREE, tiny_batch, tiny_model, tiny_spec

from mmssl.schedules import resolve
from mmssl.specs import Schedule
from mmssl.towers import Passes

POSITIONS = st.floats(0, 1)


@given(POSITIONS)
def test_a_plain_number_stays(position):
    assert resolve(0.3, position) == 0.3
    assert resolve(2, position) == 2.0


@given(POSITIONS, st.floats(0, 0.5), st.floats(0.6, 1))
def test_linear_and_cosine_hold_their_ends_and_lie_between(position, begin, until):
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind=kind, start=3.0, end=1.0, begin=begin, until=until)
        value = resolve(schedule, position)
        assert 1.0 <= value <= 3.0
        if position <= begin:
            assert value == 3.0
        if position >= until:
            assert value == pytest.approx(1.0, abs=1e-12)


def test_values_in_between_are_the_formulas():
    linear = Schedule(kind="linear", start=1.0, end=0.0, begin=0.2, until=0.6)
    assert [resolve(linear, p) for p in (0.3, 0.4, 0.5)] == pytest.approx([0.75, 0.5, 0.25])
    cosine = Schedule(kind="cosine", start=1.0, end=0.0)
    # (1 + cos(pi / 3)) / 2 = 3/4, the middle, and its mirror image
    assert [resolve(cosine, p) for p in (1 / 3, 0.5, 2 / 3)] == pytest.approx([0.75, 0.5, 0.25])


@given(POSITIONS, POSITIONS)
def test_they_are_monotone(a, b):
    for kind in ("linear", "cosine"):
        schedule = Schedule(kind=kind, start=0.0, end=5.0, begin=0.1, until=0.9)
        assert resolve(schedule, min(a, b)) <= resolve(schedule, max(a, b)) + 1e-12


def test_steps_take_the_last_point_that_was_reached():
    schedule = Schedule(kind="steps", points=[(0.0, 0.0), (0.4, 0.25), (0.8, 0.5)])
    places = (0.0, 0.39, 0.4, 0.79, 0.8, 1.0)
    assert [resolve(schedule, p) for p in places] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "steps"}, "begin at position 0"),
        ({"kind": "steps", "points": [(0.2, 1.0)]}, "begin at position 0"),
        ({"kind": "linear", "begin": 0.5, "until": 0.5}, "must lie after"),
        ({"kind": "cosine", "until": 1.5}, "less than or equal to 1"),
    ],
)
def test_schedules_without_meaning_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Schedule(**fields)


# ---------------------------------------------------------------- in a run

RAMP = {"kind": "linear", "start": 0.0, "end": 2.0}


def with_task(name, **changes):
    return tiny_spec(tasks={**TREE["tasks"], name: {**TREE["tasks"][name], **changes}})


def test_a_weight_of_zero_silences_a_term_and_then_grows():
    model, plain = tiny_model(with_task("match", weight=RAMP)), tiny_model()
    batch = tiny_batch()
    losses = [float(model(batch, step, 10)[0].detach()) for step in (0, 5, 10)]
    one = float(plain(batch, 0, 10)[0].detach())
    match = plain(batch, 0, 10)[1]["match"]
    match = float(match.sum / match.count)
    assert losses == pytest.approx([one - match, one, one + match], rel=1e-5)
    model.zero_grad()
    model(batch, 0, 10)[0].backward()
    grads = [p.grad for n, p in model.named_parameters() if n.startswith("tasks.match")]
    assert grads
    assert all(float(g.abs().max()) == 0.0 for g in grads)  # and none is None


def test_the_weight_of_a_pair_multiplies_that_of_its_task():
    pairs = TREE["tasks"]["align"]["pairs"]
    ramped = {**pairs, "va": {**pairs["va"], "weight": RAMP}}
    model = tiny_model(with_task("align", weight=0.5, pairs=ramped))
    weights = model.tasks["align"].weight
    factors = {n: [prod(resolve(w, p) for w in weights(n)) for p in (0.0, 1.0)] for n in pairs}
    assert factors == {"va": [0.0, 1.0], "at": [0.5] * 2, "vt": [0.5] * 2, "dense": [0.5] * 2}


def test_a_scheduled_ratio_hides_more_and_more():
    ratio = {"kind": "steps", "points": [[0.0, 0.25], [0.5, 0.75]]}
    mask = {"rule": "random", "ratio": ratio}
    model, batch = tiny_model(with_task("masked_audio", mask=mask)), tiny_batch(missing=False)
    tokens = 25 * 1 * 6  # 101 frames and 16 bands at stride 4 x 16, six rows
    counts = [int(model(batch, step, 10)[1]["masked_audio"].count) for step in (0, 4, 5, 10)]
    assert counts == [6 * round(0.25 * 25)] * 2 + [6 * round(0.75 * 25)] * 2
    assert max(counts) < tokens


def test_scheduled_dropping_follows_the_position():
    drop = {"kind": "linear", "start": 0.5, "end": 0.0}
    towers = {**TREE["towers"], "video": {**TREE["towers"]["video"], "drop_tokens": drop}}
    model, batch = tiny_model(tiny_spec(towers=towers)).train(), tiny_batch(missing=False)
    for position, kept in ((0.0, 4), (0.5, 6), (1.0, 8)):
        passes = Passes(model.towers, model.joints, model.tower_of, batch, position)
        tokens = passes.tokens("video")
        assert (~tokens.pad_PN).sum(1).tolist() == [kept] * 6


def test_hard_negatives_follow_the_position(monkeypatch):
    import mmssl.tasks.classify as module

    shares = []
    mix = module.mix_hard
    monkeypatch.setattr(module, "mix_hard", lambda *args: shares.append(args[3]) or mix(*args))
    target = {"kind": "match", "between": ["video", "audio"], "hard": {**RAMP, "end": 0.5}}
    spec = with_task("match", target=target, score={"kind": "distance"})
    model, batch = tiny_model(spec), tiny_batch()
    for step in (0, 5, 10):
        model(batch, step, 10)
    assert shares == [0.25, 0.5]  # at 0 nothing is mixed


def test_exponential_steps_have_equal_ratios():
    # wav2vec 2.0's temperature max(2 * 0.999995^n, 0.5) over 400,000 updates
    tau = Schedule(kind="exponential", start=2.0, end=0.5, until=277_258 / 400_000)
    for n in (0, 1, 1000, 100_000, 277_000, 300_000, 400_000):
        assert resolve(tau, n / 400_000) == pytest.approx(max(2 * 0.999995**n, 0.5), rel=1e-5)
    with pytest.raises(ValueError, match="above 0"):
        Schedule(kind="exponential", start=1.0, end=0.0)
