"""A run that reads its shards from S3 and copies its checkpoints there, one request in ten failing.

It must give the very numbers of local folders and, after its folder is lost, go on from the copy.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from faults.objects import SHARE, upload
from launching import TEST_LIMIT_S, checked
from object_store import BUCKET, proxy, server, settings
from test_resume_exact import losses
from tiny_run import sound_run
from tone_shards import SCORES, write_tones

from mmssl.storage import open_storage
from mmssl.yamlfile import write_yaml

SHARDS, COPIES = f"s3://{BUCKET}/tones", f"s3://{BUCKET}/copies"


@pytest.mark.timeout(TEST_LIMIT_S)
def test_a_run_lives_in_object_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = write_tones(tmp_path / "corpus", SCORES * 2)
    train = {"steps": 6, "save_every": 3, "keep_last": 0}
    words = ["-m", "mmssl.cli", "train", str(tmp_path / "run.yaml"), "data.workers=2"]
    (tmp_path / "run.yaml").write_text(write_yaml(sound_run(str(shards), train)))
    checked([*words, f"out={tmp_path}/local"])
    with server() as port:
        with settings(port):
            upload(shards, SHARDS)
        with proxy(port, SHARE, seed=0) as failing, settings(failing.port):
            remote = [*words, f"out={tmp_path}/remote", f"data.train={SHARDS}"]
            remote += [f"train.copy_to={COPIES}"]
            checked(remote)
            expected = losses(tmp_path / "local")
            assert losses(tmp_path / "remote") == expected
            assert not (tmp_path / "remote" / "skipped.jsonl").exists()
            shutil.rmtree(tmp_path / "remote")  # and the newest copy
            files, root = open_storage(COPIES)
            files.rm(f"{root}/step-00000006", recursive=True)
            checked(remote)
            assert losses(tmp_path / "remote") == {n: expected[n] for n in (4, 5, 6)}
            assert failing.failed
