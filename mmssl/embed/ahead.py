"""Runs iterators ahead of who reads them, in threads: decoding and encoding at the same time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import Full, Queue
from threading import Event
from typing import TypeVar, cast

import torch

T = TypeVar("T")
Job = Callable[[], Iterator[T]]

_POLL_S = 0.1  # how soon a thread that waits for room notices that nobody reads any more
_DONE = object()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    jobs: Iterable[Job[T]], threads: int, jobs_ahead: int, depth: int, each: int = 1
) -> Iterator[T]:
    """All that the jobs yield, in their order, whatever finishes first.

    Args:
        jobs: what is called in a thread.
        threads: so many run at a time; 0 = in this one, nothing ahead.
        jobs_ahead: so many have been started or finished before they are read.
        depth: what each may hold ready.
        each: threads of torch's own that one job may use; more than there are cores would wait for
            each other, and torch's do so at full speed.
    """
    if not threads:
        for job in jobs:
            yield from job()
        return
    stop, waiting = Event(), iter(jobs)
    usual = torch.get_num_threads()
    started: deque[Queue[object]] = deque()
    with ThreadPoolExecutor(threads, "ahead", torch.set_num_threads, (each,)) as pool:
        try:
            while True:
                for job in islice(waiting, threads + jobs_ahead - len(started)):
                    started.append(Queue(depth))
                    pool.submit(_fill, job, started[-1], stop)
                if not started:
                    return
                yield from _drained(started.popleft())
        finally:
            stop.set()
            torch.set_num_threads(usual)  # what a pool's thread sets is the default of later ones


def _fill(job: Job[T], queue: Queue[object], stop: Event) -> None:
    last: object = _DONE
    if stop.is_set():
        return
    try:
        for value in job():
            if not _put(value, queue, stop):
                return
    except BaseException as error:  # raised where the values are read
        last = error
    _put(last, queue, stop)


def _put(value: object, queue: Queue[object], stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(value, timeout=_POLL_S)
            return True
        except Full:
            continue
    return False


def _drained(queue: Queue[object]) -> Iterator[T]:
    while (value := queue.get()) is not _DONE:
        if isinstance(value, BaseException):
            raise value
        yield cast("T", value)
