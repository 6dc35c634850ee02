"""Name maps of state dicts as data, read in two directions.

A table is a sequence of rules "ours <-> theirs". A name may hold `{n}`, the number of a layer; a
rule then stands for one rule per layer. Every rule can be inverted, so that one table serves import
and export; every tensor of either side is in exactly one rule.

Names of ours begin with `tower.` or `task.`, whatever they are called in a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmssl.types import UserError

Sizes = Mapping[str, int]
Change = Callable[[Sequence[Tensor], Sizes], list[Tensor]]
State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_CLOSE = 1e-6  # fixed tables that two libraries compute differ by their last bit
_SHOWN = 4  # names in a message


def same(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    """No change."""
    return list(tensors)


@dataclass(frozen=True)
class Rule:
    """Tensors of ours and what they are in the other library.

    to_ours, to_theirs: inverse to each other.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Change = same
    to_theirs: Change = same


@dataclass(frozen=True)
class Fixed:
    """A tensor of theirs that we compute: it is written, and checked when read.

    dead: their model has it and never uses it: whatever is read counts for nothing.
    """

    theirs: str
    make: Callable[[Sizes], Tensor]
    dead: bool = False


Row = Rule | Fixed


# ---------------------------------------------------------------- rows


def tensor(ours: str, theirs: str) -> tuple[Rule, ...]:
    """One tensor as it is."""
    return (Rule((ours,), (theirs,)),)


def pair(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Weight and bias as they are."""
    return tuple(Rule((f"{ours}.{part}",), (f"{theirs}.{part}",)) for part in ("weight", "bias"))


def stack(ours: str, *theirs: str) -> Rule:
    """Several tensors, which are one of ours along its first axis."""
    return Rule((ours,), theirs, _join, _part(len(theirs)))


def stacked(ours: str, *theirs: str) -> tuple[Rule, ...]:
    """Weights and biases of several linear maps, which are one of ours."""
    return tuple(
        stack(f"{ours}.{part}", *(f"{name}.{part}" for name in theirs))
        for part in ("weight", "bias")
    )


def reshaped(ours: str, theirs: str, before: int = 0, behind: int = 0) -> tuple[Rule, ...]:
    """A tensor that has more axes of length one in the other library, before and behind."""

    def less(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (x,) = tensors
        return [x.reshape(x.shape[before : x.ndim - behind])]

    def more(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (x,) = tensors
        return [x.reshape((1,) * before + tuple(x.shape) + (1,) * behind)]

    return (Rule((ours,), (theirs,), less, more),)


def _join(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _part(count: int) -> Change:
    def split(tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return list(tensors[0].chunk(count))

    return split


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """The rows of one model: no `{n}` is left, and all of ours are there.

    shapes: of our tensors.
    """

    rules: tuple[Rule, ...]
    fixed: tuple[Fixed, ...]
    shapes: Shapes
    sizes: Sizes

    def theirs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of their side."""
        found = {row.theirs: tuple(row.make(self.sizes).shape) for row in self.fixed}
        for rule in self.rules:
            blank = [torch.empty(self.shapes[name], device="meta") for name in rule.ours]
            made = rule.to_theirs(blank, self.sizes)
            found |= {name: tuple(x.shape) for name, x in zip(rule.theirs, made, strict=True)}
        return found

    def read(self, tensors: Mapping[str, Tensor], where: str) -> State:
        """Their tensors as ours, in fp32.

        Raises:
            UserError: tensors that are missing, unknown, of another shape or with other values than
            we compute; all by name.
        """
        self._check(tensors, where)
        state: State = {}
        for rule in self.rules:
            made = rule.to_ours([_wide(tensors[name]) for name in rule.theirs], self.sizes)
            state |= {name: x.contiguous() for name, x in zip(rule.ours, made, strict=True)}
        return state

    def write(self, state: Mapping[str, Tensor]) -> State:
        """Our tensors as theirs."""
        made = {row.theirs: row.make(self.sizes) for row in self.fixed}
        for rule in self.rules:
            parts = rule.to_theirs([state[name] for name in rule.ours], self.sizes)
            made |= {
                name: x.clone().contiguous() for name, x in zip(rule.theirs, parts, strict=True)
            }
        return made

    def _check(self, tensors: Mapping[str, Tensor], where: str) -> None:
        wanted = self.theirs()
        dead = {row.theirs for row in self.fixed if row.dead}
        _refuse(where, "lacks", sorted(wanted.keys() - tensors.keys() - dead))
        _refuse(where, "has unknown tensors", sorted(tensors.keys() - wanted.keys()))
        for name, shape in wanted.items():
            if name not in dead and tuple(tensors[name].shape) != shape:
                raise UserError(
                    f"{where}: `{name}` has shape {tuple(tensors[name].shape)}, its config.json "
                    f"asks for {shape}"
                )
        for row in self.fixed:
            if not row.dead and not _close(tensors[row.theirs], row.make(self.sizes)):
                raise UserError(
                    f"{where}: `{row.theirs}` is not the fixed table of the published model, and "
                    "there is no trained one here"
                )


def bind(rows: Iterable[Row], shapes: Shapes, sizes: Sizes) -> tuple[Table, list[str]]:
    """The rows that a model needs, one for each of its layers.

    Returns:
        the table, and the names of ours that no row knows.
    """
    rules: list[Rule] = []
    fixed: list[Fixed] = []
    for row in rows:
        if isinstance(row, Fixed):
            fixed.append(row)
        else:
            rules += _numbered(row, shapes)
    left = sorted(shapes.keys() - {name for rule in rules for name in rule.ours})
    return Table(tuple(rules), tuple(fixed), shapes, sizes), left


def _numbered(rule: Rule, shapes: Shapes) -> Iterator[Rule]:
    """The rule of each layer whose tensors are all there."""
    for _, n in _matches(rule.ours[0], shapes):
        ours = tuple(name.replace("{n}", n) for name in rule.ours)
        if all(name in shapes for name in ours):
            theirs = tuple(name.replace("{n}", n) for name in rule.theirs)
            yield Rule(ours, theirs, rule.to_ours, rule.to_theirs)


def _matches(template: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, number) of the names that a template stands for."""
    head, braces, tail = template.partition("{n}")
    if not braces:
        if template in set(names):
            yield template, ""
        return
    pattern = re.compile(re.escape(head) + r"(\d+)" + re.escape(tail))
    for name in names:
        if found := pattern.fullmatch(name):
            yield name, found[1]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.float() - wanted).abs().max() <= _CLOSE)


def _refuse(where: str, what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UserError(f"{where}: {what}: {', '.join(names[:_SHOWN])}{more}")
