"""YAML files and dotted overrides -> one validated `RunSpec`.

Later layers win: method file < run file < overrides. Then every `use: PRESET` is replaced by its
preset, and the leaves that stand beside `use` override the preset. A `null` removes an entry.
Relative data paths are relative to the working directory; `${oc.env:NAME}` reads an environment
variable.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from mmssl.config_errors import explain, where
from mmssl.specs import RunSpec
from mmssl.types import UserError
from mmssl.yamlfile import KeyPath, Layer, parse_value, read_yaml, write_yaml

LAUNCHABLE = ("runs", "methods")


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The resolved run of a file (or of its name below configs/runs or configs/methods).

    Raises:
        UserError: file not found, bad YAML, unknown or ill-typed key; names file, line and key.
    """
    tree, layers = resolve(path_or_name, overrides)
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, RunSpec, tree, layers)) from error


def dump(spec: RunSpec) -> str:
    """Canonical YAML of the resolved form, every default written out; loads to an equal spec."""
    return write_yaml(_drop_null(spec.model_dump(by_alias=True)))


def digest(spec: RunSpec) -> str:
    """First 16 hex digits of the SHA-256 of `dump(spec)`: the identity of a run."""
    return hashlib.sha256(dump(spec).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- files


def builtin_root() -> Path:
    """The configs folder that came with the package: inside the wheel, or beside it in a clone."""
    package = Path(str(resources.files("mmssl")))
    packed = package / "_configs"
    return packed if packed.is_dir() else package.parent / "configs"


def roots() -> list[Path]:
    """Folders searched for names: `configs` of the working directory, then the built-in one."""
    here, builtin = Path("configs"), builtin_root()
    if not here.is_dir():
        return [builtin]
    return [here] if here.resolve() == builtin.resolve() else [here, builtin]


def find(path_or_name: str | Path, kinds: Sequence[str] = LAUNCHABLE) -> Path:
    """The file of a path, or of a name such as `avt/flagship` below configs/<kind>.

    Raises:
        UserError: no such file; lists the nearest names.
    """
    wanted = Path(path_or_name)
    if wanted.is_file():
        return wanted
    name = _bare_name(wanted, kinds)
    for root in roots():
        for kind in kinds:
            candidate = root / kind / f"{name}.yaml"
            if candidate.is_file():
                return candidate
    known = names(kinds)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    places = " or ".join(f"configs/{kind}" for kind in kinds)
    raise UserError(
        f"{path_or_name}: no such file, and no such name in {places}"
        + (f"; nearest: {', '.join(near)}" if near else " (which is empty)")
    )


def names(kinds: Sequence[str] = LAUNCHABLE) -> list[str]:
    """All names that `find` knows for these kinds."""
    folders = [root / kind for root in roots() for kind in kinds]
    found = {
        p.relative_to(d).with_suffix("").as_posix() for d in folders for p in d.rglob("*.yaml")
    }
    return sorted(found)


def _bare_name(wanted: Path, kinds: Sequence[str]) -> str:
    """`configs/methods/avt/x.yaml`, `methods/avt/x` and `avt/x` all mean `avt/x`."""
    parts = wanted.with_suffix("").parts if wanted.suffix == ".yaml" else wanted.parts
    for lead in ("configs", *kinds):
        if len(parts) > 1 and parts[0] == lead:
            parts = parts[1:]
    return "/".join(parts)


# ---------------------------------------------------------------- layers


def resolve(
    path_or_name: str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], list[Layer]]:
    """The merged plain tree before validation, and its layers, lowest first (for messages)."""
    changes = [override_layer(text) for text in overrides]
    run = read_yaml(find(path_or_name))
    layers = [*_method_layers(run, changes), run, *changes]
    tree = merge(layers)
    tree.pop("method", None)
    presets = _expand(tree, layers)
    return _drop_null(tree), [*presets, *layers]


def _method_layers(run: Layer, changes: Sequence[Layer]) -> list[Layer]:
    asking = next((a for a in (*reversed(changes), run) if "method" in a.tree), None)
    if asking is None or asking.tree["method"] is None:
        return []
    place = f"{asking.place(('method',))}: `method`"
    layer = read_yaml(_named(asking.tree["method"], "methods", place))
    if "method" in layer.tree:
        raise UserError(f"{layer.place(('method',))}: `method`: a method cannot build on a method")
    return [layer]


def override_layer(text: str) -> Layer:
    """The layer of one `a.b=c`.

    Raises:
        UserError: no key, no `=` or no value.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override `{text}`: write it as key=value, e.g. train.steps=100")
    if not value.strip():
        raise UserError(f"override `{text}`: no value; `{key}=null` removes, `{key}=''` empties it")
    path = tuple(key.split("."))
    origin = f"override `{text}`"
    tree: dict[str, Any] = {path[-1]: parse_value(value, origin)}
    for part in reversed(path[:-1]):
        tree = {part: tree}
    return Layer(origin, tree, {path[:i]: 0 for i in range(1, len(path) + 1)})


def merge(layers: Sequence[Layer], resolve: bool = True) -> dict[str, Any]:
    """The layers' trees in one, later ones on top; `resolve` replaces `${...}`.

    Raises:
        UserError: a layer does not fit the ones below it, or a `${...}` names nothing.
    """
    merged = OmegaConf.create({})
    for layer in layers:
        try:
            _merge_one(merged, layer)
        except (OmegaConfBaseException, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{layer.origin}: cannot be merged: {_first_line(error)}") from error
    try:
        tree: dict[str, Any] = OmegaConf.to_container(merged, resolve=resolve)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{layers[-1].origin}: {_first_line(error)}") from error
    return tree


def _merge_one(merged: DictConfig, layer: Layer) -> None:
    tree = dict(layer.tree)
    if isinstance(tree.get("data"), str):  # another data set: nothing of the earlier one stays
        merged["data"] = {"use": tree.pop("data")}
    if layer.origin.startswith("override ") and tree:
        path = max(layer.lines, key=len)
        if path == ("data",) and "data" not in tree:
            return
        OmegaConf.update(merged, ".".join(path), _leaf(tree, path), merge=True)
    else:
        merged.merge_with(tree)


def _leaf(tree: dict[str, Any], path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---------------------------------------------------------------- presets


def _expand(tree: dict[str, Any], layers: Sequence[Layer]) -> list[Layer]:
    """Replace `use` in `data` and in every tower by its preset, in place; returns the presets."""
    presets = []
    slots: list[tuple[dict[str, Any], str, KeyPath, str]] = [(tree, "data", ("data",), "data")]
    towers = tree.get("towers")
    if isinstance(towers, dict):
        slots += [(towers, name, ("towers", name), "towers") for name in towers]
    for parent, key, path, kind in slots:
        value = parent.get(key)
        if isinstance(value, dict) and value.get("use") is not None:
            preset = _preset(value.pop("use"), path, kind, layers)
            presets.append(preset)
            parent[key] = _overlay(_leaf(preset.tree, path), value)
        elif isinstance(value, dict):
            value.pop("use", None)
    return presets


def _preset(name: Any, path: KeyPath, kind: str, layers: Sequence[Layer]) -> Layer:
    """The preset's file, its tree moved to where it is used."""
    keys = (*path, "use") if any((*path, "use") in a.lines for a in layers) else path
    layer = read_yaml(_named(name, kind, f"{where(keys, layers)}: `{'.'.join(path)}.use`"))
    if "use" in layer.tree:
        raise UserError(f"{layer.place(('use',))}: `use`: a preset cannot use another preset")
    tree: dict[str, Any] = layer.tree
    for part in reversed(path):
        tree = {part: tree}
    return Layer(layer.origin, tree, {(*path, *key): line for key, line in layer.lines.items()})


def _overlay(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.merge(low, high)
    return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]


def _named(value: Any, kind: str, place: str) -> Path:
    """The file of a `method` or `use` entry; `place` says who asks."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: expected a name, found {value!r}")
    try:
        return find(value, (kind,))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _drop_null(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _drop_null(value) for key, value in tree.items() if value is not None}
    if isinstance(tree, list | tuple):
        return [_drop_null(value) for value in tree]
    return tree
