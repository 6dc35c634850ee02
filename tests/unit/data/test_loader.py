"""Order, exact continuation, presence, blending, damage and evaluation order."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_child import digest

from mmssl.data import collate, guarded
from mmssl.data import loader as loading
from mmssl.data.loader import train_loader
from mmssl.data.ordered import eval_batches
from mmssl.specs import AugmentSpec, DataSpec, ViewSpec
from mmssl.types import UserError

VIEWS = {
    "audio": ViewSpec(
        modality="audio", crop_s=0.5, augment=[AugmentSpec(kind="gain"), AugmentSpec(kind="noise")]
    ),
    "video": ViewSpec(
        modality="video", crop_s=0.5, fps=5, size=24, augment=[AugmentSpec(kind="horizontal_flip")]
    ),
    "text": ViewSpec(modality="text", length=8),
}
ROOT = Path(__file__).parents[3]


def spec(shards, **changes):
    return DataSpec(train=str(shards), **{"workers": 0, **changes})


def make(shards, tokenizer, micro_batch=4, seed=0, rank=0, world=1, views=VIEWS, **changes):
    files = changes.pop("ledger", None), changes.pop("quarantine", None)
    return train_loader(
        spec(shards, **changes), views, micro_batch, seed, rank, world, tokenizer, *files
    )


def take(loader, count):
    try:
        return [digest(next(loader)) for _ in range(count)]
    finally:
        loader.close()


# --- order


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_holds_every_sample_once(shards, tokenizer, workers):
    """Each reader goes through its own stretch before it repeats anything."""
    loader = make(shards, tokenizer, workers=workers)
    seen = list(itertools.chain(*(b[1] for b in take(loader, 20))))
    assert sorted(seen[:40]) == list(range(40))
    assert Counter(seen) == dict.fromkeys(range(40), 2)
    assert seen[:40] != sorted(seen[:40])
    assert seen[:40] != seen[40:]


def test_neighbours_in_the_shard_are_not_neighbours_in_the_batch(shards, tokenizer):
    seen = list(itertools.chain(*(b[1] for b in take(make(shards, tokenizer), 40))))
    steps = np.diff(seen)
    assert np.mean(steps == 1) < 0.1


def test_ranks_share_the_data_without_overlap(shards, tokenizer):
    parts = [
        set(itertools.chain(*(b[1] for b in take(make(shards, tokenizer, rank=r, world=2), 5))))
        for r in range(2)
    ]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(40))


def test_seed_decides_order_and_augmentation(shards, tokenizer):
    first, again, other = (take(make(shards, tokenizer, seed=s), 3) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_visits_of_one_sample_differ(shards, tokenizer):
    """The second epoch augments the same clips otherwise."""
    seen = {}
    for keys, _, sums in take(make(shards, tokenizer, micro_batch=1), 80):
        if sums["audio"][1] != [0]:
            seen.setdefault(keys[0], []).append(sums["audio"][1][0])
    assert all(len(seeds) == 2 and seeds[0] != seeds[1] for seeds in seen.values())


def test_fewer_shards_than_readers_work(shards, tokenizer):
    """Readers share shards, since they split the samples."""
    seen = take(make(shards, tokenizer, rank=0, world=8), 2) + take(
        make(shards, tokenizer, rank=7, world=8), 2
    )
    indices = list(itertools.chain(*(b[1] for b in seen)))
    assert len(set(indices[:5] + indices[8:13])) == 10


# --- continuation


def child(tmp_path, state, take, **plan):
    path = ""
    if state is not None:
        path = str(tmp_path / "state.pt")
        torch.save(state, path)
    plan = {"state": path, "take": take, "rank": 0, "world": 1, "seed": 0, **plan}
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    script = Path(__file__).with_name("loader_child.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(plan)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("workers", "stop", "changes"),
    [
        (0, 7, {"shuffle_buffer": 8}),
        (2, 13, {}),
    ],
)
def test_continues_exactly_in_a_new_process(shards, tokenizer, tmp_path, workers, stop, changes):
    """R3: keys, seeds, starts and tensors after the stop are those of the uninterrupted run."""
    loader = make(shards, tokenizer, workers=workers, **changes)
    before = [digest(next(loader)) for _ in range(stop)]
    state = loader.state()
    after = take(loader, 14)
    (tmp_path / "tok.model").write_bytes(tokenizer.model)
    continued = child(
        tmp_path,
        state,
        14,
        data=spec(shards, workers=workers, **changes).model_dump(),
        views={n: v.model_dump() for n, v in VIEWS.items()},
        micro_batch=4,
        tokenizer=str(tmp_path / "tok.model"),
    )
    assert json.loads(json.dumps(after)) == continued
    assert before[-1] not in continued


@pytest.mark.parametrize("stop", [1, 10, 11])
@pytest.mark.parametrize("changes", [{}, {"shuffle_buffer": 8}, {"rank": 1, "world": 2}])
def test_continues_exactly_around_epoch_borders(shards, tokenizer, tmp_path, stop, changes):
    loader = make(shards, tokenizer, **changes)
    for _ in range(stop):
        next(loader)
    torch.save(loader.state(), tmp_path / "s.pt")
    other = make(shards, tokenizer, **changes)
    other.restore(loading.load_state(tmp_path / "s.pt"))
    assert take(loader, 12) == take(other, 12)


def test_borrowed_segments_are_the_same_after_a_restore(shards, tokenizer):
    segments = {"pairing": "next", "short": 0.3}
    views = {"text": ViewSpec(modality="text", length=16, segments=segments)}

    def rows(loader, count):
        found = [next(loader).views["text"] for _ in range(count)]
        return [(v.data.tolist(), v.split_P.tolist(), v.order_P.tolist()) for v in found]

    loader = make(shards, tokenizer, micro_batch=8, views=views)
    rows(loader, 3)
    state, after = loader.state(), rows(loader, 6)
    loader.close()
    other = make(shards, tokenizer, micro_batch=8, views=views)
    other.restore(state)
    assert rows(other, 6) == after
    other.close()
    orders = [o for _, _, order in after for o in order]
    assert {0, 1} <= set(orders)
    whole = list(eval_batches(shards, spec(shards), views, 8, tokenizer))
    again = list(eval_batches(shards, spec(shards), views, 8, tokenizer))
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.views["text"].data, b.views["text"].data)


def test_pinning_covers_the_whole_batch(shards, tokenizer, monkeypatch):
    """torch's loader pins what has a `pin_memory` method; there is one block to pin."""
    from torch.utils.data._utils.pin_memory import pin_memory

    calls = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda t, *_: calls.append(t.numel()) or t.clone()
    )
    batch = collate.pack([], VIEWS, shared=False)
    pinned = pin_memory((0, 1, batch))[2]
    assert calls == [batch.block.numel()]
    assert pinned.unpack().size == 0


def test_state_before_the_first_batch(shards, tokenizer):
    loader = make(shards, tokenizer)
    state = loader.state()
    other = make(shards, tokenizer)
    other.restore(state)
    assert take(loader, 2) == take(other, 2)


def test_state_of_a_restored_loader(shards, tokenizer, tmp_path):
    """Save, restore, save at once: nothing is lost."""
    loader = make(shards, tokenizer)
    next(loader)
    second = make(shards, tokenizer)
    second.restore(loader.state())
    third = make(shards, tokenizer)
    third.restore(second.state())
    assert take(loader, 3) == take(third, 3)


def test_state_files_are_plain_data(shards, tokenizer, tmp_path):
    loader = make(shards, tokenizer, workers=1)
    next(loader)
    torch.save(loader.state(), tmp_path / "s.pt")
    loader.close()
    assert set(loading.load_state(tmp_path / "s.pt")) == {"identity", "position", "skipped"}


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_state_files_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"identity": Evil(), "position": None}, "evil.pt")
    for name, content in (("evil.pt", None), ("text.pt", b"hello"), ("empty.pt", b"")):
        if content is not None:
            Path(name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            loading.load_state(name)
    torch.save([1], "list.pt")
    with pytest.raises(UserError, match="not a loader state"):
        loading.load_state("list.pt")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed = 0, this run has 5"),
        ({"micro_batch": 8}, "micro_batch = 4, this run has 8"),
        ({"world": 2}, "world = 1, this run has 2"),
        ({"workers": 1}, "workers = 0, this run has 1"),
    ],
)
def test_another_layout_is_refused(shards, tokenizer, change, message):
    loader = make(shards, tokenizer)
    next(loader)
    state = loader.state()
    with pytest.raises(UserError, match=message):
        make(shards, tokenizer, **change).restore(state)


def phase(shards, tokenizer, world, workers, rounds, states=None, seed=0):
    """What all ranks read in so many rounds of their readers, and the states behind."""
    seen, after = [], []
    for rank in range(world):
        place = {"seed": seed, "rank": rank, "world": world, "workers": workers}
        loader = make(shards, tokenizer, micro_batch=2, **place)
        if states is not None:
            loader.redistribute(states)
        seen += [str(digest(next(loader))) for _ in range(rounds * workers)]
        after.append(loader.state())
        loader.close()
    return seen, after


@pytest.mark.parametrize("sizes", [(2, 1, 4, 2), (4, 2, 1)])
def test_other_numbers_of_ranks_read_on_without_loss_or_repetition(shards, tokenizer, sizes):
    """The same batches, augmented alike, in whatever order; across the end of an epoch."""
    readers, rounds = 4, 3
    whole, _ = phase(shards, tokenizer, sizes[0], readers // sizes[0], rounds * len(sizes))
    seen, states = [], None
    for world in sizes:
        part, states = phase(shards, tokenizer, world, readers // world, rounds, states)
        seen += part
    assert Counter(seen) == Counter(whole)
    assert max(Counter(whole).values()) == 1


def test_a_reader_keeps_its_place_when_ranks_change_amid_a_round(shards, tokenizer):
    """Nothing is lost or read twice, though some readers are one batch ahead."""
    loader = make(shards, tokenizer, micro_batch=2, workers=4)
    first = [next(loader) for _ in range(6)]
    states = [loader.state()]
    loader.close()
    rest, _ = phase(shards, tokenizer, 2, 2, 4, states)
    loader = make(shards, tokenizer, micro_batch=2, workers=4)
    whole = [next(loader) for _ in range(24)]
    loader.close()
    known, read = ({str(digest(batch)) for batch in part} for part in (whole, first))
    assert len(set(rest)) == 16
    assert set(rest) <= known - read


def test_joined_batches_are_those_of_the_readers_in_turn(shards, tokenizer):
    single = make(shards, tokenizer, micro_batch=2, workers=2)
    keys = [next(single).keys for _ in range(6)]
    single.close()
    joined = train_loader(spec(shards, workers=2), VIEWS, 2, 0, 0, 1, tokenizer, joined=3)
    batches = [next(joined) for _ in range(2)]
    joined.close()
    assert [b.keys for b in batches] == [keys[0] + keys[1] + keys[2], keys[3] + keys[4] + keys[5]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 1}, "4 readers; this run has 1 ranks x 1 workers"),
        ({"workers": 0}, "4 readers; this run has 1 ranks x 0 workers"),
        ({"workers": 4, "seed": 3}, "seed = 0, this run has 3"),
        ({"workers": 4, "micro_batch": 4}, "micro_batch = 2, this run has 4"),
    ],
)
def test_another_number_of_readers_is_refused(shards, tokenizer, change, message):
    _, states = phase(shards, tokenizer, 2, 2, 1)
    with pytest.raises(UserError, match=message):
        make(shards, tokenizer, **{"micro_batch": 2, **change}).redistribute(states)


def test_other_shards_are_refused(shards, tokenizer, tmp_path):
    loader = make(shards, tokenizer)
    next(loader)
    state = loader.state()
    state["identity"] = {**state["identity"], "folders": [[1.0, ["0" * 64]]]}
    with pytest.raises(UserError, match="belongs to other shards"):
        make(shards, tokenizer).restore(state)
    with pytest.raises(RuntimeError, match="before the first batch"):
        loader.restore(loader.state())


def test_malformed_position_is_refused(shards, tokenizer):
    loader = make(shards, tokenizer)
    next(loader)
    state = {**loader.state(), "position": {"__state__": "os.system"}}
    with pytest.raises(UserError, match="unreadable"):
        make(shards, tokenizer).restore(state)


# --- content


def test_presence_follows_the_manifest(shards, tokenizer):
    loader = make(shards, tokenizer, micro_batch=40)
    batch = next(loader)
    for modality, place in (("text", 2), ("audio", 4), ("video", 7)):
        present = batch.views[modality].present_B
        assert [bool(p) for p in present] == [i % 8 != place for i in batch.index_B.tolist()]
    assert (batch.text_B == 0).tolist() == [i % 8 == 2 for i in batch.index_B.tolist()]
    same_source = batch.source_B[batch.index_B.argsort()].view(20, 2)
    assert (same_source[:, 0] == same_source[:, 1]).all()
    assert len(batch.source_B.unique()) == 20


def test_views_of_one_window_share_their_start(shards, tokenizer):
    batch = next(make(shards, tokenizer, micro_batch=40))
    starts = {}
    for name in ("audio", "video"):
        view = batch.views[name]
        starts[name] = dict(zip(view.rows_P.tolist(), view.start_s_P.tolist(), strict=True))
    both = starts["audio"].keys() & starts["video"].keys()
    assert len(both) == 30
    assert all(starts["audio"][row] == starts["video"][row] for row in both)
    assert len({round(v, 3) for v in starts["audio"].values()}) > 3


@pytest.mark.parametrize(("power", "share"), [(0.5, 1 / 11), (1.0, 0.0099), (0.0, 0.5)])
def test_blend_follows_the_weights(shards, tokenizer, tmp_path, power, share):
    """Languages of 1000 and 10 hours under XLS-R's temperature: the weights are n^power."""
    shutil.copytree(shards, tmp_path / "twin")
    weights = {str(shards): 1000**power, str(tmp_path / "twin"): 10**power}
    data = DataSpec(train=weights, workers=0)
    views = {"text": VIEWS["text"]}
    loader = train_loader(data, views, 40, 0, 0, 1, tokenizer)
    # Both hold the same clips; Energon's key of the visit tells which one was drawn.
    drawn = Counter()
    original = loading.to_sample

    def spy(crude):
        drawn[crude["__sources__"][0].dataset_path.local_path().name] += 1
        return original(crude)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "to_sample", spy)
        take(loader, 50)
    # 2000 draws: four standard errors
    width = 4 * (share * (1 - share) / 2000) ** 0.5
    assert drawn["twin"] / sum(drawn.values()) == pytest.approx(share, abs=width)


def test_workers_use_one_thread(shards, tokenizer, monkeypatch):
    original = collate.pack
    monkeypatch.setattr(
        guarded,
        "pack",
        lambda *a, **k: (
            collate.failed(str(torch.get_num_threads())) if k["shared"] else original(*a, **k)
        ),
    )
    loader = make(shards, tokenizer, workers=1)
    with pytest.raises(UserError, match=r"^1$"):
        next(loader)
    loader.close()


# --- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ""}, "data.train is empty"),
        ({"train": "/nowhere/at/all"}, "/nowhere/at/all: no such shard folder"),
        (
            {"world": 30, "workers": 2},
            r"40 samples for 60 readers \(30 ranks x 2 workers\).*data.workers to 1",
        ),
        ({"weight": 0.0}, "weight of .* is 0.0"),
    ],
)
def test_start_up_errors_name_the_remedy(shards, tokenizer, changes, message):
    train = changes.get("train", str(shards))
    if "weight" in changes:
        train = {train: changes["weight"]}
    data = DataSpec(train=train, workers=changes.get("workers", 0))
    with pytest.raises(UserError, match=message):
        train_loader(data, VIEWS, 4, 0, 0, changes.get("world", 1), tokenizer)


def test_text_needs_a_tokenizer(shards):
    with pytest.raises(UserError, match=r"views\.text: a text view needs `data\.tokenizer`"):
        make(shards, None)


def damage(folder, wrong):
    """Flip one byte in the media of the given fraction of samples."""
    import tarfile

    for path in sorted(folder.glob("*.tar")):
        raw = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            media = [m for m in tar if m.name.endswith((".mp4", ".m4a"))]
        for k, member in enumerate(media):
            if wrong(k):
                raw[member.offset_data + member.size // 2] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_skipped_and_counted(shards, tokenizer, tmp_path, workers):
    shutil.copytree(shards, tmp_path / "set")
    damage(tmp_path / "set", lambda k: k == 3)
    ledger = tmp_path / "ledger.jsonl"
    loader = make(tmp_path / "set", tokenizer, workers=workers, max_bad_share=0.5, ledger=ledger)
    seen = set(itertools.chain(*(b[1] for b in take(loader, 18))))
    assert seen == set(range(40)) - {3, 13, 23, 33}
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert {(x["reason"], x["shard"]) for x in lines} == {
        ("crc", f"shard-{i:06d}.tar") for i in range(4)
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_training(shards, tokenizer, tmp_path, workers):
    shutil.copytree(shards, tmp_path / "set")
    damage(tmp_path / "set", lambda k: k % 2 == 0)
    loader = make(tmp_path / "set", tokenizer, workers=workers, max_bad_share=0.01)
    with pytest.raises(
        UserError, match=r"11 of the last \d+ samples.*max_bad_share = 0.01.*crc 11.*check_shards"
    ):
        take(loader, 20)


def test_structural_damage_is_skipped(shards, tokenizer, tmp_path):
    """A tar cut in the middle: its first samples are still read, the rest is counted."""
    shutil.copytree(shards, tmp_path / "set")
    path = tmp_path / "set" / "shard-000002.tar"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    ledger = tmp_path / "ledger.jsonl"
    loader = make(tmp_path / "set", tokenizer, max_bad_share=0.5, ledger=ledger)
    seen = set(itertools.chain(*(b[1] for b in take(loader, 12))))
    assert seen >= set(range(20)) | set(range(30, 40)) | {20, 21, 22}
    reasons = Counter(json.loads(line)["reason"] for line in ledger.read_text().splitlines())
    assert set(reasons) <= {"tar", "crc", "json", "members"}
    assert reasons["tar"] >= 4


def test_wrong_settings_stop_at_once(shards, tokenizer):
    """An error of the configuration is no bad sample."""
    views = {"video": VIEWS["video"].model_copy(update={"size": 16})}
    loader = make(shards, tokenizer, views=views, max_bad_share=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mmssl.views.video.fit", lambda *_: (_ for _ in ()).throw(UserError("too small"))
        )
        with pytest.raises(UserError, match="too small"):
            next(loader)


# --- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_in_manifest_order_and_repeats(shards, tokenizer, workers):
    def run():
        return list(eval_batches(shards, spec(shards), VIEWS, 7, tokenizer, workers=workers))

    batches = run()
    assert list(itertools.chain(*(b.index_B.tolist() for b in batches))) == list(range(40))
    assert [b.size for b in batches] == [7] * 5 + [5]
    assert [digest(b) for b in batches] == [digest(b) for b in run()]
    assert all(v.start_s_P.eq(0).all() for b in batches for v in b.views.values())
    meta = batches[0].meta[1]
    assert meta["number"] == 1
    assert meta["captions"] == ["clip number 1 shows a moving pattern"]
    assert (meta["source"], meta["stored_size"]) == ("source 0", [32, 32])
    assert meta["has"] == ["audio", "text", "video"]
    assert meta["duration_s"] == pytest.approx(1.0, abs=1e-3)


def test_evaluation_does_not_augment(shards, tokenizer):
    plain = {n: v.model_copy(update={"augment": []}) for n, v in VIEWS.items()}
    a, b = (next(eval_batches(shards, spec(shards), v, 8, tokenizer)) for v in (VIEWS, plain))
    for name in VIEWS:
        assert torch.equal(a.views[name].data, b.views[name].data)


def test_evaluation_limit_and_damage(shards, tokenizer, tmp_path):
    shutil.copytree(shards, tmp_path / "set")
    damage(tmp_path / "set", lambda k: k == 3)
    data = spec(tmp_path / "set", max_bad_share=0.5)
    indices = [
        i
        for batch in eval_batches(tmp_path / "set", data, VIEWS, 4, tokenizer, limit=15, workers=1)
        for i in batch.index_B.tolist()
    ]
    assert indices == [i for i in range(15) if i not in (3, 13)]
    strict = spec(tmp_path / "set", max_bad_share=0.001)
    with pytest.raises(UserError, match="max_bad_share"):
        list(eval_batches(tmp_path / "set", strict, VIEWS, 4, tokenizer))


# --- deadly samples and dead workers


def deadly(monkeypatch, key_of_number, act):
    """Samples of a row number make their process do something when they are encoded."""
    original = loading.SampleEncoder.__call__

    def encode(self, sample):
        item = original(self, sample)
        if item.index in key_of_number:
            act(item.index)
        return item

    monkeypatch.setattr(loading.SampleEncoder, "__call__", encode)


def rows(loader, batches):
    return list(itertools.chain(*(next(loader).index_B.tolist() for _ in range(batches))))


@pytest.mark.parametrize("workers", [0, 2])
def test_deadly_samples_are_tried_once(shards, tokenizer, tmp_path, monkeypatch, workers):
    """Quarantine outlives the process, and the others come as if the samples had been damaged."""
    deadly(monkeypatch, {7, 22}, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    files = {"ledger": tmp_path / "skipped.jsonl", "quarantine": tmp_path / "quarantine.jsonl"}
    text = {"text": VIEWS["text"]}
    options = {"workers": workers, "views": text, "max_bad_share": 1.0, "micro_batch": 1, **files}
    loader = make(shards, tokenizer, **options)
    first = rows(loader, 38)
    assert sorted(first) == [n for n in range(40) if n not in (7, 22)]
    second = rows(loader, 38)
    state, skipped, after = loader.state(), dict(loader.skipped), rows(loader, 5)
    loader.close()
    assert set(first) == set(second)
    assert {k: skipped[k] for k in ("crash", "quarantined")} == {"crash": 2, "quarantined": 2}
    listed = [json.loads(line) for line in files["quarantine"].read_text().splitlines()]
    assert [line["reason"] for line in listed] == ["crash", "crash"]
    other = make(shards, tokenizer, **options)
    other.restore(state)
    assert other.skipped == skipped
    assert rows(other, 5) == after
    other.close()
    monkeypatch.undo()
    deadly(monkeypatch, {7, 22}, lambda n: (_ for _ in ()).throw(ValueError(n)))
    plain = make(shards, tokenizer, **{**options, "quarantine": None})
    assert rows(plain, 38) == first
    assert rows(plain, 38) == second
    plain.close()


def test_a_dead_worker_is_replaced_and_nothing_else_is_lost(
    shards, tokenizer, tmp_path, monkeypatch
):
    """The batches are those of a run in which only the sample in flight was skipped."""
    text = {"text": VIEWS["text"]}
    options = {
        "workers": 2,
        "views": text,
        "max_bad_share": 1.0,
        "micro_batch": 2,
        "isolate": False,
    }
    deadly(monkeypatch, {13}, lambda n: (_ for _ in ()).throw(ValueError(n)))
    plain = make(shards, tokenizer, **options)
    expected = [next(plain).keys for _ in range(30)]
    plain.close()
    monkeypatch.undo()
    deadly(monkeypatch, {13}, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    listed = tmp_path / "quarantine.jsonl"
    loader = make(shards, tokenizer, **options, quarantine=listed)
    monkeypatch.setattr(loading, "_REMEMBER_EVERY", 5)
    assert [next(loader).keys for _ in range(30)] == expected
    (line,) = [json.loads(text) for text in listed.read_text().splitlines()]
    assert line["reason"] == "worker"
    assert loader.skipped["quarantined"] >= 1
    state = loader.state()
    after = [next(loader).keys for _ in range(4)]
    loader.close()
    other = make(shards, tokenizer, **options, quarantine=listed)
    other.restore(state)
    assert [next(other).keys for _ in range(4)] == after
    other.close()


def test_a_worker_killed_from_outside_is_replaced(shards, tokenizer):
    text = {"text": VIEWS["text"]}
    options = {"workers": 2, "views": text, "micro_batch": 2}
    plain = make(shards, tokenizer, **options)
    expected = [next(plain).keys for _ in range(12)]
    plain.close()
    loader = make(shards, tokenizer, **options)
    found = [next(loader).keys for _ in range(3)]
    flight, quiet = loader._task.flight._memory, 0
    while quiet < 20:  # until both workers have made their batches in advance
        quiet = 0 if any(flight[:]) else quiet + 1
        time.sleep(0.05)
    os.kill(loader._loader._iterator._workers[1].pid, signal.SIGKILL)
    state = loader.state()  # asks the dead one
    found += [next(loader).keys for _ in range(9)]
    loader.close()
    assert found == expected
    other = make(shards, tokenizer, **options)
    other.restore(state)
    assert [next(other).keys for _ in range(9)] == expected[3:]
    other.close()


def test_workers_that_die_again_and_again_end_the_run(shards, tokenizer, monkeypatch):
    deadly(monkeypatch, range(40), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(loading, "_MAX_DEATHS", 1)
    options = {"views": {"text": VIEWS["text"]}, "isolate": False, "max_bad_share": 1.0}
    loader = make(shards, tokenizer, workers=1, **options)
    with pytest.raises(UserError, match=r"died 2 times, the last one over k?.*data\.workers"):
        next(loader)
    loader.close()


def test_skipped_samples_are_told_by_reason(shards, tokenizer, tmp_path):
    shutil.copytree(shards, tmp_path / "set")
    damage(tmp_path / "set", lambda k: k == 3)
    loader = make(tmp_path / "set", tokenizer, micro_batch=36, max_bad_share=1.0)
    next(loader)
    next(loader)
    assert loader.skipped["crc"] in (7, 8)  # of two epochs, but for what the last batch left
    loader.close()


def test_workers_that_are_asked_to_end_accuse_no_sample(shards, tokenizer, tmp_path, monkeypatch):
    """A SIGTERM to every process, and one to the process group, which workers are not in."""
    options = {"workers": 2, "views": {"text": VIEWS["text"]}, "micro_batch": 2, "isolate": False}
    plain = make(shards, tokenizer, **options)
    expected = [next(plain).keys for _ in range(30)]
    plain.close()
    mark, listed = tmp_path / "asked", tmp_path / "quarantine.jsonl"

    def ask_once(_):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGTERM)

    deadly(monkeypatch, {13}, ask_once)
    loader = make(shards, tokenizer, **options, quarantine=listed)
    assert [next(loader).keys for _ in range(30)] == expected
    assert mark.exists()
    assert not listed.exists()
    groups = {os.getpgid(worker.pid) for worker in loader._loader._iterator._workers}
    assert os.getpgrp() not in groups
    loader.close()
