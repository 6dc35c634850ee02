"""The file `results.json`: its facts, its schema, its targets and its table."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import permutations
from pathlib import Path
from typing import Any

from mmssl import __version__
from mmssl.data.folders import MANIFEST, find_folder
from mmssl.files import sha256, whole_file
from mmssl.types import MODALITIES, UserError

PROTOCOL = "1"  # changes with every change of a metric's definition
DIRECTIONS = tuple(f"{a}->{b}" for a, b in permutations(MODALITIES, 2))
PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "deepspeed",
    "megatron-energon",
    "av",
    "decord",
    "sentencepiece",
    "numpy",
    "scikit-learn",
)
Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a number of the quickstart has to reach."""

    path: str
    title: str
    at_least: bool
    value: float

    def met(self, results: Mapping[str, Any]) -> bool | None:
        """None where the number is missing."""
        number = lookup(results, self.path)
        if not isinstance(number, int | float):
            return None
        return number >= self.value if self.at_least else number <= self.value


TARGETS = (
    *(
        Target(f"retrieval.{d}.class_at_1", f"right class at rank 1, {d}", True, 0.90)
        for d in DIRECTIONS
    ),
    Target("retrieval.audio->video.r_at_10", "own clip in the first 10, audio->video", True, 0.40),
    Target(
        "retrieval.audio->video.same_group.times_chance",
        "R@1 among equal class and size, times chance",
        True,
        3.0,
    ),
    Target("correspondence.accuracy", "same clip or not, audio and video", True, 0.90),
    Target("masked.audio.ratio", "masked audio: error / error of the mean patch", False, 0.70),
    Target("masked.video.ratio", "masked video: error / error of the mean patch", False, 0.70),
    Target("masked.text.ratio", "masked text: accuracy / most frequent id", True, 2.0),
    Target("localization.pointing_sounding", "highest cell in the sounding object", True, 0.90),
    Target("localization.pointing_silent", "highest cell in the silent object", False, 0.05),
    Target(
        "localization.pointing_swapped_audio",
        "other audio: peak moves to the silent object",
        True,
        0.70,
    ),
    Target("localization.pointing_audio_blind", "averaged audio: sounding object", False, 0.60),
)

_DIRECTION_KEYS = ("class_at_1", "r_at_1", "r_at_10", "median_rank", "n")
_POINTING_KEYS = (
    "pointing_sounding",
    "pointing_silent",
    "pointing_swapped_audio",
    "pointing_center",
    "pointing_audio_blind",
    "n",
)
REQUIRED = (
    *(f"retrieval.{d}.{k}" for d in DIRECTIONS for k in _DIRECTION_KEYS),
    *(f"random_encoder.retrieval.{d}.{k}" for d in DIRECTIONS for k in _DIRECTION_KEYS),
    *(f"localization.{k}" for k in _POINTING_KEYS),
    *(f"train.{k}" for k in ("minutes", "samples_per_s", "data_wait")),
    *(f"versions.{k}" for k in ("mmssl", "python", "torch", "deepspeed")),
    "correspondence.accuracy",
    "masked",
    "protocol",
    "seed",
    "data.manifest_sha256",
    "data.n",
    "checkpoint.sha256",
)
# what a very small test set cannot give: it may lack a second clip of a class
_MAY_BE_NULL = ("localization.pointing_swapped_audio", "correspondence.accuracy")


def lookup(tree: Mapping[str, Any], path: str) -> Any:
    """The entry under a dotted path, None where any step is missing."""
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def holds(tree: Mapping[str, Any], path: str) -> bool:
    """The path exists, whatever its value."""
    parent, _, key = path.rpartition(".")
    node = lookup(tree, parent) if parent else tree
    return isinstance(node, Mapping) and key in node


def check(results: Mapping[str, Any]) -> list[str]:
    """What is wrong with the results of the `bouncing` suite; empty = in order."""
    problems = []
    for path in REQUIRED:
        if not holds(results, path):
            problems.append(f"{path}: missing")
        elif lookup(results, path) is None and path not in _MAY_BE_NULL:
            problems.append(f"{path}: null")
    found = flat(results).items()
    return problems + [f"{path}: {value}" for path, value in found if not _sound(path, value)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping under dotted names."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


def _sound(path: str, value: float) -> bool:
    share = path.rpartition(".")[2].startswith(("r_at_", "class_at_", "pointing_"))
    return math.isfinite(value) and (not share or 0 <= value <= 1)


def read(path: Path) -> Results:
    """Read a results file.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; make it with mmssl eval bouncing RUN") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(results, dict):
        raise UserError(f"{path}: not a results file (the top level is no object)")
    return results


def write(results: Results, path: Path) -> None:
    """Write a results file; it appears only when it is complete, and holds no NaN."""
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- facts


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide about numbers; None where one is not installed."""
    found: dict[str, str | None] = {"mmssl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and device."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": device,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def manifest_sha256(folder: str | Path) -> str:
    """Hash of the shards' manifest, which itself holds the hash of every shard.

    Raises:
        UserError: no such folder, or one without manifest.
    """
    path = find_folder(folder).path / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: no manifest; make shards with python -m data_tools.make_shards")
    return sha256(path)


def weights_sha256(state: Mapping[str, Any]) -> str:
    """Hash over names, types, shapes and bytes of a state dict, whatever file it came from."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_facts(run: Path) -> dict[str, Any]:
    """Minutes and speed from the run's `summary.json`; None where the run has none (yet)."""
    path = run / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = ("minutes", "samples_per_s", "data_wait", "tokens_per_s", "flop_utilisation", "steps")
    return {name: summary.get(name) for name in names}


# --- plots, which are tables, too


def plot(
    title: str,
    x_name: str,
    x: Sequence[Any],
    lines: Mapping[str, Sequence[float | None]],
    bounds: Mapping[str, Sequence[Sequence[float] | None]] | None = None,
) -> Results:
    """Lines over common places, as plain data: drawn in the report, printed in the terminal.

    bounds: of some lines, the 95 % interval at every place, None where there is none.
    """
    known = {name: list(pairs) for name, pairs in (bounds or {}).items() if any(pairs)}
    drawn = {"title": title, "x_name": x_name, "x": list(x), "lines": {**lines}}
    return drawn | ({"bounds": known} if known else {})


def interval_of(tree: Mapping[str, Any], key: str) -> list[float] | None:
    """The 95 % interval of a number, None where it has none."""
    found: list[float] | None = (tree.get("ci") or {}).get(key)
    return found


def bounds_of(drawn: Mapping[str, Any], name: str) -> Sequence[Sequence[float] | None]:
    """Intervals of a plot's line, one for every place, None where there is none."""
    return drawn.get("bounds", {}).get(name) or [None] * len(drawn["lines"][name])


def plotted(drawn: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """Texts of a line's numbers and of their intervals, which may be empty."""
    pairs = zip(drawn["lines"][name], bounds_of(drawn, name), strict=True)
    return [(number(y), f" {bracketed(pair)}" if pair else "") for y, pair in pairs]


def _plot_lines(drawn: Mapping[str, Any]) -> list[str]:
    places = [number(x, 2) if isinstance(x, float) else str(x) for x in drawn["x"]]
    rows = [[drawn["x_name"], *places]]
    rows += [[name, *map("".join, plotted(drawn, name))] for name in drawn["lines"]]
    widths = [max(7, *map(len, column)) for column in zip(*rows, strict=True)]
    texts = [
        f"{row[0]:{widths[0]}}"
        + "".join(f" {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return [drawn["title"], *texts]


def counts(results: Mapping[str, Any]) -> str:
    """How much a suite has measured and left out: "n 200, n_missing 3"."""
    own = results.get(str(results.get("suite"))) or {}
    whole = {k: v for k, v in own.items() if isinstance(v, int)}
    return ", ".join(f"{name} {value}" for name, value in whole.items())


# --- the table in the terminal


def table(results: Mapping[str, Any]) -> str:
    """Results as plain text: retrieval by direction, localization, the rest, targets."""
    blocks = [_retrieval_lines(results), _localization_lines(results), _other_lines(results)]
    if not any(blocks):
        blocks = [_plot_lines(drawn) for drawn in results.get("plots") or ()]
        blocks += [[counts(results)]] if counts(results) else []
    lines = [line for block in blocks if block for line in ["", *block]]
    return "\n".join(lines[1:])


def number(value: Any, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    if not isinstance(value, int | float):
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10):
        return str(int(value))
    return f"{value:.{digits}f}"


def bounded(tree: Mapping[str, Any], key: str) -> str:
    """Value with its 95 % interval, "0.912 [0.88, 0.94]"."""
    bounds = interval_of(tree, key)
    text = number(tree.get(key))
    return f"{text} {bracketed(bounds)}" if bounds else text


def bracketed(bounds: Sequence[float]) -> str:
    """An interval as text, "[0.88, 0.94]"."""
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _retrieval_lines(results: Mapping[str, Any]) -> list[str]:
    if not results.get("retrieval"):
        return []
    head = f"{'retrieval':19}{'N':>5}  {'class@1':20}{'R@1':20}{'R@10':20}{'MedR':>7}"
    lines = [f"{head}{'chance R@10':>13}{'random R@10':>13}"]
    for name, row in results["retrieval"].items():
        guess = lookup(results, f"random_encoder.retrieval.{name}.r_at_10")
        cells = "".join(f"{bounded(row, key):20}" for key in ("class_at_1", "r_at_1", "r_at_10"))
        chance = number(lookup(row, "chance.r_at_10"))
        median = number(row.get("median_rank"), 1)
        lines.append(f"{name:19}{row['n']:5}  {cells}{median:>7}{chance:>13}{number(guess):>13}")
    return lines


LOCALIZATION_ROWS = (
    ("pointing_sounding", "in the sounding object"),
    ("pointing_silent", "in the silent object"),
    ("pointing_both", "in both boxes (counts for neither)"),
    ("pointing_frames", "in the sounding object, every sounding frame"),
    ("pointing_swapped_audio", "other audio: in the silent object"),
    ("pointing_audio_blind", "averaged audio: in the sounding object"),
    ("pointing_center", "middle of the picture"),
    ("pointing_whole_image", "any cell (chance)"),
)


def _localization_lines(results: Mapping[str, Any]) -> list[str]:
    found = results.get("localization")
    if not found:
        return []
    lines = [f"{'localization, highest cell of the map':48}{'value':24}{'random encoder':>16}"]
    for key, title in LOCALIZATION_ROWS:
        guess = number(lookup(results, f"random_encoder.localization.{key}"))
        lines.append(f"{title:48}{bounded(found, key):24}{guess:>16}")
    lines.append(f"clips {found['n']}, with another audio {found['n_swapped']}")
    return lines


def _other_lines(results: Mapping[str, Any]) -> list[str]:
    lines = []
    match = results.get("correspondence")
    if match:
        lines.append(f"{'correspondence accuracy':48}{bounded(match, 'accuracy')}  N {match['n']}")
    for task, row in (results.get("masked") or {}).items():
        what = "accuracy" if "accuracy" in row else "error"
        text = f"{number(row.get(what))} against {number(row.get('baseline'))}"
        lines.append(f"{f'{task}: {what}':48}{text}, ratio {number(row.get('ratio'))}")
    group = lookup(results, "retrieval.audio->video.same_group")
    if group:
        text = f"{bounded(group, 'r_at_1')}, chance {number(group['chance'])}"
        lines.append(f"{'audio->video R@1 among equal class and size':48}{text}, N {group['n']}")
    return lines


def verdicts(results: Mapping[str, Any]) -> str:
    """One line per target: reached or not."""
    words = {True: "reached", False: "MISSED", None: "no value"}
    lines = [f"{'target':52}{'value':>8}   {'wanted':>8}"]
    for target in TARGETS:
        sign = ">=" if target.at_least else "<="
        value = number(lookup(results, target.path))
        wanted, word = f"{sign} {target.value:5.2f}", words[target.met(results)]
        lines.append(f"{target.title:52}{value:>8}   {wanted}   {word}")
    return "\n".join(lines)
