"""ABX against all triples and all paths; units against scikit-learn's homogeneity."""

import itertools
import math

import numpy as np
import pytest
from eval_runs import NAMES, tone_run
from sklearn.metrics import homogeneity_score

from mmssl.data.sidecars import LabelInfo, SideCar, Source, writing
from mmssl.eval import abx, results, spans, suites, unit_suite
from mmssl.eval.abx import Item
from mmssl.eval.retrieval import normalize
from mmssl.eval.session import Session
from mmssl.types import UserError

RNG = np.random.default_rng


def token(rng, length, width=4):
    x = rng.normal(size=(length, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def all_paths(t, u):
    """Every monotone path from the first to the last cell of a (t, u) grid."""
    if (t, u) == (1, 1):
        return [[(0, 0)]]
    found = []
    for before in ((t - 1, u - 1), (t - 1, u), (t, u - 1)):
        if min(before) >= 1:
            found += [[*path, (t - 1, u - 1)] for path in all_paths(*before)]
    return found


def best_path(a, b):
    """Mean angle along the path of least sum."""
    cost = [[math.acos(max(-1, min(1, float(x @ y)))) / math.pi for y in b] for x in a]
    sums = [(sum(cost[i][j] for i, j in p), len(p)) for p in all_paths(len(a), len(b))]
    total, length = min(sums)
    return total / length


def test_warping_matches_all_paths():
    rng = RNG(0)
    shapes = [(1, 1), (1, 5), (4, 1), (3, 3), (4, 5), (6, 2), (5, 4)]
    a = [token(rng, t) for t, _ in shapes]
    b = [token(rng, u) for _, u in shapes]
    wanted = [best_path(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(abx.dtw(a, b), wanted, rtol=0, atol=5.01e-7)  # of 6 decimals


def test_warping_laws():
    rng = RNG(1)
    x, y = token(rng, 5), token(rng, 7)
    assert abx.dtw([x], [x]) == pytest.approx(0.0, abs=1e-7)
    assert abx.dtw([x], [np.repeat(x, 3, axis=0)]) == pytest.approx(0.0, abs=1e-7)
    assert abx.dtw([x], [-x[:1]])[0] <= 1.0
    table = abx.all_distances([x, y, token(rng, 2)])
    assert np.array_equal(table, table.T)
    assert abx.dtw([y], [x])[0] == pytest.approx(table[0, 1])


def test_long_tokens_are_compared_few_at_a_time(monkeypatch):
    frames = [token(RNG(i), 40 + i) for i in range(16)]
    table, counted = abx.all_distances(frames), []
    monkeypatch.setattr(abx, "_CELLS", 3 * 55**2)
    widths = []
    real = abx.dtw
    monkeypatch.setattr(abx, "dtw", lambda a, b: widths.append(len(a)) or real(a, b))
    np.testing.assert_allclose(abx.all_distances(frames, counted.append), table, atol=1e-6)
    assert (max(widths), sum(widths)) == (3, 120)
    assert counted == widths


def by_triples(items, frames, across):
    """The definition, one triple after the other."""
    n = len(items)
    cells = {}
    for i, j, k in itertools.product(range(n), repeat=3):  # A, B, X
        a, b, x = items[i], items[j], items[k]
        if a.name == b.name or x.name != a.name or i == k:
            continue
        if not a.context == b.context == x.context or a.speaker != b.speaker:
            continue
        if (x.speaker != a.speaker) != across:
            continue
        to_a, to_b = best_path(frames[k], frames[i]), best_path(frames[k], frames[j])
        wrong = 1.0 if to_a > to_b else 0.5 if to_a == to_b else 0.0
        cells.setdefault((a.name, b.name), {}).setdefault(a.context, {}).setdefault(
            (a.speaker, x.speaker), []
        ).append(wrong)
    pairs = {}
    for (a, b), contexts in cells.items():
        means = [np.mean([np.mean(v) for v in speakers.values()]) for speakers in contexts.values()]
        pairs.setdefault(frozenset((a, b)), []).append(np.mean(means))
    return np.mean([np.mean(v) for v in pairs.values()])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_error_matches_all_triples(seed):
    """Unbalanced on purpose: the order of the averages counts."""
    rng = RNG(seed)
    centre = {name: token(rng, 1) for name in "abc"}
    items, frames = [], []
    for _ in range(22):
        name, context, speaker = rng.choice(list("abbc")), rng.choice(list("pq")), rng.choice(3)
        items.append(Item(str(name), str(context), str(speaker)))
        x = centre[str(name)] + 0.9 * token(rng, int(rng.integers(1, 4)))
        frames.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    found = abx.abx(items, frames)
    assert found["within"]["error"] == pytest.approx(by_triples(items, frames, False))
    assert found["across"]["error"] == pytest.approx(by_triples(items, frames, True))


def test_equal_tokens_are_at_chance_and_separate_ones_perfect():
    items = [Item(name, "", speaker) for name in "ab" for speaker in "st" for _ in range(3)]
    same = [np.array([[1.0, 0.0]])] * 12
    found = abx.abx(items, same)
    assert found["within"]["error"] == found["across"]["error"] == 0.5
    apart = [np.eye(2)[[ord(item.name) - ord("a")]] for item in items]
    assert abx.abx(items, apart)["across"] == {"error": 0.0, "pairs": 1}
    alone = abx.abx(items[:3] + items[6:9], apart[:3] + apart[6:9])
    assert alone["across"] is None
    with pytest.raises(UserError, match="no context holds a class with two tokens"):
        abx.abx(items[:3], apart[:3])


def test_a_collapsed_encoder_is_at_chance_exactly():
    """Its frames are of one direction, up to the last bit of what is normalised."""
    rng = RNG(0)
    point = rng.normal(size=7)
    items = [Item(name, "", speaker) for name in "ab" for speaker in "st" for _ in range(3)]
    scales = [rng.uniform(0.1, 9.0, (int(rng.integers(1, 5)), 1)) for _ in items]
    found = abx.abx(items, [normalize(scale * point) for scale in scales])
    assert found["within"]["error"] == found["across"]["error"] == 0.5


def test_large_groups_are_thinned():
    items = [Item("a", "", "")] * 30 + [Item("b", "", "")] * 4
    kept = abx.drawn(items, 10, 0)
    assert [sum(i < 30 for i in kept), sum(i >= 30 for i in kept)] == [10, 4]
    assert abx.drawn(items, 10, 0) == kept != abx.drawn(items, 10, 1)


# --- suites


@pytest.fixture
def run(tmp_path, monkeypatch):
    return tone_run(tmp_path, monkeypatch)


@pytest.mark.parametrize("words", [["label=tone"], ["segments=parts"]])
def test_abx_of_tones(run, words):
    suites.main("abx", str(run), [*words, "speaker=voice", "resamples=20"])
    found = results.read(run / "results_abx.json")
    assert found["abx"]["tokens"] == (18 if words[0] == "label=tone" else 36)
    for part in (found["abx"], found["random_encoder"]["abx"], found["trivial"]["abx"]["signal"]):
        assert part["within"]["error"] < 0.1  # pure tones
        assert part["across"]["error"] < 0.1
        assert part["across"]["pairs"] == 3
    assert len(found["abx"]["within"]["ci"]["error"]) == 2


def test_clips_without_an_asked_field_are_left_out_and_counted(run, monkeypatch):
    def batches(session, *args):
        for batch in plain(session, *args):
            for i, meta in enumerate(batch.meta):
                meta |= {"even": [1, None][i % 2], "odd": [None, 1][i % 2], "none": []}
                if i % 2:
                    meta.pop("voice")
            yield batch

    plain = Session.batches
    monkeypatch.setattr(Session, "batches", batches)
    options = abx.Options(label="tone", speaker="voice", random=False, resamples=0)
    found = abx.evaluate(Session.open(run, options))
    assert (found["abx"]["tokens"], found["abx"]["unlabelled"]) == (9, 9)
    every = abx.evaluate(Session.open(run, options.model_copy(update={"speaker": ""})))
    assert (every["abx"]["tokens"], every["abx"]["unlabelled"]) == (18, 0)
    options = unit_suite.Options(label="tone", context="voice", clusters=3, random=False)
    found = unit_suite.evaluate(Session.open(run, options))["units"]
    assert (found["clips"], found["unlabelled"]) == (9, 9)
    for words in ({"label": "even", "context": "odd"}, {"segments": "none"}):
        session = Session.open(run, abx.Options(**words))
        together = ", ".join(f"{option}={field}" for option, field in words.items())
        with pytest.raises(UserError, match=f"has a value of all of {together}; name other"):
            abx.evaluate(session)


def test_units_of_tones(run):
    suites.main("units", str(run), ["label=tone", "clusters=3", "resamples=20"])
    found = results.read(run / "results_units.json")
    signal = found["trivial"]["units"]["signal"]
    assert signal["pnmi"] > 0.9
    assert found["trivial"]["units"]["majority"] == pytest.approx(1 / 3)
    assert found["units"]["clips"] == 18
    assert 0 <= found["units"]["pnmi"] <= 1
    assert "ci" not in found["units"]  # fewer clips than parts of the bootstrap


def test_units_of_a_side_car(run, tmp_path):
    path = tmp_path / "units.safetensors"
    options = unit_suite.Options(label="tone", units=str(path), resamples=0)
    session = Session.open(run, options)
    tones = {c.key: s[0].name for c, s in spans.labelled_clips(session, options, [])}
    rng = RNG(0)
    ids = {k: np.repeat(rng.integers(0, 5, 10), 5) + 5 * (n == "low") for k, n in tones.items()}
    with writing(path, LabelInfo(Source("x", 50.0), (10,), "s")) as writer:
        for key, x in ids.items():
            writer.add(key, x[:, None], 1.0)
    found = unit_suite.evaluate(session)
    classes = np.repeat([NAMES.index(n) for n in tones.values()], 50)
    peer = homogeneity_score(classes, np.concatenate([ids[k] for k in tones]))
    assert found["units"]["pnmi"] == pytest.approx(peer, abs=1e-12)
    runs = sum(1 + (np.diff(x) != 0).sum() for x in ids.values())
    assert found["units"]["mean_segment_s"] == pytest.approx(18 / runs)
    assert "random_encoder" not in found
    with pytest.raises(UserError, match="labels none of these clips"):
        unit_suite.from_sidecar(SideCar(path), ["unknown"])


def test_the_interval_of_units_holds_the_value(run):
    options = unit_suite.Options(label="tone", resamples=200)
    session = Session.open(run, options)
    rng = RNG(0)
    units, where = [], []
    for k in range(60):
        y = k % 3
        units.append(
            unit_suite.Units(np.where(rng.random(50) < 0.5, y, rng.integers(0, 3, 50)), 50, 0)
        )
        where.append([spans.Span(-np.inf, np.inf, NAMES[y], "")])
    found = unit_suite.measured(units, where, list(NAMES), 3, session)
    low, high = found["ci"]["pnmi"]
    assert low < found["pnmi"] < high
    assert high - low < 0.2


def test_frames_belong_to_the_stretch_around_their_centre():
    span = spans.Span(0.1, 0.3, "x", "")
    assert span.holds(6, 20.0, 0.025).tolist() == [False, False, True, True, True, True]
    units = unit_suite.Units(np.zeros(6, np.int64), 20.0, 0.025)
    other = spans.Span(0.0, 0.1, "y", "")
    classes = unit_suite.frame_classes(units, [span, other], ["x", "y"])
    assert classes.tolist() == [1, 1, 0, 0, 0, 0]
    assert unit_suite.frame_classes(units, [other], ["y"]).tolist() == [0, 0, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("suite", "words", "message"),
    [
        ("abx", ["label=no"], "label=no: no clip of this data has that field"),
        ("abx", ["label=tone", "speaker=no"], "speaker=no: no clip of this data has that field"),
        ("abx", ["segments=parts", "context=no"], "context=no: no clip of this data has"),
        ("units", ["label=tone", "context=no"], "context=no: no clip of this data has that field"),
        ("abx", ["segments=no"], "segments=no: no clip of this data has that field"),
        ("abx", ["segments=tone"], "is not .start s, end s, class."),
        ("abx", ["label=tone", "layer=all"], "layer=all: this suite compares frames of one layer"),
        ("abx", ["label=fold", "context=tone", "speaker=source"], "no context holds a class with"),
        ("units", ["label=tone", "modality=text"], "no view of text"),
        ("units", ["label=has"], "at least two classes are needed"),
        ("units", ["label=tone", "clusters=100000"], "ask for fewer"),
        ("units", ["label=tone", "units=none"], "no such side-car"),
    ],
)
def test_bad_input(run, suite, words, message):
    with pytest.raises(UserError, match=message):
        suites.main(suite, str(run), [*words, "random=false"])
