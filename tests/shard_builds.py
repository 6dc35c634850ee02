"""Builds of shards that are killed, and the bytes of what they leave."""

import hashlib
import os
import signal
import subprocess
import sys
import time


def bytes_of(folder):
    """Hash of each file of a shard folder but Energon's, by name."""
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and ".nv-meta" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def command(source, out, *options):
    """The command line of a build."""
    return [sys.executable, "-m", "data_tools.make_shards", str(source), str(out), *options]


def killed(words, ready):
    """Kill a build as soon as `ready(seconds since its start)`; whether it was still running."""
    began = time.monotonic()
    process = subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not ready(time.monotonic() - began):
        time.sleep(0.002)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def settled(out):
    """Rows that the journal of an unfinished build holds."""
    path = out.with_name(f".{out.name}.partial") / ".journal.jsonl"
    try:
        return path.read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0
