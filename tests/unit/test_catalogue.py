"""The list of methods, and that the README shows it."""

import json
from pathlib import Path

import pytest

from mmssl import catalogue, config
from mmssl.types import UserError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/methods").rglob("*.yaml"))
ONE = catalogue.Method(
    "duo", ["masked", "pairs"], ["audio", "video"], "A | B", "configs/methods/duo.yaml"
)


def test_list_shows_exactly_the_files(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [m.file for m in catalogue.methods()] == [f.relative_to(ROOT).as_posix() for f in FILES]


def test_json_has_the_five_fields_of_every_method(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert catalogue.main("--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(FILES) > 0
    for row in rows:
        assert list(row) == ["name", "wiring", "modalities", "paper", "file"]
        assert row["name"]
        assert row["paper"]
        assert row["wiring"] == sorted(set(row["wiring"])) != []
        assert set(row["modalities"]) <= {"audio", "video", "text"} != set()
        assert config.find(row["file"]).samefile(ROOT / row["file"])


def test_text_table_names_every_method(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    catalogue.main()
    text = capsys.readouterr().out
    for method in catalogue.methods():
        assert any(t.startswith(f"{method.name} ") and method.file in t for t in text.splitlines())


def test_readme_table_is_current(monkeypatch):
    """If this fails: `make table`."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert catalogue.renewed(text, catalogue.methods()) == text


def test_only_the_table_between_the_markers_changes():
    text = f"before\n{catalogue.BEGIN}\nold\n{catalogue.END}\nafter\n"
    new = catalogue.renewed(text, [ONE])
    assert new.startswith(f"before\n{catalogue.BEGIN}\n| method |")
    assert new.endswith(f"\n{catalogue.END}\nafter\n")
    assert "| [duo](configs/methods/duo.yaml) | masked, pairs | audio, video | A / B |" in new
    assert catalogue.renewed(new, [ONE]) == new


@pytest.mark.parametrize("text", ["", catalogue.BEGIN, f"{catalogue.END} {catalogue.BEGIN}"])
def test_missing_marker_is_refused(text):
    with pytest.raises(UserError, match="needs the lines"):
        catalogue.renewed(text, [ONE])


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_method_file_is_short_and_keeps_its_resolved_form(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60
    spec = config.load(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.dump(spec), encoding="utf-8")
    assert config.load(resolved) == spec
