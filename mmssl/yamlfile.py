"""Strict YAML: one meaning per file, and every key remembers its line.

Stricter than PyYAML: a duplicate key, an anchor or a second document is an error; `yes`, `on` and
`1:30` are strings; `1e-3` is a number. Keys are always strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmssl.types import UserError

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A parsed file (or the command line): its tree and the line of every key path in it."""

    origin: str
    tree: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """`file:line` of a key that stands in this layer."""
        line = self.lines.get(path, 0)
        return f"{self.origin}:{line}" if line else self.origin


class _Loader(yaml.SafeLoader):
    """Composes nodes with the scalar rules of YAML 1.2 and refuses anchors."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (none of YAML 1.1)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported: write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists and never an alias, so that the strict reader takes the file back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_list(data))

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _expression = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, _first)
    # the writer quotes a string that either YAML 1.1 (its base class) or this reader takes for more
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _expression, _first)


def write_yaml(tree: Any) -> str:
    """Block YAML in the order of the tree; `read_yaml` gives the same tree back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: Path) -> Layer:
    """Read one YAML file whose top level is a mapping.

    Raises:
        UserError: unreadable file, bad syntax (with line and column), duplicate key, anchor.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file: {error}") from error
    lines: dict[KeyPath, int] = {(): 0}
    tree = _parse(text, str(path), lines)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the file must hold `key: value` pairs, found {_kind(tree)}")
    return Layer(str(path), tree, lines)


def parse_value(text: str, origin: str) -> Any:
    """Parse one YAML value, e.g. the right-hand side of an override."""
    return _parse(text, origin, {})


def _parse(text: str, origin: str, lines: dict[KeyPath, int]) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _build(loader, node, (), lines)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_message(origin, error)) from error
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _syntax_message(origin: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
    context = f" ({error.context})" if error.context else ""
    return f"{place}: not valid YAML: {error.problem or 'syntax error'}{context}"


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        items = list(enumerate(node.value))
        lines.update({(*path, str(i)): item.start_mark.line + 1 for i, item in items})
        return [_build(loader, item, (*path, str(i)), lines) for i, item in items]
    if node.tag == "tag:yaml.org,2002:int":
        return int(node.value.replace("_", ""))  # YAML 1.1 would read 010 as octal
    return loader.construct_object(node)


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key must be a plain word", problem_mark=key_node.start_mark
            )
        key = str(key_node.value)
        if key in tree:
            raise yaml.MarkedYAMLError(
                problem=f"the key `{key}` stands twice (first in line {lines[(*path, key)]})",
                problem_mark=key_node.start_mark,
            )
        lines[(*path, key)] = key_node.start_mark.line + 1
        tree[key] = _build(loader, value_node, (*path, key), lines)
    return tree


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"a single value ({value!r})"
