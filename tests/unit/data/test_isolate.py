"""Decoding in a child process: equal rows, limits, replacement, interruption."""

import os
import signal
import time

import psutil
import pytest
import torch

from mmssl.data.collate import Item
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.isolate import DecodeChild
from mmssl.types import FrameLabels, Sample, UserError, View


def work(sample):
    """What the key says."""
    kind = sample.key.partition("-")[0]
    if kind == "sleep":
        time.sleep(1000)
    if kind == "crash":
        signal.raise_signal(signal.SIGSEGV)
    if kind == "eat":
        return bytearray(1 << 30)
    if kind == "tensor":
        return torch.ones(1 << 28)
    if kind == "wide":
        return bytes(190 << 20)  # no room for a copy, even where the parent left free memory
    if kind == "damaged":
        raise DamagedSampleError("decode", "broken")
    if kind == "settings":
        raise UserError("a wrong setting")
    if kind == "error":
        raise KeyError("who knows")
    view = View(torch.arange(5.0)[::2], 8.0, 0.5, os.getpid())
    view.labels = {"l": FrameLabels(torch.tensor([[1], [2]]), 2.0)}
    return Item(sample.key, "s", 1, ["c"], {"v": [view]}, {"bytes": sample.fields["mp4"]})


@pytest.fixture
def child():
    made = DecodeChild(work, 20.0, 200)
    yield made
    made.close()


def sample(key, data=b"media"):
    return Sample(key, ("Webdataset", 3), {"mp4": data})


def pid(child):
    return child(sample("ok")).views["v"][0].seed


def test_rows_come_back_as_they_are(child):
    data = os.urandom(3 << 20)
    item = child(sample("ok", data))
    (view,) = item.views["v"]
    assert (item.key, item.captions, item.meta["bytes"]) == ("ok", ["c"], data)
    assert view.data.tolist() == [0.0, 2.0, 4.0]
    assert view.labels["l"].ids.tolist() == [[1], [2]]
    view.data += 1  # it can be written to
    assert view.seed != os.getpid()
    assert pid(child) == view.seed  # the same child goes on


@pytest.mark.parametrize(
    ("key", "reason", "message"),
    [
        ("crash", "crash", "ended with status -11"),
        ("eat", "memory", r"data\.decode_mb = 200"),
        ("tensor", "memory", r"data\.decode_mb = 200"),
        ("wide", "memory", r"data\.decode_mb = 200"),
        ("damaged", "decode", "^broken$"),
        ("error", "error", "KeyError: 'who knows'"),
    ],
)
def test_bad_samples_have_their_reason(child, key, reason, message):
    first = pid(child)
    with pytest.raises(DamagedSampleError, match=message) as caught:
        child(sample(key))
    assert caught.value.reason == reason
    second = pid(child)
    assert (second != first) == (reason in ("crash", "memory"))
    assert psutil.pid_exists(first) == (second == first)


def test_time_is_limited():
    child = DecodeChild(work, 0.5, 200)
    began = time.monotonic()
    with pytest.raises(DamagedSampleError, match=r"not decoded within 0\.5 s") as caught:
        child(sample("sleep"))
    assert caught.value.reason == "timeout"
    assert 0.5 <= time.monotonic() - began < 100
    child.close()


def test_samples_beyond_the_memory_are_not_sent(child):
    with pytest.raises(DamagedSampleError, match=r"needs more than|larger than") as caught:
        child(sample("ok", bytes(201 << 20)))
    assert caught.value.reason == "memory"
    assert child(sample("ok")).key == "ok"


def test_wrong_settings_stay_settings(child):
    with pytest.raises(UserError, match="a wrong setting"):
        child(sample("settings"))


def test_an_interrupted_call_leaves_no_stale_answer(child):
    pid(child)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(InterruptedError("alarm")))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises((InterruptedError, DamagedSampleError)):
        child(sample("sleep"))
    assert child(sample("ok-2")).key == "ok-2"


def test_signals_to_the_group_do_not_touch_it(child):
    first = pid(child)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(first, number)
    assert pid(child) == first


def test_a_forked_process_has_its_own_child_which_dies_with_it(child):
    first = pid(child)
    read, write = os.pipe()
    forked = os.fork()
    if forked == 0:
        os.write(write, str(pid(child)).encode())
        time.sleep(1000)
    second = int(os.read(read, 20))
    assert second not in (first, forked)
    assert pid(child) == first
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)
    until = time.monotonic() + 60
    while psutil.pid_exists(second) and psutil.Process(second).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
