"""Shard folders by an address: equal to local ones, and clear when they cannot be read."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from faults.folders import read_all, write_folder

from mmssl import storage
from mmssl.data import energon
from mmssl.data.folders import read_manifest
from mmssl.data.guarded import intact
from mmssl.data.reader import ERROR, REASON, STORAGE
from mmssl.data.remote import RemoteTar, remote_folder
from mmssl.storage import StorageError, open_storage, persistently
from mmssl.types import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote_folder.cache_clear()
    return tmp_path / "cache" / "mmssl" / "shards"


def test_a_folder_at_an_address_reads_like_a_local_one(tmp_path: Path, own_cache: Path) -> None:
    known = write_folder(tmp_path / "set", 3, 5, 0)
    read, ledger = read_all(f"file://{tmp_path}/set")
    assert read == list(known.items())
    assert not ledger.counts
    assert read_manifest(f"file://{tmp_path}/set/") == read_manifest(tmp_path / "set")
    (copy,) = (path for path in own_cache.iterdir() if path.is_dir())
    assert not list(copy.glob("*.tar"))  # tars are read in place
    assert len(list(copy.glob("*.tar.idx"))) == 3


def test_a_local_copy_is_of_one_version(tmp_path: Path, own_cache: Path) -> None:
    """Another manifest, another copy: nothing of the old one is in use."""
    write_folder(tmp_path / "set", 3, 5, 0)
    address = f"file://{tmp_path}/set"
    old = remote_folder(address).path
    (tmp_path / "set" / "manifest.json").write_text('{"shards": []}')
    assert remote_folder(address).path == old  # a run keeps what it has opened
    remote_folder.cache_clear()
    assert remote_folder(address).path != old
    with pytest.raises(UserError, match=r"set/\.nv-meta/\.info\.json: lists other shards"):
        read_manifest(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file:///nowhere/at/all", "file:///nowhere/at/all: no such shard folder"),
        ("pipe://cat", "pipe://cat: cannot be opened: Protocol not known"),
        ("memory://empty", "no such shard folder"),
    ],
)
def test_addresses_without_shards_are_refused(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(address)


def test_missing_files_are_named_by_their_address(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 2, 3, 0)
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"file://.*/set/shard-000001\.tar: missing"):
        read_manifest(f"file://{tmp_path}/set")


def test_a_tar_that_is_gone_has_changed(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", 1, 3, 0)
    tar = remote_folder(f"file://{tmp_path}/set").open("shard-000000.tar")
    assert isinstance(tar, RemoteTar)
    assert tar.read(0, 10) == (tmp_path / "set" / "shard-000000.tar").read_bytes()[:10]
    assert tar.read(10**9, 10**9 + 5) == b""
    tar.close()
    (tmp_path / "set" / "shard-000000.tar").unlink()
    with pytest.raises(ValueError, match="was replaced or removed"):
        tar.read(0, 10)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("no route")

    with pytest.raises(StorageError, match=r"s3://x: OSError: no route; it failed for 1 s"):
        persistently(fail, "s3://x")
    assert len(calls) == 4  # after 0, 0.1, 0.3, 0.7 seconds; the next would be at 1.5
    assert "s3://x: OSError: no route; trying again for 1 s" in capsys.readouterr().err


def test_what_no_repetition_mends_is_not_repeated() -> None:
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise PermissionError("403")

    with pytest.raises(StorageError, match="s3://x: access is denied: 403; check the credentials"):
        persistently(refuse, "s3://x")
    assert len(calls) == 1


def test_expired_credentials_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set", 1, 3, 0)

    def expired(*_: object) -> None:
        raise PermissionError("ExpiredToken")

    monkeypatch.setattr(RemoteTar, "_open", expired)
    with energon.quiet():
        config = energon.worker_config(0, 1, 0, 0)
        shards = energon.Shards(f"file://{tmp_path}/set", config, False, 1 << 27)
    crude = shards.reader()[0]
    assert crude[REASON] == STORAGE
    assert "ExpiredToken; check the credentials" in crude[ERROR]
    with pytest.raises(StorageError, match="ExpiredToken"):
        intact(crude)


def test_open_storage_names_the_path() -> None:
    files, root = open_storage("memory://a/b/")
    assert isinstance(files, fsspec.AbstractFileSystem)
    assert root == "/a/b"
