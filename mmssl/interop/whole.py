"""A whole model as a folder in the layout of `transformers`, of our own model type.

config.json holds the resolved run (YAML) without its data, model.safetensors all weights under `model.`,
and tokenizer.model the tokenizer. `transformers` is not needed to write or to read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmssl import config
from mmssl.build import build_model
from mmssl.config_errors import explain
from mmssl.data.text import Tokenizer
from mmssl.eval.load import Which, load_model
from mmssl.interop import folder
from mmssl.model import Model
from mmssl.specs import DataSpec, RunSpec
from mmssl.train.checkpoint import TOKENIZER
from mmssl.types import UserError
from mmssl.yamlfile import parse_value

MODEL_TYPE, CLASS, PROCESSOR = "mmssl", "MmsslModel", "MmsslProcessor"
PREFIX = "model."


def export_whole(
    run: Path, out: Path, which: Which = "ema", files: Mapping[str, str] | None = None
) -> str:
    """Write the model of a run, with further text files; returns the class that loads it.

    Raises:
        UserError: no complete checkpoint, or `out` has something in it.
    """
    folder.check_new(out)
    model, _, tokenizer = load_model(run, which)
    more = {name: text.encode() for name, text in (files or {}).items()}
    if tokenizer is not None:
        more[TOKENIZER] = tokenizer.model
    more["processor_config.json"] = json.dumps({"processor_class": PROCESSOR}).encode()
    state = {PREFIX + name: x.contiguous() for name, x in model.state_dict().items()}
    folder.write_folder(out, settings(model, tokenizer), state, {}, more)
    return CLASS


def settings(model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What config.json says."""
    words = None
    if tokenizer is not None:
        begins = "".join(str(int(b)) for b in tokenizer.begins)
        words = {"special": tokenizer.special, "begins": begins}
    # as a text: JSON files are written with sorted keys, and the order of views and pairs counts
    run = config.dump(portable(model.spec))
    about = {"model_type": MODEL_TYPE, "architectures": [CLASS], "dtype": "float32"}
    return {**about, "run": run, "vocabulary": words}


def portable(spec: RunSpec) -> RunSpec:
    """The run without what belongs to the machine it was trained on."""
    fresh = {"init": ""}
    apart: dict[str, Any] = {
        "towers": {name: t.model_copy(update=fresh) for name, t in spec.towers.items()},
        "joints": {name: t.model_copy(update=fresh) for name, t in spec.joints.items()},
    }
    if spec.shared is not None:
        apart["shared"] = spec.shared.model_copy(update=fresh)
    data = DataSpec(labels=spec.data.labels)
    return spec.model_copy(update={**apart, "data": data, "out": ""})


def model_of(run: str, vocabulary: Mapping[str, Any] | None, where: str) -> Model:
    """A model with fresh weights from the entries of config.json.

    Raises:
        UserError: they are of another version.
    """
    tree = parse_value(run, where)
    try:
        spec = RunSpec.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, RunSpec, tree, ())}") from error
    if vocabulary is None:
        return build_model(spec)
    begins = [digit == "1" for digit in vocabulary["begins"]]
    return build_model(spec, len(begins), vocabulary["special"], begins)


def is_folder(path: Path) -> bool:
    """Whether a folder was written by `export_whole`, or by `save_pretrained` of its class."""
    file = path / folder.CONFIG
    return file.is_file() and folder.read_json(file).get("model_type") == MODEL_TYPE


def read(path: Path) -> tuple[Model, Tokenizer | None]:
    """Model and tokenizer of such a folder.

    Raises:
        UserError: damaged, or of another version.
    """
    where = path / folder.CONFIG
    said = folder.read_json(where)
    model = model_of(said.get("run", ""), said.get("vocabulary"), str(where))
    tensors = folder.read_tensors(path)
    state = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: weights and config.json differ: {error}") from error
    return model, tokenizer_of(path)


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The tokenizer in a folder, if the model has one."""
    file = path / TOKENIZER
    return Tokenizer.load(file) if file.is_file() else None
