"""What every configuration resolves to, and the losses of three steps, as committed text.

After a wanted change: `python tests/golden/regenerate.py`, and read the difference.
"""

import difflib
import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REMEDY = "if this is wanted: python tests/golden/regenerate.py"
COUNTED = (".accuracy", ".usage")  # near ties fall to the other side on processors that add up
COUNTED_ABS = 0.02  # in another order; the losses beside them are compared tightly


def _regenerate():
    spec = importlib.util.spec_from_file_location("regenerate", HERE / "regenerate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _regenerate()
NOW = golden.resolved()
LOSSES = json.loads((HERE / "losses.json").read_text())


def test_every_configuration_has_its_golden_text_and_no_other():
    folder = HERE / "configs"
    kept = {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")}
    assert kept == set(NOW), REMEDY


@pytest.mark.parametrize("name", NOW)
def test_a_configuration_resolves_as_before(name):
    path = HERE / "configs" / f"{name}.yaml"
    before = path.read_text() if path.is_file() else ""
    changes = difflib.unified_diff(
        before.splitlines(), NOW[name].splitlines(), "golden", "now", lineterm="", n=1
    )
    text = "\n".join(changes)
    assert not text, f"{name} resolves differently; {REMEDY}\n{text}"


@pytest.mark.parametrize("name", NOW)
def test_the_golden_text_loads_to_the_same_run(name):
    assert golden.text(HERE / "configs" / f"{name}.yaml") == NOW[name], REMEDY


def test_every_method_and_run_has_its_golden_losses_and_no_other():
    assert list(LOSSES) == golden.trained(), REMEDY


@pytest.mark.parametrize("name", golden.trained())
def test_three_seeded_steps_have_their_golden_losses(name):
    before, now = LOSSES.get(name, []), golden.losses(name)
    assert [list(step) for step in now] == [list(step) for step in before], REMEDY
    for step, (a, b) in enumerate(zip(before, now, strict=True)):
        for term, value in a.items():
            slack = COUNTED_ABS if term.endswith(COUNTED) else 1e-5
            assert b[term] == pytest.approx(value, rel=2e-4, abs=slack), (
                f"{term} at step {step}; {REMEDY}"
            )
    assert len({step["loss"] for step in before}) == len(before)
