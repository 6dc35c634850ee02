"""`mmssl scoreboard --data DIR`: every method on real sound, pretrained without labels and frozen.

    mmssl scoreboard --data DIR [--methods apc,cpc] [--sets fsdd,esc10] [--out runs/scoreboard]

DIR holds `fsdd/recordings/DIGIT_SPEAKER_INDEX.wav` of the Free Spoken Digit Dataset (3,000
recordings of six speakers at 8 kHz, CC BY-SA 4.0, github.com/Jakobovski/free-spoken-digit-dataset)
and `esc10/CLASS/FOLD-SOURCE-TAKE.ogg`, the ten-class subset of ESC-50 (400 clips of 5 s, CC BY 3.0,
github.com/karolpiczak/ESC-50).

The methods are the runs `configs/runs/*_tiny.yaml` whose `data.train` is FSDD, and `*_esc10.yaml`,
that need nothing but sound, and those that a file with `stages` provides with labels. A clip
becomes mean and deviation over time of what the layers of the encoder say, side by side, with the
frequency cells of a time step side by side (of a convolutional network: its last map of every
stride above 1, and its output); a logistic regression never sees the speaker (FSDD) or
fold (ESC-10) of its test; its C is chosen by leaving out one of the others in turn.
The same network with random weights gets the same choice, and so do statistics of log-mel bands.

On FSDD one pretraining hears all six speakers, the later test speaker included, without labels;
`--held-out true` makes one for each speaker that never hears it. On ESC-10 there is always one
pretraining per fold, without that fold.

Everything is kept under --out: rows that are done (`fsdd/METHOD.json`) stay, an interrupted
training goes on or starts again. `scoreboard.md`, `.json` and `.svg` are written after every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mmssl import config, stages
from mmssl.eval import board, folds, results
from mmssl.eval.abx import Item, abx
from mmssl.eval.corpora import CORPORA, Corpus, make_shards, once, read_clips
from mmssl.eval.features import SIGNAL, FeatureSpec
from mmssl.eval.folds import Fold
from mmssl.eval.layers import LayerFeatures, Nested, encode, encode_signal, nested
from mmssl.eval.options import parse
from mmssl.eval.probe import linear
from mmssl.eval.session import RANDOM, TRAINED, Session
from mmssl.specs import RunSpec, Spec, TowerSpec
from mmssl.types import UserError

TAKES = 5  # recordings of a digit and speaker, the first ones, are FSDD's own test part


class BoardSpec(Spec):
    """What can be set behind `mmssl scoreboard`."""

    data: str = ""  # folder that holds fsdd and esc10
    methods: str = ""  # names with commas between; empty = all
    sets: str = "fsdd,esc10"
    out: str = "runs/scoreboard"
    seed: int = 0
    minutes: float = Field(15.0, gt=0)  # of a row; longer ones (by clock and CPU time) are marked
    held_out: bool = False  # FSDD: a pretraining for each speaker, which never hears it


@dataclass(frozen=True)
class Entry:
    """A method's run: the file to train; of a file with stages, the stage whose run is read.

    folder: of the run, or of all stages. before: the entry of the stage before it that trains.
    """

    name: str
    file: str
    folder: str
    stage: str = ""
    before: Entry | None = None


def main(words: Sequence[str] = ()) -> None:
    """Compute the rows that are missing, then write the table.

    Raises:
        UserError: no or unknown data, method or set; a row or training of other settings in `out`.
    """
    options = parse(BoardSpec, words)
    asked, sets = ([w for w in text.split(",") if w] for text in (options.methods, options.sets))
    if not options.data:
        raise UserError("scoreboard: name the folder of the data, as --data DIR")
    if unknown := [name for name in sets if name not in CORPORA]:
        raise UserError(f"scoreboard: no set `{unknown[0]}`; there are {', '.join(CORPORA)}")
    listed = {name: entries(CORPORA[name]) for name in sets}
    reasons = {n: f"it {why}" for _, left_out in listed.values() for n, why in left_out.items()}
    for name in set(asked) - {entry.name for found, _ in listed.values() for entry in found}:
        raise UserError(f"scoreboard: `{name}`: {reasons.get(name, 'no run of that name')}")
    for name, (found, left_out) in listed.items():
        few = [entry for entry in found if not asked or entry.name in asked]
        Board(CORPORA[name], options).fill(few)
        if not asked:
            print("\n".join(f"{name}: without {n}, which {why}" for n, why in left_out.items()))


# --- which methods


def entries(corpus: Corpus) -> tuple[list[Entry], dict[str, str]]:
    """The runs of a data set that need nothing but sound, and why the others are left out."""
    suffix = corpus.suffix
    names = config.names(("runs",))
    staged = staged_entries(filter(stages.is_staged, names), suffix)
    found, left_out = [], {}
    for file in names:
        method = file.removesuffix(suffix)
        if method == file or stages.is_staged(file):
            continue
        if file in staged:
            found.append(staged[file])
        elif why := unfit(config.load(file), corpus):
            left_out[method] = why
        else:
            found.append(Entry(method, file, method))
    return found, left_out


def staged_entries(files: Iterable[str], suffix: str) -> dict[str, Entry]:
    """Entries of the runs that stages train; files that begin alike share those stages.

    Raises:
        UserError: two files train one run behind different stages.
    """
    found: dict[str, Entry] = {}
    chains: dict[str, list[Any]] = {}
    for file in files:
        before: Entry | None = None
        chain: list[Any] = []
        for stage, record in stages.load(file)[0].stages.items():
            chain = [*chain, (stage, record)]
            if not record.train:
                continue
            if record.train not in found:
                name, folder = record.train.removesuffix(suffix), before.folder if before else file
                found[record.train] = Entry(name, file, folder, stage, before)
                chains[record.train] = chain
            elif chains[record.train] != chain:
                raise UserError(
                    f"scoreboard: {file} and {found[record.train].file} train {record.train} "
                    "behind different stages; give each a run of its own"
                )
            before = found[record.train]
    return found


def unfit(spec: RunSpec, corpus: Corpus) -> str:
    """Why a run cannot be pretrained on the sounds of a data set alone; empty if it can."""
    others = {view.modality for view in spec.views.values()} - {"audio"}
    if others:
        return f"reads {' and '.join(sorted(others))}"
    if spec.data.labels:
        return f"reads labels of the clips ({', '.join(spec.data.labels)})"
    if spec.data.frame_labels:
        return f"reads labels ({', '.join(spec.data.frame_labels)}) that no file with stages makes"
    if corpus.name not in str(spec.data.train).split("/"):
        return f"is made for other sounds ({spec.data.train})"
    towers = [spec.towers.get(view.tower_name) for view in spec.views.values()]
    if not all(isinstance(tower, TowerSpec) for tower in towers):
        return "has no tower whose features could be read"
    return ""


# --- rows


class Board:
    """One data set: its clips, its rows, and what is computed for them."""

    def __init__(self, corpus: Corpus, options: BoardSpec) -> None:
        self.corpus, self.options = corpus, options
        self.work = Path(options.out) / corpus.name
        self.clips = read_clips(corpus, Path(options.data))
        # the groups that a pretraining each never hears; "" = one pretraining hears all
        self.held = [""]
        if corpus.held_out or options.held_out:
            self.held = sorted({meta[corpus.group] for meta in self.clips.values()})

    def fill(self, found: Sequence[Entry]) -> None:
        """Compute the rows that are missing; write the table after each."""
        print(f"{self.corpus.name}: {len(self.clips)} clips, {len(found)} methods", flush=True)
        self._row(board.BASELINE, {}, self._baseline)
        for number, entry in enumerate(found, 1):
            row = self._row(entry.name, self._identity(entry), partial(self._method, entry))
            place = f"{self.corpus.name} {number}/{len(found)} {entry.name}"
            print(f"{place}: {board.words(row)}", flush=True)
            board.write(Path(self.options.out), self.options.minutes)

    def _row(
        self, name: str, about: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A row from its file, or computed and put there."""
        path = self.work / f"{name}.json"
        about = {"method": name, "set": self.corpus.name, "seed": self.options.seed, **about}
        if path.is_file():
            row = results.read(path)
            for key, value in about.items():
                if row.get(key) != value:
                    raise UserError(
                        f"{path}: was made with {key}={row.get(key)}, not {value}; choose another "
                        "--out, or remove it and the run to compute them again"
                    )
            return row
        row = {**about, **compute()} | {
            "manifest_sha256": results.manifest_sha256(self._shards()),
            "protocol": results.PROTOCOL,
            "versions": results.versions(),
            "machine": results.machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        results.write(row, path)
        return row

    def _shards(self, held: str = "") -> Path:
        return make_shards(self.corpus, self.clips, self.work, held)

    def _identity(self, entry: Entry) -> dict[str, Any]:
        """What a row is made from, with all stages before it; folders do not count."""
        if entry.stage:
            words = [*self.seeds(entry), "shards=shards", "out=out"]
            last = stages.plan(self.stages_of(entry), words)[-1]
            spec, digest = last.run, last.digest
            assert spec is not None  # the last one trains
        else:
            spec = config.load(entry.file, self.seeds(entry))
            digest = config.digest(spec)
        return {
            "run": f"{entry.file}, {entry.stage}" if entry.stage else entry.file,
            "config": digest,
            "steps": spec.train.steps,
            "batch": spec.train.batch,
            "held_out": self.held != [""],
        }

    def _baseline(self) -> dict[str, Any]:
        found = encode_signal(self._shards(), self.corpus.hz, self._kept)
        nests = {TRAINED: self._nested(found, SIGNAL)}
        made = self._numbers(nests) | self._voices(found, {TRAINED: SIGNAL}, nests)
        return made | {"n": len(found.rows.keys)}

    def _method(self, entry: Entry) -> dict[str, Any]:
        nests = {TRAINED: Nested(), RANDOM: Nested()}
        parts = [
            part + cpu for part in ("training", "evaluation", "before") for cpu in board.CLOCKS
        ]
        spent = dict.fromkeys(parts, 0.0)
        hashes = []
        for held in self.held:
            run, cost = self._pretrain(entry, held)
            begin, used = time.monotonic(), time.process_time()
            options = FeatureSpec(data=str(self._shards()), resamples=0, seed=self.options.seed)
            session = Session.open(run, options)
            found = encode(session, self._kept)
            for name, nest in nests.items():
                nest.update(self._nested(found, name, held))
            hashes.append(results.weights_sha256(session.models[TRAINED].state_dict()))
            cost["evaluation"] = (time.monotonic() - begin) / 60
            cost["evaluation_cpu"] = (time.process_time() - used) / 60
            spent = {part: value + cost[part] for part, value in spent.items()}
        more = {} if held else self._voices(found, {name: name for name in nests}, nests)
        _, view = session.view_of("audio")
        tower = session.models[TRAINED].towers[view.tower_name]
        return {
            **self._numbers(nests),
            **more,
            "n": len(found.rows.keys),
            "parameters": sum(p.numel() for p in tower.parameters()),
            "minutes": spent,
            "checkpoints": hashes,
        }

    # --- pretraining

    def stages_of(self, entry: Entry) -> Path:
        """The file of an entry's stages without those behind its own."""
        spec, _ = stages.load(entry.file)
        last = list(spec.stages).index(entry.stage) + 1
        path = self.work / "stages" / f"{entry.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        short = spec.model_copy(update={"stages": dict(list(spec.stages.items())[:last])})
        path.write_text(stages.dump(short), encoding="utf-8")
        return path

    def seeds(self, entry: Entry) -> list[str]:
        """Overrides that set the seed of the run, or of all stages."""
        seed = self.options.seed
        if not entry.stage:
            return [f"train.seed={seed}"]
        kinds = stages.load(self.stages_of(entry))[0].stages
        return [f"{s}.{'train.seed' if r.train else 'seed'}={seed}" for s, r in kinds.items()]

    def _pretrain(self, entry: Entry, held: str) -> tuple[Path, dict[str, float]]:
        """Run folder of an encoder that never heard `held`, and minutes of its training.

        `before` are the minutes of the trainings that it starts from. Stages are done once: labels
        that two entries share count for the one that comes first.
        """
        tail = f"_without_{held}" if held else ""
        runs, shards = self.work / "runs", self._shards(held)
        earlier = self._pretrain(entry.before, held)[1] if entry.before else {}
        cost = {
            f"before{cpu}": earlier.get(f"before{cpu}", 0.0) + earlier.get(f"training{cpu}", 0.0)
            for cpu in board.CLOCKS
        }
        if entry.stage:
            words = [str(self.stages_of(entry)), f"shards={shards}"]
        else:
            words = [entry.file, f"data.train={shards}"]
        out = runs / f"{entry.folder}{tail}"
        words = ["mmssl.cli", "train", *words, f"out={out}", *self.seeds(entry)]
        own = once(runs / f"{entry.name}{tail}.done.json", words)
        cost |= {"training": own["minutes"], "training_cpu": own["cpu_minutes"]}
        return out / entry.stage, cost

    # --- numbers

    def _kept(self, meta: Mapping[str, Any]) -> bool:
        """ABX compares FSDD's own test part, the first takes."""
        return self.corpus.spoken and meta["index"] < TAKES

    def _nested(self, found: LayerFeatures, model: str, held: str = "") -> Nested:
        metas = found.rows.meta
        labels, _ = folds.read_labels(metas, self.corpus.label)
        groups = np.asarray([meta[self.corpus.group] for meta in metas])
        return nested(found.vectors[model], labels, groups, [held] if held else None)

    def _numbers(self, nests: Mapping[str, Nested]) -> dict[str, Any]:
        """Accuracy of each model with its interval, and what training gains."""
        made = {}
        for name, nest in nests.items():
            made[name] = board.spread(nest.accuracy, self.options.seed) | {"c": nest.c}
        if RANDOM in made:
            trained, random = (nests[name].accuracy for name in (TRAINED, RANDOM))
            made["gain"] = board.difference(trained, random, self.options.seed)
        return made

    def _voices(
        self, found: LayerFeatures, sources: Mapping[str, str], nests: Mapping[str, Nested]
    ) -> dict[str, Any]:
        """ABX error between digits across speakers, and how well a probe tells the speakers.

        With the C that was chosen most often.
        """
        if not self.corpus.spoken:
            return {}
        metas = found.rows.meta
        speakers, _ = folds.read_labels(metas, "speaker")
        test = np.asarray([meta["index"] < TAKES for meta in metas])
        fold = Fold("takes", np.flatnonzero(~test), np.zeros(0, np.int64), np.flatnonzero(test))
        items = [Item(metas[i]["digit"], "", metas[i]["speaker"]) for i in found.kept]
        made: dict[str, Any] = {"abx": {}, "speaker": {}}
        for name, source in sources.items():
            across = abx(items, found.frames[source], title=source)["across"]
            made["abx"][name] = across["error"]
            scores, _ = linear(found.vectors[source], speakers, [fold], grid=(nests[name].usual,))
            made["speaker"][name] = folds.score(scores, speakers, fold.test)["accuracy"]
        return made
