"""Worker processes: order, limits, replacement, and who is blamed for what."""

import time
from functools import partial

import hostile_work
import psutil
import pytest
from launching import command_line

from data_tools.children import Child, ordered
from data_tools.shard_rows import Options, prepare
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import UserError


@pytest.fixture
def child():
    made = Child(hostile_work.work, 20.0, 200)
    yield made
    made.close()


def test_order_does_not_depend_on_the_time_taken():
    tasks = ["sleep 0.3", *(f"task {k}" for k in range(1, 12))]
    found = list(ordered(hostile_work.work, tasks, 2, 20.0, 200))
    assert found == [f"{task} done" for task in tasks]


@pytest.mark.parametrize(
    ("task", "reason", "message"),
    [
        ("crash", "crash", "status -11, twice"),
        ("killed", "memory", "status -9, twice"),
        ("exit", "crash", "status 0, twice"),
        ("eat", "memory", "needs more than 200 MB"),
        ("damaged", "decode", "^broken$"),
        ("error", "error", "KeyError: 'who knows'"),
    ],
)
def test_bad_tasks_have_their_reason(child, task, reason, message):
    found = child(task)
    assert isinstance(found, DamagedSampleError)
    assert found.reason == reason
    with pytest.raises(DamagedSampleError, match=message):
        raise found
    assert child("good") == "good done"


def test_hang_ends_after_its_time_and_costs_no_other_task():
    began = time.monotonic()
    found = list(ordered(hostile_work.work, ["a", "hang", "b", "c"], 2, 1.0, 200))
    assert [f if isinstance(f, str) else f.reason for f in found] == [
        "a done",
        "timeout",
        "b done",
        "c done",
    ]
    assert time.monotonic() - began < 15


def test_a_task_whose_process_died_is_tried_once_more(child, tmp_path):
    assert child(f"crash-once {tmp_path / 'mark'}").endswith("done")


def test_wrong_settings_end_the_work_and_its_processes():
    with pytest.raises(UserError, match="a wrong setting"):
        list(ordered(hostile_work.work, ["a", "settings", "b"], 2, 20.0, 200))
    assert not [p for p in psutil.Process().children() if "children" in command_line(p)]


def test_workers_import_no_torch_and_are_limited(child):
    """Neither what prepares rows nor this test's own modules; nor does it start a thread pool."""
    assert "torch" not in child("modules")
    assert child("limit") > 200 << 20
    other = Child(partial(prepare, options=Options()), 20.0, 200)
    try:
        other.give(None)  # is no row: fails inside `prepare`, after all imports
        while not other.take()[0]:
            pass
        maps = psutil.Process(other._process.pid).memory_maps()
    finally:
        other.close()
    assert not [m.path for m in maps if "torch" in m.path]
    assert any("av" in m.path for m in maps)
