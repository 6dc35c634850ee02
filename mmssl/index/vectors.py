"""`mmssl embed DATA model=RUN out=FOLDER`: the vectors of a corpus, in files of rows.

A block of the corpus (a shard, some media files) becomes one Parquet file, complete or absent. Each
process takes every n-th of n block and leaves out what a file holds already: processes need not
know of each other, and after a kill the same command makes what is missing.

A row is one window of one modality in one space. Windows are told apart by `id`, a hash of content,
modality, time, space and model, so that the same content is the same row wherever it lies.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm

import mmssl
from mmssl.embed.model import EmbeddingModel, Window
from mmssl.embed.spaces import TOWERS
from mmssl.eval.options import parse
from mmssl.files import whole_file
from mmssl.index.corpus import Corpus, Damage, Entry, Unit, open_corpus
from mmssl.specs import Spec
from mmssl.types import UserError

Row = dict[str, Any]
_FACTS = b"mmssl"  # key of a file's metadata
_VERSION = 1
_CHUNK = 64  # entries that are read together, and one by one where one of them cannot be
_STEM = 100  # bytes of a file's name that are of its first unit; 255 are allowed in all
_THUMB = 128, 80  # longest side in pixels, quality


class EmbedSpec(Spec):
    """What can be set behind `mmssl embed DATA`."""

    model: str = ""  # run folder
    out: str = ""  # folder of the vectors
    which: Literal["ema", "best", "last"] = "ema"  # weights of the run, see `load_model`
    spaces: str = ""  # names with commas; empty = those that were trained, else the towers'
    window_s: float = Field(0, ge=0)  # seconds; 0 = what the model was trained on
    hop_s: float = Field(0, ge=0)  # seconds from window to window; 0 = as long as the window
    batch_size: int = Field(32, gt=0)  # windows that are encoded at once
    device: str = ""  # empty = the GPU of this process, if there is one


@dataclass(frozen=True)
class Facts:
    """What a file of vectors says about itself.

    model, run, which: its hash, and where it was. settings: what else decides about the rows.
    units: what the rows are of. skipped: key and reason of what could not be read. made:
    nanoseconds, the newer file counts.
    """

    model: str
    run: str
    which: str
    settings: dict[str, Any]
    folder: str
    units: list[Unit]
    skipped: list[tuple[str, str]]
    made: int
    version: int = _VERSION


def main(data: str, overrides: Sequence[str] = ()) -> None:
    """Embed what is missing; under torchrun or srun every process does its share.

    Raises:
        UserError: no such data or run, or a folder with the vectors of another model.
    """
    options = parse(EmbedSpec, overrides)
    for key in ("model", "out"):
        if not getattr(options, key):
            raise UserError(f"embed: {key}=FOLDER is needed")
    embed(data, Path(options.out), options)


def parquet() -> Any:
    """The module `pyarrow.parquet`.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{error}; install the extra: pip install 'mmssl[index]'") from error
    return pyarrow.parquet


def embed(data: str, out: Path, options: EmbedSpec) -> None:
    """See `main`."""
    parquet()
    model = mmssl.load(options.model, options.which, options.device or _device())
    corpus = open_corpus(data, model.spec.data.max_bytes)
    maker = _Maker(model, corpus, options)
    done = maker.done(out)
    rank, world = share(os.environ)
    missing = [[u for u in units if u not in done] for units in corpus.blocks()[rank::world]]
    total = sum(map(corpus.count, missing))
    with tqdm(desc="embedding", total=total, unit="item", disable=True if rank else None) as bar:
        for units in filter(None, missing):
            maker.write(out, units, bar.update)
    who = "" if world == 1 else f"process {rank} of {world}: "
    print(f"{who}{out}: {maker.rows} new rows, {maker.skipped} items could not be read")
    if maker.skipped and not maker.rows and not done:
        raise UserError(f"{data}: nothing could be read; {maker.reason}")


def read_facts(folder: Path) -> dict[Path, Facts]:
    """The files of a folder of vectors, by name.

    Raises:
        UserError: one is no such file.
    """
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            tree = json.loads(parquet().read_schema(path).metadata[_FACTS])
            if tree["version"] != _VERSION:
                raise ValueError(f"version {tree['version']}, not {_VERSION}")
            tree["units"] = [Unit(*unit) for unit in tree["units"]]
            found[path] = Facts(**tree)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: no file of `mmssl embed`, or a damaged one ({error!r}); remove it"
            ) from error
    return found


def share(env: Mapping[str, str]) -> tuple[int, int]:
    """Number of this process and how many there are, of torchrun or of a step of Slurm."""
    rank = env.get("RANK", env.get("SLURM_PROCID", "0"))
    return int(rank), int(env.get("WORLD_SIZE", env.get("SLURM_STEP_NUM_TASKS", "1")))


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return f"cuda:{local % torch.cuda.device_count()}"  # a task of srun may see its own alone


class _Maker:
    """Makes files of one corpus with one model."""

    def __init__(self, model: EmbeddingModel, corpus: Corpus, options: EmbedSpec) -> None:
        self._model, self._corpus, self._options = model, corpus, options
        self.spaces = _spaces(model, options.spaces)
        self._held = {m for space in self.spaces for m in model.spaces[space]}
        self._settings = {
            "spaces": self.spaces,
            "window_s": options.window_s,
            "hop_s": options.hop_s,
        }
        self.rows = self.skipped = 0
        self.reason = ""

    def done(self, out: Path) -> set[Unit]:
        """What the folder holds of the corpus.

        Raises:
            UserError: it is of another model, or was made with other settings.
        """
        done: set[Unit] = set()
        for path, facts in read_facts(out).items():
            if facts.model != self._model.hash:
                raise UserError(
                    f"{path}: holds vectors of another model ({facts.run}, hash "
                    f"{facts.model[:12]}) than {self._options.model} ({self._model.hash[:12]}); "
                    "models are never mixed: choose another folder"
                )
            if facts.settings != self._settings:
                raise UserError(
                    f"{path}: was made with {facts.settings}, not with {self._settings}; choose "
                    "another folder, or the same settings"
                )
            if facts.folder == self._corpus.name:
                done |= set(facts.units)
        return done

    def write(self, out: Path, units: list[Unit], tell: Callable[[int], Any]) -> None:
        """The file of some units; none where all of them failed, so that they are tried again."""
        import pyarrow

        skipped: list[tuple[str, str]] = []
        rows: list[Row] = []
        entries = self._corpus.entries(units)
        while chunk := list(islice(entries, _CHUNK)):
            skipped += [(e.key, e.message) for e in chunk if isinstance(e, Damage)]
            rows += self._rows([e for e in chunk if isinstance(e, Entry)], skipped)
            tell(len(chunk))
        self.rows += len(rows)
        self.skipped += len(skipped)
        self.reason = skipped[0][1] if skipped else self.reason
        if skipped and not rows:
            return
        facts = Facts(
            self._model.hash,
            str(Path(self._options.model).resolve()),
            self._options.which,
            self._settings,
            self._corpus.name,
            units,
            skipped,
            time.time_ns(),
        )
        table = pyarrow.Table.from_pylist(rows, _schema(pyarrow))
        table = table.replace_schema_metadata({_FACTS: json.dumps(asdict(facts))})
        with whole_file(out / _file_name(units, self._corpus.name, self._settings)) as partial:
            parquet().write_table(table, partial)

    def _rows(self, entries: list[Entry], skipped: list[tuple[str, str]]) -> list[Row]:
        try:
            return self._encoded(entries)
        except (UserError, OSError, ValueError) as error:
            if len(entries) == 1:
                skipped.append((entries[0].key, str(error)))
                return []
        return [row for entry in entries for row in self._rows([entry], skipped)]

    def _encoded(self, entries: list[Entry]) -> list[Row]:
        """The rows of entries; one that cannot be read fails all."""
        items = [(k, item) for k, e in enumerate(entries) for item in _items(e, self._held)]
        if not items:
            return []
        windows: list[list[tuple[Window, str]]] = [[] for _ in entries]
        encoded = self._model.encode_windows(
            [item for _, item in items],
            self._options.batch_size,
            window_s=self._options.window_s or None,
            hop_s=self._options.hop_s or None,
            spaces=self.spaces,
        )
        for window in encoded:
            k, item = items[window.item]
            windows[k].append((window, str(item.get("text", ""))))
        pairs = zip(entries, windows, strict=True)
        return [row for entry, found in pairs for row in self._of_entry(entry, found)]

    def _of_entry(self, entry: Entry, found: list[tuple[Window, str]]) -> Iterator[Row]:
        duration_s = max((window.end_s for window, _ in found), default=0.0)
        shown = [window for window, _ in found if window.picture is not None]
        jpegs = {id(window): _jpeg(window) for window in shown}
        found = sorted(found, key=lambda each: (each[0].modality, each[0].start_s))
        for window, text in found:
            nearest = min(shown, key=lambda w: abs(_middle(w) - _middle(window)), default=None)
            content = entry.content.get(window.modality) or _digest(text)
            span = [round(window.start_s, 6), round(window.end_s, 6)]
            for space, vector_D in window.vectors.items():
                yield {
                    "id": _digest(content, window.modality, *span, space, self._model.hash)[:32],
                    "space": space,
                    "modality": window.modality,
                    "key": entry.key,
                    "source": entry.source,
                    "folder": entry.folder,
                    "shard": entry.shard,
                    "number": entry.number,
                    "start_s": span[0],
                    "end_s": span[1],
                    "duration_s": duration_s,
                    "caption": text or next(iter(entry.captions), ""),
                    "meta": list(entry.meta),
                    "thumbnail": None if nearest is None else jpegs[id(nearest)],
                    "model": self._model.hash,
                    "vector": vector_D.numpy(),
                }


def _spaces(model: EmbeddingModel, asked: str) -> list[str]:
    """Spaces whose vectors are kept."""
    known = model.spaces
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"spaces: no {name!r}; {model.spec.name} has {', '.join(known)}")
    return names or [s for s in known if not s.startswith(TOWERS)] or list(known)


def _items(entry: Entry, held: set[str]) -> Iterator[dict[str, Any]]:
    """The media of an entry as one item, each of its captions as another."""
    media = {m: data for m, data in entry.media.items() if m in held}
    if media:
        yield media
    if "text" in held:
        yield from ({"text": text} for text in dict.fromkeys(entry.captions) if text.strip())


def _middle(window: Window) -> float:
    return (window.start_s + window.end_s) / 2


def _jpeg(window: Window) -> bytes:
    assert window.picture is not None
    image, out = Image.fromarray(window.picture.numpy()), io.BytesIO()
    image.thumbnail((_THUMB[0], _THUMB[0]))
    image.save(out, "JPEG", quality=_THUMB[1])
    return out.getvalue()


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _file_name(units: Sequence[Unit], folder: str, settings: Mapping[str, Any]) -> str:
    stem = Path(units[0].name).stem.encode()[:_STEM].decode(errors="ignore")
    return f"{stem}-{_digest(units, folder, settings)[:16]}.parquet"


def _schema(pa: Any) -> Any:
    kinds = dict.fromkeys(("start_s", "end_s", "duration_s"), pa.float64())
    kinds |= {"number": pa.int64(), "meta": pa.list_(pa.string()), "thumbnail": pa.binary()}
    kinds["vector"] = pa.list_(pa.float32())
    names = ["id", "space", "modality", "key", "source", "folder", "shard", "number", "start_s"]
    names += ["end_s", "duration_s", "caption", "meta", "thumbnail", "model", "vector"]
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names])
