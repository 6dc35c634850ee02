"""Streaming k-means: what it finds, what it holds in memory, and that it repeats."""

import tracemalloc
import weakref

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from mmssl.data.sidecars import Source
from mmssl.targets.clusters import Clusters, _sample, _sweep, fit, fit_together
from mmssl.types import UserError

SOURCE = Source("test", 100.0, 0.0125)


def blobs(count=8, per=200, width=5, spread=0.1, seed=0):
    """(N, D) points around far centres, and which centre each belongs to, in random order."""
    rng = np.random.default_rng(seed)
    centres = 10 * rng.standard_normal((count, width))
    which = rng.permutation(np.repeat(np.arange(count), per))
    points = centres[which] + spread * rng.standard_normal((len(which), width))
    return points.astype(np.float32), which


def pieces(points, size=97):
    return lambda: (points[i : i + size] for i in range(0, len(points), size))


def counted(points):
    """A stream of them, and a list that grows with every pass."""
    calls = []

    def stream():
        calls.append(1)
        return pieces(points)()

    return stream, calls


def test_separated_blobs_are_found_up_to_their_numbering():
    points, which = blobs()
    found = fit(pieces(points), 8, SOURCE, points=400)
    ids = found.assign(points)
    assert adjusted_rand_score(which, ids) == 1.0
    assert len(set(zip(which, ids, strict=True))) == 8
    # the mean squared distance of the points is D sigma^2
    assert found.inertia[-1] == pytest.approx(5 * 0.01, rel=0.05)
    assert found.count == 8


def test_sweeps_are_iterations_of_lloyd():
    """From the same start, scikit-learn ends at the same centres and inertia."""
    points = np.random.default_rng(0).standard_normal((3000, 6)).astype(np.float32)
    start = fit(pieces(points), 20, SOURCE, sweeps=0, points=200, restarts=1)
    ours = fit(pieces(points), 20, SOURCE, sweeps=4, points=200, restarts=1, tolerance=0.0)
    theirs = KMeans(20, init=start.centres_KD, n_init=1, max_iter=4, tol=0, algorithm="lloyd")
    theirs.fit(points)
    np.testing.assert_allclose(ours.centres_KD, theirs.cluster_centers_, atol=1e-5)
    np.testing.assert_array_equal(ours.assign(points), theirs.predict(points))
    assert start.inertia == ()
    assert list(ours.inertia) == sorted(ours.inertia, reverse=True)
    first = np.square(points - start.centres_KD[start.assign(points)]).sum(1).mean()
    assert ours.inertia[0] == pytest.approx(first, rel=1e-5)


def test_it_stops_when_a_sweep_brings_nothing():
    points, _ = blobs()
    stream, calls = counted(points)
    found = fit(stream, 8, SOURCE, sweeps=50, points=len(points) - 1)
    assert len(found.inertia) < 5
    assert len(calls) == 1 + len(found.inertia)


def test_several_clusterings_share_the_passes():
    """Each is bit for bit what it is alone, though one settles before the others."""
    points, _ = blobs(spread=0.5)
    stream, calls = counted(points)
    options = {"sweeps": 20, "points": 500}
    alone = [fit(stream, size, SOURCE, **options) for size in (2, 8, 30)]
    passes = [1 + len(one.inertia) for one in alone]
    assert len(calls) == sum(passes)
    calls.clear()
    together = fit_together(stream, (2, 8, 30), SOURCE, **options)
    assert len(calls) == max(passes) > min(passes)
    for one, other in zip(alone, together, strict=True):
        assert one.inertia == other.inertia
        np.testing.assert_array_equal(one.centres_KD, other.centres_KD)


def test_a_sample_that_holds_the_stream_is_swept_in_its_place():
    points, _ = blobs(spread=3.0)
    stream, calls = counted(points)
    options = {"sweeps": 4, "tolerance": -1.0}
    held = fit(stream, 8, SOURCE, points=len(points), **options)
    assert (len(calls), len(held.inertia)) == (1, 4)
    start = fit(stream, 8, SOURCE, points=len(points), sweeps=0)
    theirs = KMeans(8, init=start.centres_KD, n_init=1, max_iter=4, tol=0, algorithm="lloyd")
    np.testing.assert_allclose(held.centres_KD, theirs.fit(points).cluster_centers_, atol=1e-5)


def test_memory_holds_the_sample_and_one_piece():
    """12.8 MB of features pass by; one piece at a time is alive, and the peak is far below."""
    alive, most = [], []

    def stream():
        for seed in range(50):
            alive[:] = [ref for ref in alive if ref() is not None]
            most.append(len(alive))
            yield tracked(np.random.default_rng(seed).standard_normal((4000, 16), np.float32))

    def tracked(array):
        alive.append(weakref.ref(array))
        return array

    fit(stream, 4, SOURCE, sweeps=1, points=1000, restarts=1)  # imports, first allocations
    most.clear()
    tracemalloc.start()
    fit(stream, 4, SOURCE, sweeps=2, points=1000, restarts=1, tolerance=-1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(most) == 3 * 50
    assert max(most) == 0  # nothing is left of a piece when the next one is made
    assert peak < 3e6


def test_large_pieces_change_nothing_but_rounding():
    points, _ = blobs(spread=3.0)
    small, large = (fit(pieces(points, size), 8, SOURCE) for size in (10, len(points)))
    np.testing.assert_allclose(small.centres_KD, large.centres_KD, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    points, _ = blobs(spread=5.0)
    made = [fit(pieces(points), 8, SOURCE, points=100, seed=s) for s in (3, 3, 4)]
    for i, clusters in enumerate(made):
        clusters.save(tmp_path / str(i))
    first, again, other = ((tmp_path / str(i)).read_bytes() for i in range(3))
    assert first == again != other
    assert made[0].digest == made[1].digest != made[2].digest


def test_the_sample_is_uniform_and_does_not_see_the_pieces():
    numbers = np.arange(20_000, dtype=np.float32)[:, None]
    kept = [
        _sample(pieces(numbers, size)(), 1000, np.random.default_rng(1))[0][:, 0]
        for size in (7, 333, 20_000)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])
    assert len(set(kept[0])) == 1000
    # mean of 1000 numbers uniform on [0, 20000): standard error 20000 / sqrt(12 * 1000)
    assert abs(kept[0].mean() - 10_000) < 4 * 183
    few, seen = _sample(pieces(numbers[:30])(), 1000, np.random.default_rng(1))
    np.testing.assert_array_equal(few, numbers[:30])
    assert seen == 30


def test_a_cluster_without_frames_moves_to_far_frames():
    points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]], np.float32)
    lost = np.array([[1.0], [500.0], [600.0]], np.float32)
    ((centres, inertia),) = _sweep([lost], [points])
    assert inertia == pytest.approx(np.square(points - 1).mean(), rel=1e-6)
    # the farthest frame, then the one that is farthest from both its centre and that frame
    np.testing.assert_allclose(centres[:, 0], [points.mean(), 9.0, 5.0], atol=1e-6)
    _, counts = np.unique(Clusters(centres, SOURCE).assign(points), return_counts=True)
    assert len(counts) == 3


def test_far_frames_end_where_all_frames_are_centres():
    lost = np.array([[1.0], [2.0], [500.0]], np.float32)
    ((centres, inertia),) = _sweep([lost], [np.array([[1.0], [2.0]], np.float32)])
    assert inertia == 0.0
    np.testing.assert_array_equal(centres, lost)


def test_distances_far_from_zero_keep_their_digits():
    points, which = blobs(spread=0.02)
    near = points * 0.01  # blobs about 0.1 apart
    found = fit(pieces(near + 300.0), 8, SOURCE)
    assert adjusted_rand_score(which, found.assign(near + 300.0)) == 1.0


def test_no_frames_have_no_clusters():
    found = Clusters(np.eye(3, dtype=np.float32), SOURCE)
    assert found.assign(np.empty((0, 3), np.float32)).shape == (0,)


@pytest.mark.parametrize(
    ("points", "clusters", "options", "message"),
    [
        (np.ones((50, 3)), 4, {}, "4 clusters, but the features take 1 different values only"),
        (np.ones((3, 3)), 4, {}, "4 clusters of 3 frames"),
        (np.empty((0, 3)), 4, {}, "4 clusters of 0 frames"),
        (np.full((9, 3), np.nan), 2, {}, "not finite"),
        (np.ones((9, 3)), 0, {}, "0 clusters from 100000 points"),
        (np.ones((9, 3)), 4, {"points": 3}, "4 clusters from 3 points"),
        (np.ones((9, 3)), 4, {"restarts": 0}, "0 restarts"),
        (np.ones((9, 3)), 4, {"sweeps": -1}, "-1 sweeps"),
    ],
)
def test_what_cannot_be_clustered(points, clusters, options, message):
    with pytest.raises(UserError, match=message):
        fit(pieces(points.astype(np.float32)), clusters, SOURCE, **options)


def test_an_empty_stream_is_refused():
    with pytest.raises(UserError, match="2 clusters of 0 frames"):
        fit(lambda: iter(()), 2, SOURCE)


def test_other_features_are_refused():
    found = Clusters(np.eye(3, dtype=np.float32), SOURCE)
    with pytest.raises(UserError, match=r"shape \(4, 2\), the clusters have width 3"):
        found.assign(np.zeros((4, 2), np.float32))
    with pytest.raises(UserError, match="not finite"):
        found.assign(np.full((4, 3), np.inf, np.float32))


def test_file_round_trip(tmp_path):
    source = Source("run/audio", 50.0, 199.5 / 16000, 6, "ab" * 32)
    points, _ = blobs()
    made = fit(pieces(points), 8, source)
    made.save(tmp_path / "deep" / "c.safetensors")
    read = Clusters.load(tmp_path / "deep" / "c.safetensors")
    assert (read.source, read.inertia, read.digest) == (source, made.inertia, made.digest)
    np.testing.assert_array_equal(read.centres_KD, made.centres_KD)
    np.testing.assert_array_equal(read.assign(points), made.assign(points))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match="no such clustering"):
        Clusters.load(path)
    path.write_bytes(b"not a file of this kind")
    with pytest.raises(UserError, match="not a clustering"):
        Clusters.load(path)
    save_file({"centres": np.eye(3, dtype=np.float32)}, path)
    with pytest.raises(UserError, match="the format is None, this version reads"):
        Clusters.load(path)
    save_file({"centres": np.eye(3)}, path, {"mmssl": '{"format": "mmssl-clusters-0"}'})
    with pytest.raises(UserError, match="'mmssl-clusters-0', this version reads"):
        Clusters.load(path)
    for facts in ('{"format": "mmssl-clusters-1"}', "[]", "{"):
        save_file({"centres": np.eye(3)}, path, {"mmssl": facts})
        with pytest.raises(UserError, match="not a clustering, or a damaged one"):
            Clusters.load(path)
