"""Ray: the shards of local processes, with the same rows left out."""

import sys

import pytest
from media_files import write_corpus
from shard_builds import bytes_of

from data_tools.make_shards import make_shards
from data_tools.transcode import Encoding
from mmssl.types import UserError


def test_without_ray(tmp_path, monkeypatch):
    write_corpus(tmp_path / "media", 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'mmssl\[ray\]'"):
        make_shards(tmp_path / "media", tmp_path / "out", engine="ray")


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_engine(tmp_path, monkeypatch):
    """One row is broken; no process that prepares rows imports torch."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    write_corpus(tmp_path / "media", 7)
    (tmp_path / "media" / "clip002.mp4").write_text("no media")
    options = {"shard_samples": 3, "workers": 2, "reencode": Encoding.parse("short_side=16,gop=5")}
    make_shards(tmp_path / "media", tmp_path / "local", **options)

    def modules():
        import data_tools.engines  # noqa: F401

        return sorted(sys.modules)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        make_shards(tmp_path / "media", tmp_path / "ray", engine="ray", **options)
        loaded = ray.get(ray.remote(modules).remote())
    finally:
        ray.shutdown()
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "local")
    assert "torch" not in loaded
    assert "data_tools.shard_rows" in loaded
