"""The README's pictures of the web demo, taken of a run in Debian's Chromium.

    python -m tests.benchmarks.demo_pictures runs/quickstart [--clip 4] [--at 1.2]

Writes demo_search.png, demo_localize.png and demo_explore.png below --out. The run's test clips are
those of Bouncing Shapes; the clip that is localized should show two shapes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mmssl.demos.localize import loudness
from mmssl.demos.web import serve
from mmssl.demos.web.desk import Desk
from mmssl.index.corpus import PLACE, record_of
from tests.chromium import launched

OUT = Path(__file__).parent / "results"
FONTS = "document.fonts.ready"
SHOWN = """(where) => [...document.querySelectorAll(where)].every((v) => v.readyState >= 2)"""


def search(page: Any, desk: Desk, args: argparse.Namespace) -> None:
    page.fill("#query-text input, #query-text textarea", args.text)
    page.click("#search-go")
    page.locator(".mmssl-card").first.wait_for()
    page.wait_for_function(SHOWN, arg=".mmssl-card video")


def localize(page: Any, desk: Desk, args: argparse.Namespace) -> None:
    """At the loudest moment, unless another is asked for."""
    _, clip = desk.choices("video")[args.clip - 1]
    record = record_of(desk.index.row(clip, PLACE), desk.model.spec.data.max_bytes)
    path = args.folder / "clip.mp4"
    path.write_bytes(record.video)
    loud = loudness(record.video, path)
    page.set_input_files("#localize-video input[type=file]", path)
    page.locator("#localize-video video").wait_for()
    page.click("#localize-go")
    page.locator(".mmssl-stage video").wait_for()
    page.locator(".mmssl-stage video").evaluate(
        """async (video, [share, at]) => {
            if (!video.duration) await new Promise((done) => video.onloadedmetadata = done);
            const there = new Promise((done) => { video.onseeked = done; });
            video.currentTime = at ?? share * video.duration;
            await there;
            video.controls = false;
        }""",
        [float(np.argmax(loud)) / len(loud), args.at],
    )
    page.mouse.move(0, 0)


def explore(page: Any, desk: Desk, args: argparse.Namespace) -> None:
    page.locator(".mmssl-map circle").first.wait_for()
    words = page.get_by_label("Highlight captions with")
    words.fill(args.words)
    words.press("Enter")
    page.wait_for_function("document.querySelector('.mmssl-faint')")
    page.locator("circle.mmssl-video:not(.mmssl-faint)").first.click(force=True)
    page.locator(".mmssl-player video").wait_for()
    page.wait_for_function(SHOWN, arg=".mmssl-player video")


TABS = {"Search": (search, 890), "Localize": (localize, 1010), "Explore": (explore, 770)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--text", default="a large red circle beeps")
    parser.add_argument("--clip", type=int, default=4, help="number in the menu of clips")
    parser.add_argument("--at", type=float, help="seconds; default the loudest moment")
    parser.add_argument("--words", default="red heart")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        args.folder = Path(folder)
        (args.folder / "served").mkdir()
        desk = serve.desk_of(serve.DemoSpec(run=args.run), args.folder)
        served = serve.start(serve.DemoSpec(run=args.run, port=0), args.folder / "served")
        for name, (shows, height) in TABS.items():
            page = browser.new_page(viewport={"width": 1080, "height": height})
            page.goto(served.local_url)
            page.get_by_role("tab", name=name).click()
            shows(page, desk, args)
            page.evaluate(FONTS)
            page.wait_for_timeout(1000)
            page.screenshot(path=args.out / f"demo_{name.lower()}.png")
            page.close()
        served.close()


if __name__ == "__main__":
    main()
