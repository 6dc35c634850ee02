"""Debian's Chromium, driven by playwright."""

import os
import shutil
from contextlib import contextmanager

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@contextmanager
def launched():
    """A browser.

    Raises:
        ImportError: no playwright. FileNotFoundError: no Chromium. Both say what to install.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ImportError("playwright is missing: pip install playwright") from error
    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError("chromium is missing: apt-get install chromium")
    # a container's /dev/shm can be tiny; root may not use the sandbox
    flags = ["--disable-dev-shm-usage", *(["--no-sandbox"] if ROOT else [])]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # beeps
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()
