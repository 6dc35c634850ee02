"""`mmssl import` and `mmssl export`: checkpoints of `transformers` to run folders and back.

Only JSON and safetensors are read and written; `transformers` itself is not needed. One table per
model type says what its tensors are here, and what its config.json says about a run (`speech`,
`vision`, `text`); both directions read the same tables. A model is imported if every tensor of its
file is known and none is missing, and exported if its import would give the very same tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl import config
from mmssl.build import build_model
from mmssl.eval.options import parse
from mmssl.interop import entries, folder
from mmssl.interop.entries import Flat
from mmssl.interop.exports import ExportSpec, export_run
from mmssl.interop.layout import Heads, Layout
from mmssl.interop.models import layout_of
from mmssl.interop.names import State, bind
from mmssl.interop.records import logical, names_of, real_names, spec_of
from mmssl.specs import RunSpec, Spec
from mmssl.train.checkpoint import WEIGHTS, Progress
from mmssl.train.commit import Writer, commit
from mmssl.types import UserError


class ImportSpec(Spec):
    """What can be set behind `mmssl import FOLDER OUT`.

    tower: its name in the run; empty = its modality. heads: with the heads of pre-training, and
    nothing else may be in the file; else the encoder alone.
    """

    tower: str = ""
    heads: bool = True


def import_main(source: str, out: str, overrides: Sequence[str] = ()) -> None:
    """Make a run folder of a folder of `transformers` and say what was left behind."""
    done = import_folder(Path(source), Path(out), parse(ImportSpec, overrides))
    tower, tasks = next(iter(done.spec.towers)), ", ".join(done.spec.tasks) or "none"
    print(f"{done.spec.name}: {done.numbers / 1e6:.1f} M numbers -> {out}")
    print(f"tower `{tower}`, tasks: {tasks}; start from it with towers.{tower}.init={out}")
    if done.left:
        print("left behind, an encoder alone has no place for it:", ", ".join(done.left))


def export_main(run: str, out: str, overrides: Sequence[str] = ()) -> None:
    """Write a tower of a run as a folder that `transformers` loads."""
    name = export_run(Path(run), Path(out), parse(ExportSpec, overrides))
    print(f"{name} -> {out}")


@dataclass(frozen=True)
class Imported:
    """The run that was made, how many numbers it has, and the tensors that were left behind."""

    spec: RunSpec
    numbers: int
    left: list[str]


def import_folder(source: Path, out: Path, options: ImportSpec | None = None) -> Imported:
    """A run folder of a local checkpoint of `transformers`; weights become fp32.

    Raises:
        UserError: an unknown model type, entries of config.json without a counterpart, unknown or
        missing tensors or tensors of another shape (all by name); no safetensors; `out` exists.
    """
    options = options or ImportSpec()
    folder.check_new(out)
    settings = folder.read_json(source / folder.CONFIG)
    layout = layout_of(settings.get("model_type"), f"{source / folder.CONFIG}: `model_type`")
    tensors, left = _plain(layout, folder.read_tensors(source), options.heads, source)
    heads = next((h for h in layout.heads if h.marker in tensors), None)
    if heads is None:
        left += [name for name in layout.spare if tensors.pop(name, None) is not None]
    run = _read_run(layout, heads, settings, source)
    tower = options.tower or layout.modality
    spec = spec_of(layout, heads, run, tower, str(source / folder.CONFIG))
    names = names_of(tower, layout.task)
    with torch.device("meta"):
        ours = logical(build_model(spec).state_dict(), names)
    shapes = {name: tuple(x.shape) for name, x in ours.items()}
    rows = (*layout.rows, *(() if heads is None else heads.rows))
    table, unknown = bind(rows, shapes, layout.sizes(run))
    assert not unknown, unknown  # the tables name every tensor of what they make
    state = real_names(table.read(tensors, str(source)), names)
    write_run(out, spec, state, layout.name)
    return Imported(spec, sum(x.numel() for x in state.values()), left)


def _plain(
    layout: Layout, tensors: Mapping[str, Tensor], heads: bool, source: Path
) -> tuple[State, list[str]]:
    """Tensors by today's names without the prefix of the encoder, and the names of those left."""
    lead = f"{layout.prefix}."
    inside = any(name.startswith(lead) for name in tensors)
    foreign = [name for name in tensors if inside and not name.startswith(lead)]
    if foreign and heads and not any(known.marker in foreign for known in layout.heads):
        why = f" ({layout.without})" if layout.without else ""
        raise UserError(
            f"{source}: `{foreign[0]}` has no counterpart here{why}; import the encoder alone with "
            "heads=false"
        )
    left = [] if heads else foreign
    found: State = {}
    for old in tensors.keys() - set(left):
        name = _today(old.removeprefix(lead), layout)
        if name in found:
            raise UserError(f"{source}: has `{name}` twice, under its new and an old name")
        if name is not None:
            found[name] = tensors[old]
    return found, left


def _today(name: str, layout: Layout) -> str | None:
    for pattern, replacement in layout.aliases:
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    return name


def _read_run(
    layout: Layout, heads: Heads | None, settings: Mapping[str, Any], source: Path
) -> Flat:
    """What the files of the folder say about the run."""
    where = str(source / folder.CONFIG)
    run = {**layout.constants, **entries.read(layout.keys, settings, where)}
    if heads is not None:
        run |= {**heads.constants, **entries.read(heads.keys, settings, where)}
    path = source / folder.PREPROCESSOR
    files = folder.read_json(path) if layout.files and path.is_file() else {}
    return {**run, **entries.read(layout.files, files, str(path))}


def write_run(out: Path, spec: RunSpec, state: State, source: str) -> None:
    """A folder that counts as a checkpoint of a run at step 0; `source`: where it comes from.

    It has no state of an optimiser: a run starts from it (`init`) and does not resume it.
    """
    digest = config.digest(spec)

    def write(writer: Writer) -> None:
        writer.tensors(WEIGHTS, state, digest)
        writer.file("config.yaml", lambda path: path.write_text(config.dump(spec)))

    facts = {"step": 0, "world_size": 1, "zero": 0, "digest": digest, "imported": source}
    commit(out, write, {**facts, "tokenizer_sha256": "", "progress": asdict(Progress())})
