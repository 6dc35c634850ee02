"""Object storage and whatever else fsspec knows by an address, and requests that fail at times."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from mmssl.types import UserError

T = TypeVar("T")

PATIENCE_S = 300.0  # so long a failing request is repeated


class StorageError(UserError):
    """A storage that failed for longer than `PATIENCE_S`, or denies access."""


def is_address(place: str | Path) -> bool:
    """Whether a place is an address such as s3://bucket/folder, rather than a path."""
    return "://" in str(place)


def open_storage(address: str, key: str = "") -> tuple[Any, str]:
    """The file system of an address, to be used in this process only, and the path in it.

    key: the setting that names it, for the message.

    Raises:
        UserError: fsspec does not know the address, or lacks a package for it.
    """
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(address.rstrip("/"))
    except (ImportError, ValueError) as error:
        place = f"{key}={address}" if key else address
        raise UserError(f"{place}: cannot be opened: {error}") from error
    return files, str(root)


def persistently(
    call: Callable[[], T], what: str, final: tuple[type[Exception], ...] = (FileNotFoundError,)
) -> T:
    """The result of a request, repeated with growing pauses while it fails.

    The libraries repeat requests, too; this outlasts what they take for final.

    Args:
        call: the request.
        what: names its object in messages.
        final: errors that no repetition mends; they pass, like those of the user.

    Raises:
        StorageError: it failed for `PATIENCE_S`, or is not permitted.
    """
    deadline = time.monotonic() + PATIENCE_S
    for attempt in count():
        try:
            return call()
        except Exception as error:  # any storage has errors of its own
            if isinstance(error, (UserError, *final)):
                raise
            if isinstance(error, PermissionError):  # credentials may also have expired meanwhile
                raise StorageError(
                    f"{what}: access is denied: {error}; check the credentials"
                ) from error
            told, pause = f"{what}: {type(error).__name__}: {error}", min(10.0, 0.1 * 2**attempt)
            if time.monotonic() + pause > deadline:
                raise StorageError(
                    f"{told}; it failed for {PATIENCE_S:g} s: check the connection and the "
                    "credentials, then give the same command again"
                ) from error
            if attempt == 2:  # seldom a matter of luck by now
                print(f"mmssl: {told}; trying again for {PATIENCE_S:g} s", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError
