from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "dist"))

from toy_run import run

from mmssl.train.engine import session
from mmssl.train.reference import Reference, main
from mmssl.types import UserError


def test_leaving_and_coming_back_are_said_once() -> None:
    reference = Reference("r.json", {1: 2.0, 2: 2.0, 3: 2.0, 4: 2.0}, 0.1)
    said = [reference.judge(step, loss) for step, loss in enumerate((2.19, 2.21, 2.3, 1.9), 1)]
    assert [bool(text) for text in said] == [False, True, False, True]
    assert said[1] == (
        "the loss has left the band of r.json: 2.2100, the reference has 2.0000 +- 10%"
    )
    assert "is back in the band" in said[3]
    assert reference.judge(99, 1e9) == ""  # no such step
    assert reference.judge(1, float("nan")) != ""


def test_a_run_compares_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with session() as device:
        run(device, str(tmp_path / "a"))
        main([str(tmp_path / "a"), str(tmp_path / "curve.json"), "--band", "0.01"])
        train = {"reference": str(tmp_path / "curve.json")}
        run(device, str(tmp_path / "same"), train=train)
        assert "band" not in capsys.readouterr().out
        run(device, str(tmp_path / "other"), train={**train, "seed": 5})
    assert "warning: step 1: the loss has left the band of" in capsys.readouterr().out
    for name, inside in (("same", 1.0), ("other", 0.0)):
        first = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        assert first["reference"] == inside


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": {"a": 1}, "band": 1}', '{"loss": {}}'])
def test_what_is_no_reference_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.json: no reference curve .* make one with"):
        Reference.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Reference.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="no such file; a run folder"):
        main([str(tmp_path), str(tmp_path / "out.json")])
