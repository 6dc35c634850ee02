"""The pages: Search, Localize and Explore."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from mmssl.demos.web import fragments
from mmssl.demos.web.desk import Desk, Given, Told
from mmssl.types import UserError

_HERE = Path(__file__).parent
_THRESHOLD = 0.3  # heat below it is not drawn at first
_NO_CLIP = "none"

# which dot of the map was chosen
_CHOOSE = """element.addEventListener('click', (event) => {
  const dot = event.target.closest('circle');
  if (!dot) return;
  element.querySelectorAll('.mmssl-chosen').forEach((c) => c.classList.remove('mmssl-chosen'));
  dot.classList.add('mmssl-chosen');
  trigger('click', {row: dot.dataset.row});
});"""


def head() -> str:
    """The script of the page."""
    script = (_HERE / "page.js").read_text()
    script = script.replace("__PALETTE__", json.dumps(fragments.palette()))
    return f"<script>{script.replace('__THRESHOLD__', str(_THRESHOLD))}</script>"


def css() -> str:
    """The style of the page."""
    return (_HERE / "page.css").read_text()


def build(desk: Desk) -> gr.Blocks:
    """The pages of a desk."""
    page: gr.Blocks
    with gr.Blocks(title="mmssl", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        held = ", ".join(f"{count} {modality}" for modality, count in desk.held.items())
        gr.Markdown(f"## mmssl · {desk.model.spec.name}\n{held} windows of `{desk.name}`")
        with gr.Tab("Search", id="search"):
            _search(desk)
        with gr.Tab("Localize", id="localize"):
            _localize(desk)
        with gr.Tab("Explore", id="explore"):
            _explore(desk, page)
    return page


def _answer(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; what a user can mend is shown as a sentence."""

    @functools.wraps(function)
    def answered(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    return answered


def _teller(progress: gr.Progress) -> Told:
    return lambda share, what: progress(share, desc=what)


def _search(desk: Desk) -> None:
    held = list(desk.held)
    seen = [m for m in held if m != "text"] or held  # words find their own captions first
    can = desk.model.supports
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            label="Text", placeholder="what is heard or seen", scale=4, visible=can("text"),
            elem_id="query-text",
        )  # fmt: skip
        go = gr.Button("Search", variant="primary", scale=1, elem_id="search-go")
    with gr.Row(equal_height=True):
        sound = gr.Audio(
            label="Sound", sources=["upload", "microphone"], type="filepath",
            visible=can("audio"), elem_id="query-sound",
        )  # fmt: skip
        video = gr.Video(
            label="Video (its pictures)", sources=["upload"], height=180,
            visible=can("video"), elem_id="query-video",
        )  # fmt: skip
        image = gr.File(
            label="Picture", file_types=["image"], height=180, visible=can("video"),
            elem_id="query-image",
        )  # fmt: skip
    with gr.Row():
        modalities = gr.CheckboxGroup(held, value=seen, label="Look in", scale=3, elem_id="look-in")
        k = gr.Slider(1, 24, value=8, step=1, label="Results", scale=2)
    shown = gr.HTML(elem_id="results")

    @_answer
    def search(
        text: str, sound: str, video: str, image: str, modalities: list[str], k: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  (how Gradio finds it)
    ) -> str:  # fmt: skip
        return desk.search(Given(text, sound, video, image), modalities, k, _teller(progress))

    given = [text, sound, video, image, modalities, k]
    gr.on([go.click, text.submit], search, given, shown, concurrency_id="model")


def _localize(desk: Desk) -> None:
    films, sounds = ([("—", _NO_CLIP), *desk.choices(m)] for m in ("video", "audio"))
    with gr.Row():
        with gr.Column(scale=2):
            video = gr.Video(
                label="Video", sources=["upload"], height=260, elem_id="localize-video"
            )
            clip = gr.Dropdown(films, value=_NO_CLIP, label="or a clip of the corpus")
            go = gr.Button("Localize its sound", variant="primary", elem_id="localize-go")
            with gr.Accordion("Swap the sound", open=True):
                sound = gr.Audio(
                    label="Another sound", sources=["upload", "microphone"], type="filepath",
                    elem_id="swap-sound",
                )  # fmt: skip
                other = gr.Dropdown(sounds, value=_NO_CLIP, label="or that of a clip")
                swap = gr.Button("Localize the other sound", elem_id="swap-go")
        with gr.Column(scale=3):
            shown = gr.HTML(elem_id="stage")
            threshold = gr.Slider(
                0, 1, value=_THRESHOLD, step=0.01, label="Threshold", elem_id="threshold"
            )
    threshold.change(fn=None, inputs=threshold, js="(value) => { window.mmssl.threshold(value); }")

    @_answer
    def localize(
        video: str, clip: str, progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:  # fmt: skip
        return desk.localize(video, _chosen(clip), None, None, _teller(progress))

    @_answer
    def swapped(
        video: str, clip: str, sound: str, other: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> str:  # fmt: skip
        if not sound and _chosen(other) is None:
            raise UserError("give another sound, or choose a clip that has one")
        return desk.localize(video, _chosen(clip), sound, _chosen(other), _teller(progress))

    go.click(localize, [video, clip], shown, concurrency_id="model")
    swap.click(swapped, [video, clip, sound, other], shown, concurrency_id="model")


def _chosen(clip: str | None) -> str | None:
    return None if clip == _NO_CLIP else clip


def _explore(desk: Desk, page: gr.Blocks) -> None:
    held = list(desk.held)
    with gr.Row():
        space = gr.Dropdown(desk.spaces, value=desk.spaces[0], label="Space")
        modalities = gr.CheckboxGroup(held, value=held, label="Modalities", scale=2)
        centred = gr.Checkbox(True, label="Modalities on one centre")
        words = gr.Textbox(label="Highlight captions with", placeholder="red hums")
    with gr.Row():
        with gr.Column(scale=3):
            drawn = gr.HTML(elem_id="map", js_on_load=_CHOOSE)
            told = gr.HTML()
        with gr.Column(scale=1):
            player = gr.HTML("<p>Choose a dot to see and hear its clip.</p>", elem_id="chosen")

    explore = _answer(desk.explore)
    given, out = [space, modalities, centred, words], [drawn, told]
    changes = [space.change, modalities.change, centred.change, words.submit, page.load]
    gr.on(changes, explore, given, out, concurrency_id="model", show_progress="hidden")

    @_answer
    def choose(event: gr.EventData) -> str:
        return desk.shown(str(event.row))

    drawn.click(choose, None, player)
