"""Rows of manifests in their formats, and of folders and prefixes of media, one after the other."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.manifest.media import FOREIGN_SUFFIXES, SUFFIXES, locate
from data_tools.manifest.row import Row, parse, seconds
from mmssl.storage import is_address, open_storage, persistently
from mmssl.types import UserError

Place = Path | str  # a path, or an address of fsspec
_Trees = Iterator[tuple[int, dict[str, Any]]]  # with the number of the line or row
_AT_ONCE = 256  # caption files that are asked for together, rows of a Parquet file


def read_rows(place: Place) -> Iterator[Row]:
    """Rows of one manifest, or of a folder of media with caption files beside them.

    They are made one at a time: a manifest may be larger than the memory.

    Raises:
        UserError: names the file, line and key, and what to do.
        StorageError: see `storage.persistently`.
    """
    row, suffix = None, PurePosixPath(str(place)).suffix
    if not is_address(place) and not Path(place).exists():
        raise UserError(f"{place}: no such file or folder")
    if _is_folder(place):
        parts = [part for part in _top(place) if part.endswith(".parquet")]
        rows = _numbered(place, parts) if parts else _folder_rows(place)
    elif suffix in _READERS:
        rows = _numbered(_parent(place), [str(place)])
    else:
        *most, last = _READERS
        known = f"{', '.join(most)} or {last}"
        raise UserError(f"{place}: a manifest is a {known} file, or a folder of media")
    for row in rows:
        yield row
    if row is None and suffix in _READERS:
        raise UserError(f"{place}: the manifest is empty")
    if row is None:
        raise UserError(f"{place}: no media files ({', '.join(SUFFIXES)}) in this folder")


def find_manifests(place: Place) -> list[Place]:
    """A folder's own manifests (at its top), or the place itself.

    Parquet files of one folder are the parts of one manifest: the folder stands for them.
    """
    if not _is_folder(place):
        return [place]
    inside = [p for p in _top(place) if PurePosixPath(p).suffix in _READERS]
    parts = [p for p in inside if p.endswith(".parquet")]
    if parts and len(parts) < len(inside):
        raise UserError(f"{place}: holds Parquet and other manifests; name the ones to read")
    if parts or not inside:
        return [place]
    return [p if is_address(place) else Path(p) for p in inside]


def _numbered(base: Place, parts: list[str]) -> Iterator[Row]:
    index = 0
    for part in parts:
        with _local(part) as path:
            for line, tree in _READERS[path.suffix](path):
                yield parse(base, f"{part}:{line}", index, tree)
                index += 1


# ---------------------------------------------------------------- places


def _is_folder(place: Place) -> bool:
    if not is_address(place):
        return Path(place).is_dir()
    files, root = open_storage(str(place))
    return bool(persistently(lambda: files.isdir(root), str(place)))


def _parent(place: Place) -> Place:
    return str(place).rpartition("/")[0] if is_address(place) else Path(place).parent


def _top(place: Place) -> list[str]:
    """Files of a folder, by name; objects by their address."""
    if not is_address(place):
        return sorted(str(p) for p in Path(place).iterdir() if p.is_file())
    files, root = open_storage(str(place))
    found = persistently(lambda: files.ls(root, detail=True), str(place))
    names = sorted(PurePosixPath(f["name"]).name for f in found if f["type"] == "file")
    return [str(locate(place, name)) for name in names]


@contextmanager
def _local(part: str) -> Iterator[Path]:
    """A manifest as a file of this machine."""
    if not is_address(part):
        yield Path(part)
        return
    files, root = open_storage(part)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PurePosixPath(part).name
        try:
            persistently(lambda: files.get_file(root, str(path)), part)
        except FileNotFoundError as error:
            raise UserError(f"{part}: no such file or folder") from error
        yield path


def _folder_rows(folder: Place) -> Iterator[Row]:
    """Media below a folder, each with the lines of the .txt file beside it as captions."""
    files, root = open_storage(str(folder))
    names = set(persistently(lambda: files.find(root), str(folder)))
    media = [n for n in names if _suffix(n) in (*SUFFIXES, *FOREIGN_SUFFIXES)]
    media.sort(key=lambda name: name.replace("/", "\0"))  # by folder, then by name
    for first in range(0, len(media), _AT_ONCE):
        some = media[first : first + _AT_ONCE]
        beside = [
            t for t in (str(PurePosixPath(n).with_suffix(".txt")) for n in some) if t in names
        ]
        texts = _contents(files, beside)
        for index, name in enumerate(some, first):
            text = str(PurePosixPath(name).with_suffix(".txt"))
            inner = name[len(root) :].lstrip("/")
            tree = {
                "media": inner,
                "captions": _lines(text, texts.get(text, b"")),
                "source": str(PurePosixPath(inner).with_suffix("")),
            }
            yield parse(folder, str(locate(folder, inner)), index, tree)


def _contents(files: Any, names: Sequence[str]) -> dict[str, bytes]:
    """Small files, asked for together; those that fail one by one."""
    found = files.cat(names, on_error="return") if names else {}
    for name in names:
        if not isinstance(found.get(name), bytes):
            found[name] = persistently(partial(files.cat_file, name), name)
    return dict(found)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _lines(name: str, data: bytes) -> list[str]:
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text ({error}); save it as UTF-8") from error


# ---------------------------------------------------------------- formats


def _json_rows(path: Path) -> _Trees:
    with path.open(encoding="utf-8-sig", errors="strict") as file:
        try:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _json_object(path, line, text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}:{line}: not a JSON object ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}:{line}: expected one JSON object per line, got {text.strip()[:40]!r}"
        )
    return tree


def _csv_rows(path: Path) -> _Trees:
    csv.field_size_limit(1 << 30)  # a cell may be the transcript of hours
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="\0extra", delimiter=delimiter)
        try:
            for values in reader:
                if "\0extra" in values:
                    raise UserError(
                        f"{path}:{reader.line_num}: more cells than the header has columns"
                    )
                yield reader.line_num, _csv_object(f"{path}:{reader.line_num}", values)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}:{reader.line_num}: unreadable CSV ({error})") from error


def _csv_object(where: str, values: Mapping[str, str | None]) -> dict[str, Any]:
    """Empty cells are left out; `meta.x` columns go into meta; `has` is separated by spaces."""
    tree: dict[str, Any] = {}
    for name, cell in values.items():
        if cell is None or cell == "":
            continue
        if name.startswith("meta."):
            tree.setdefault("meta", {})[name[5:]] = cell
        elif name in ("start", "end"):
            tree[name] = seconds(where, name, cell)
        elif name == "has":
            tree[name] = cell.split()
        elif name in ("meta", "captions", "transcript"):
            try:
                tree[name] = json.loads(cell)
            except ValueError as error:
                raise UserError(f"{where}: {name}: not JSON ({error})") from error
        else:
            tree[name] = cell
    return tree


def _parquet_rows(path: Path) -> _Trees:
    """Columns are the keys, `meta.x` among them; lists and structs as in JSON."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'mmssl[parquet]'") from error
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_AT_ONCE):
                for values in batch.to_pylist():
                    line += 1
                    yield line, _parquet_object(values)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: unreadable Parquet behind row {line} ({error})") from error


def _parquet_object(values: Mapping[str, Any]) -> dict[str, Any]:
    tree = {name: value for name, value in values.items() if not name.startswith("meta.")}
    flat = {name[5:]: values[name] for name in values.keys() - tree.keys()}
    if flat:
        tree["meta"] = (tree.get("meta") or {}) | flat
    if tree.get("meta"):
        tree["meta"] = {name: value for name, value in tree["meta"].items() if value is not None}
    return tree


_READERS: dict[str, Callable[[Path], _Trees]] = {
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
