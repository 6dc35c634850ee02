"""Turns pydantic's errors into one line each: file, line, key, problem, nearest valid name."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mmssl.yamlfile import KeyPath, Layer

MAX_LINES = 12

# errors of the branches of a union that the value was not meant for
_BRANCH_ERRORS = re.compile(r"literal_error|model_type|.*_type|.*_parsing")


def explain(
    error: ValidationError, model: type[BaseModel], tree: dict[str, Any], layers: Sequence[Layer]
) -> str:
    """All problems of a configuration, one per line, each with its place and remedy."""
    problems: dict[KeyPath, list[str]] = {}
    found = [(_clean(e["loc"], tree), e) for e in error.errors(include_url=False)]
    meant = [path for path, item in found if not _BRANCH_ERRORS.fullmatch(item["type"])]
    paths = [path for path, _ in found]
    for path, item in found:
        deeper = any(len(p) > len(path) and p[: len(path)] == path for p in paths)
        if _BRANCH_ERRORS.fullmatch(item["type"]) and (deeper or path in meant):
            continue
        problems.setdefault(path, []).append(_problem(path, dict(item), model, tree))
    lines = [
        f"{where(path, layers)}: `{'.'.join(path) or 'file'}`: {' or '.join(dict.fromkeys(texts))}"
        for path, texts in problems.items()
    ]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more"]
    return "\n".join(lines)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` and the list of valid names."""
    valid = sorted(known)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{hint} (valid: {', '.join(valid)})" if valid else hint


def _clean(loc: Sequence[str | int], tree: Any) -> KeyPath:
    """Pydantic's location without the names of union branches: a path of the YAML tree."""
    path: list[str] = []
    tagged = False
    for i, part in enumerate(loc):
        if isinstance(tree, dict) and tree.get("kind") == part and not tagged:
            tagged = True
        elif _holds(tree, part):
            tree, tagged = tree[part], False
            path.append(str(part))
        elif i == len(loc) - 1 and isinstance(tree, dict) and _is_key(part):
            path.append(str(part))  # a missing key
    return tuple(path)


def _holds(tree: Any, part: str | int) -> bool:
    if isinstance(tree, list):
        return isinstance(part, int) and part < len(tree)
    return isinstance(tree, dict) and part in tree


def _is_key(part: str | int) -> bool:
    """False for pydantic's names of union branches, e.g. `literal['shared']` or a class name."""
    branch = part in ("float", "int", "str", "bool") or str(part).endswith("Spec")
    return isinstance(part, str) and part.isidentifier() and not branch


def where(path: KeyPath, layers: Sequence[Layer]) -> str:
    """Where the key was written: the highest layer that holds the longest part of its path."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if path[:length] in layer.lines:
                return layer.place(path[:length])
    files = [layer for layer in layers if () in layer.lines]
    return files[-1].origin if files else "configuration"


def _problem(path: KeyPath, item: dict[str, Any], model: type[BaseModel], tree: Any) -> str:
    kind, context = item["type"], item.get("ctx") or {}
    if kind == "extra_forbidden":
        return f"unknown key{nearest(path[-1], _keys_at(model, path[:-1], tree))}"
    if kind == "missing":
        few = isinstance(item["loc"][-1], int)
        return "too few entries" if few else "this key is required and missing"
    if kind == "union_tag_not_found":
        kinds = _kinds_at(model, path, tree)
        return f"needs a `kind`{nearest('', kinds)}"
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", str(context.get("expected_tags", "")))
        return f"unknown kind {context.get('tag')!r}{nearest(str(context.get('tag')), known)}"
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", str(context.get("expected", "")))
        return f"{_plain(item)}, found {_short(item)}{nearest(str(item['input']), known)}"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    return f"{_plain(item)}, found {_short(item)}"


def _plain(item: dict[str, Any]) -> str:
    text = re.sub(r"^Input should be", "must be", str(item["msg"]))
    text = re.sub(r"a valid dictionary or instance of (\w+)", r"a mapping (\1)", text)
    return text[0].lower() + text[1:]


def _short(item: dict[str, Any]) -> str:
    text = repr(item["input"])
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- what is valid where


def _keys_at(model: type[BaseModel], path: KeyPath, tree: Any) -> set[str]:
    """Valid keys of the record at `path`."""
    records = _records_at(model, path, tree)
    return {field.alias or name for r in records for name, field in r.model_fields.items()}


def _kinds_at(model: type[BaseModel], path: KeyPath, tree: Any) -> set[str]:
    records = _records_at(model, path, tree)
    return {kind for record in records for kind in _kinds(record)}


def _records_at(model: type[BaseModel], path: KeyPath, tree: Any) -> list[type[BaseModel]]:
    """The record classes that the YAML value at `path` may mean, chosen by `kind` where given."""
    annotations: list[Any] = [model]
    for part in path:
        annotations = [a for old in annotations for a in _step(old, part)]
        tree = _child(tree, part)
        annotations = _choose(annotations, tree)
    return [a for a in annotations if _is_record(a)]


def _step(annotation: Any, part: str) -> list[Any]:
    """Annotations one key below: of a record's field, a mapping's value or a list's item."""
    if _is_record(annotation):
        fields = {f.alias or name: f for name, f in annotation.model_fields.items()}
        return _members(fields[part].annotation) if part in fields else []
    arguments = typing.get_args(annotation)
    return _members(arguments[-1]) if arguments else []


def _members(annotation: Any) -> list[Any]:
    """A union's members, flattened; `Annotated` is taken off."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return [annotation]


def _choose(members: list[Any], value: Any) -> list[Any]:
    kind = value.get("kind") if isinstance(value, dict) else None
    exact = [m for m in members if _is_record(m) and kind in _kinds(m)]
    return exact or members


def _kinds(record: type[BaseModel]) -> tuple[str, ...]:
    field = record.model_fields.get("kind")
    return tuple(map(str, typing.get_args(field.annotation))) if field else ()


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _child(tree: Any, part: str) -> Any:
    if isinstance(tree, dict):
        return tree.get(part)
    if isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
        return tree[int(part)]
    return None
