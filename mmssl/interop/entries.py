"""Entries of a config.json as data, read in two directions.

A run is a flat dictionary here: "tower.backbone.width" -> 768. Paths begin with `tower`, `task` or
`view`, whatever these are called in the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.types import UserError

Flat = dict[str, Any]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """One entry of their configuration, and what it is in a run.

    default: what their library takes where the file has no such entry. paths: where the value
    stands in a run; none for entries of which we have some values only. only: the values that have
    a counterpart; empty = all. read: the values of `paths` from their whole configuration; write:
    the value from a whole run, by default that of the first path. Both raise ValueError for what
    has no counterpart.
    """

    name: str
    default: Any
    paths: tuple[str, ...] = ()
    only: tuple[Any, ...] = ()
    read: Callable[[Config], tuple[Any, ...]] | None = None
    write: Callable[[Flat], Any] | None = None


def one(name: str, default: Any, *paths: str, only: tuple[Any, ...] = ()) -> Key:
    """An entry whose value is that of one or several places of a run."""
    return Key(name, default, paths, only)


def only(name: str, *values: Any, absent: Any = None) -> Key:
    """An entry of which we have these values alone; the first is written.

    absent: what their library takes where the file has no such entry; None = the first value.
    """
    return Key(name, values[0] if absent is None else absent, (), values)


def read(keys: Iterable[Key], config: Config, where: str) -> Flat:
    """What a configuration says about a run.

    Raises:
        UserError: a value that has no counterpart here, by name.
    """
    keys = tuple(keys)
    full = {key.name: config.get(key.name, key.default) for key in keys}
    found: Flat = {}
    for key in keys:
        value = full[key.name]
        if key.only and value not in key.only:
            have = " or ".join(repr(v) for v in key.only)
            raise UserError(f"{where}: `{key.name}` is {value!r}, here there is only {have}")
        try:
            values = (value,) * len(key.paths) if key.read is None else key.read(full)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: `{key.name}` is {value!r}: {error}") from error
        found |= zip(key.paths, values, strict=True)
    return found


def write(keys: Iterable[Key], run: Flat, names: Mapping[str, str]) -> dict[str, Any]:
    """What a run says as a configuration of theirs.

    names: what tower, task and view are called in the run, for messages.

    Raises:
        UserError: something that their configuration cannot say.
    """
    out: dict[str, Any] = {}
    for key in keys:
        value = _written(key, run, names)
        if key.only and value not in key.only:
            have = " or ".join(repr(v) for v in key.only)
            raise UserError(
                f"{real(key.paths[0], names)}: {value!r} has no counterpart, `{key.name}` can only "
                f"be {have}"
            )
        out[key.name] = value
    return out


def _written(key: Key, run: Flat, names: Mapping[str, str]) -> Any:
    if key.write is not None:
        try:
            return key.write(run)
        except ValueError as error:
            raise UserError(f"{names['tower']} as `{key.name}`: {error}") from error
    if not key.paths:
        return key.only[0]
    if key.paths[0] not in run:
        path = real(key.paths[0], names)
        raise UserError(f"{path}: is not one number, as `{key.name}` must be")
    return run[key.paths[0]]


def real(path: str, names: Mapping[str, str]) -> str:
    """A path as it is written in the run's file."""
    head, _, tail = path.partition(".")
    return f"{names.get(head, head)}.{tail}"


def flat(tree: Mapping[str, Any], prefix: str) -> Flat:
    """The leaves of a tree by dotted path; lists are leaves."""
    found: Flat = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}"
        found |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def nested(values: Flat) -> dict[str, Any]:
    """The tree of dotted paths."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
