"""What holds for every test: one thread, no accelerator, no network."""

import os
import socket

# before anything imports torch or DeepSpeed
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

settings.register_profile("mmssl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("mmssl")

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """A test that would need a server fails here instead of somewhere else later."""
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in (*LOCAL, socket.gethostname()):
            raise RuntimeError(f"tests use no network: connection to {address[0]} refused")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield
