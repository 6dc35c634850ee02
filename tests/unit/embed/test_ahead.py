"""Iterators that run ahead in threads."""

import threading
import time

import pytest
import torch

from mmssl.embed.ahead import in_order


def job(number, log=None, pause=0.0):
    def run():
        for k in range(3):
            time.sleep(pause)
            if log is not None:
                log.append((number, k))
            yield number, k

    return run


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_everything_comes_in_order(threads):
    jobs = [job(n, pause=0.002 * (5 - n)) for n in range(5)]  # the last ones are the fastest
    found = list(in_order(jobs, threads, jobs_ahead=2, depth=1))
    assert found == [(n, k) for n in range(5) for k in range(3)]


def test_jobs_run_ahead_but_not_without_bound():
    log = []
    read = in_order((job(n, log) for n in range(100)), 2, jobs_ahead=3, depth=8)
    next(read)
    deadline = time.monotonic() + 30
    while len(log) < 3 * 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert 3 * 3 <= len(log) <= 3 * 7
    read.close()


def test_the_readers_own_threads_stay_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(in_order([job(n) for n in range(4)], 2, 2, 2))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_full_queues_wait():
    log = []

    def endless():
        for k in range(10_000):
            log.append(k)
            yield k

    read = in_order([endless], 1, 1, depth=4)
    assert next(read) == 0
    time.sleep(0.2)
    assert len(log) <= 7
    read.close()  # ends the thread, which waits for room
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_arrive_where_they_belong(threads):
    def bad():
        yield "last"
        raise ValueError("broken")

    read = in_order([job(0), bad, job(2)], threads, 2, 2)
    assert [next(read) for _ in range(4)][-1] == "last"
    with pytest.raises(ValueError, match="broken"):
        next(read)
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_the_number_of_threads_of_the_process_stays():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert len(list(in_order([job(1)], 2, jobs_ahead=0, depth=1))) == 3
        found = []
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (found, torch.get_num_threads()) == ([2], 2)
    finally:
        torch.set_num_threads(before)
