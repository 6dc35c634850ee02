"""Files that exist completely or not at all."""

import multiprocessing

from mmssl.files import whole_file


def _write(path, text, barrier):
    with whole_file(path) as partial, partial.open("w") as file:
        barrier.wait(30)
        file.write(text)
        file.flush()
        barrier.wait(30)


def test_two_processes_write_one_file_whole(tmp_path):
    texts, context = ["a" * 10, "b" * 20], multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    jobs = [context.Process(target=_write, args=(tmp_path / "x", t, barrier)) for t in texts]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert (tmp_path / "x").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
