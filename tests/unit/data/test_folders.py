"""What makes a folder of shards, and refuses one."""

from __future__ import annotations

import json
import shutil

import pytest

from mmssl.data.folders import read_manifest
from mmssl.types import UserError


@pytest.fixture
def folder(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "set")
    return tmp_path / "set"


def test_manifest_is_read(folder):
    found = read_manifest(folder)
    assert [s.name for s in found] == [f"shard-{i:06d}.tar" for i in range(4)]
    assert [s.samples for s in found] == [10] * 4


def test_foreign_dataset_yaml_is_refused(folder):
    """Energon imports the class this file names."""
    path = folder / ".nv-meta" / "dataset.yaml"
    path.write_text("__module__: os\n__class__: system\n")
    with pytest.raises(UserError, match=r"dataset\.yaml: differs from the only accepted text"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: unreadable"),
        (lambda f: (f / "manifest.json").write_text('{"shards": [{"name": 1}]}'), "unreadable"),
        (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar: missing"),
        (lambda f: (f / ".nv-meta" / "split.yaml").unlink(), "split.yaml: missing"),
        (lambda f: (f / ".nv-meta" / ".info.json").write_text("{}"), r"\.info\.json: unreadable"),
        (
            lambda f: (f / ".nv-meta" / ".info.json").write_text('{"shard_counts": {"x.tar": 1}}'),
            "other shards",
        ),
        (lambda f: shutil.rmtree(f), "no such shard folder"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    ],
)
def test_broken_folders_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


def test_shard_names_cannot_leave_the_folder(folder):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    tree["shards"][0]["name"] = "../train-000000.tar"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is no shard name"):
        read_manifest(folder)


def test_parent_of_parts_names_them(folder):
    with pytest.raises(UserError, match="it has parts set"):
        read_manifest(folder.parent)


@pytest.mark.parametrize(
    "text",
    [
        "split_parts: {train: ['shard-{000000..000002}.tar']}\nexclude: []\n",
        "split_parts: {train: ['shard-{000000..999999}.tar']}\nexclude: []\n",
        "split_parts: {train: ['shard-{000000..000003}.tar']}\nexclude: [shard-000000.tar/0]\n",
        "split_parts: {train: [7]}\nexclude: []\n",
        "split_parts: {a: [], b: []}\nexclude: []\n",
        "split_parts: [",
        "",
    ],
)
def test_split_must_list_the_shards_of_the_manifest(folder, text):
    """Energon expands braces without bounds, and leaves out what the file tells it to."""
    (folder / ".nv-meta" / "split.yaml").write_text(text)
    with pytest.raises(UserError, match=r"split\.yaml: lists other shards"):
        read_manifest(folder)


def test_split_may_name_shards_one_by_one(folder):
    names = [f"shard-{n:06d}.tar" for n in range(4)]
    (folder / ".nv-meta" / "split.yaml").write_text(
        f"split_parts: {{train: {names}}}\nexclude: []\n"
    )
    assert len(read_manifest(folder)) == 4
