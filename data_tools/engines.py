"""Where rows are prepared: processes of this machine, or a Ray cluster; the results are the same.

Both keep the order of the rows, have a bounded number of them under way, and prepare each within
its limits of time and memory in a process that may die of it. The workers import no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import tee
from typing import Any

from data_tools.children import Child, ordered
from data_tools.manifest import Row
from data_tools.shard_rows import Made, Options, prepare
from mmssl.data.integrity import DamagedSampleError
from mmssl.types import UserError

_AHEAD = 4  # rows per processor that may be under way


def local(rows: Iterable[Row], options: Options) -> Iterator[Made]:
    """Rows in their order, prepared by `options.workers` processes."""
    work = partial(prepare, options=options)
    rows, tasks = tee(rows)
    results = ordered(work, tasks, options.workers, options.row_seconds, options.row_mb)
    for row, result in zip(rows, results, strict=True):
        yield _made(row, result)


def on_ray(rows: Iterable[Row], options: Options) -> Iterator[Made]:
    """Rows in their order, prepared on the cluster of RAY_ADDRESS or of this machine.

    Without a running cluster one of `options.workers` processors is started. All nodes must see the
    media under the same paths. Rows of a node that is lost are prepared again.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: needs Ray; pip install 'mmssl[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False)
        except ConnectionError:
            ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1, max_retries=3)(guarded)
    shared = ray.put(options)
    ahead = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    under_way: deque[tuple[Row, Any]] = deque()
    try:
        for row in rows:
            under_way.append((row, remote.remote(row, shared)))
            if len(under_way) >= ahead:
                yield _fetched(*under_way.popleft())
        while under_way:
            yield _fetched(*under_way.popleft())
    finally:  # where the build stops before its end
        for _, reference in under_way:
            ray.cancel(reference)


def _fetched(row: Row, reference: Any) -> Made:
    import ray

    try:
        return _made(row, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        lacking = isinstance(error, ray.exceptions.OutOfMemoryError)
        return Made(row, reason="memory" if lacking else "crash", message=str(error))


def guarded(row: Row, options: Options) -> Any:
    """`prepare` in this process's child: what came of the row, or the error instead of it."""
    return _child(options)(row)


@cache
def _child(options: Options) -> Child:
    return Child(partial(prepare, options=options), options.row_seconds, options.row_mb)


def _made(row: Row, result: Any) -> Made:
    if isinstance(result, DamagedSampleError):
        return Made(row, reason=result.reason, message=f"{row.media}: {result}")
    made: Made = result
    return made


ENGINES: dict[str, Callable[[Iterable[Row], Options], Iterator[Made]]] = {
    "local": local,
    "ray": on_ray,
}
