"""`mmssl demo [run=...] [data=... | db=...]`: the pages on a model and an index of its vectors."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mmssl.demos.web.desk import Desk, Shelf
from mmssl.embed import model as embedding
from mmssl.embed.model import EmbeddingModel
from mmssl.eval.options import parse
from mmssl.index import build, search
from mmssl.index.corpus import open_corpus
from mmssl.index.store import Index
from mmssl.specs import Spec
from mmssl.types import UserError

if TYPE_CHECKING:
    import gradio as gr

_RUN = "runs/quickstart"
# The page may reach nothing but this server, whatever its scripts ask for.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; font-src 'self' data:; "
    "frame-ancestors 'none'"
)


class DemoSpec(Spec):
    """What can be set behind `mmssl demo`."""

    run: str = ""  # default runs/quickstart, with db= the one that made it
    data: str = ""  # shards or media files; default what the run was tested on, else validated
    db: str = ""  # an index to search; default one of `data` below RUN/demo, made where it lacks
    which: Literal["ema", "best", "last"] = "ema"  # weights of the run
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in
    port: int = Field(7860, ge=0, le=65535)  # 0 takes any that is free
    max_mb: int = Field(64, ge=1)  # of an upload
    max_seconds: float = Field(60.0, gt=0)  # of an upload


def main(overrides: Sequence[str] = ()) -> None:
    """Serve until interrupted.

    Raises:
        UserError: no Gradio, no such run, data or index, an index of another model, or a port that
            is taken.
    """
    options = parse(DemoSpec, overrides)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads go then, too
    with tempfile.TemporaryDirectory(prefix="mmssl-demo-") as folder:
        page = start(options, Path(folder))
        print(f"mmssl demo: {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def start(options: DemoSpec, folder: Path) -> gr.Blocks:
    """The page, being served in another thread.

    Args:
        options: what to serve, and where.
        folder: uploads and results go here.

    Raises:
        UserError: as `main`.
    """
    # Gradio reads these when it is imported
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    try:
        import gradio  # noqa: F401  (heavy, and an extra)
    except ImportError as error:
        raise UserError(
            f"the demo needs Gradio ({error}); install the extra `demo`: pip install 'mmssl[demo]'"
        ) from error
    from mmssl.demos.web import pages

    port = _free_port(options.host, options.port)
    page = pages.build(desk_of(options, folder))
    page.queue(default_concurrency_limit=1)
    _launch(page, options, port, folder)
    return page


def desk_of(options: DemoSpec, folder: Path) -> Desk:
    """Model and index; the index of the run's own clips is made or gone on with first.

    Raises:
        UserError: no such run, data or index, or an index of another model.
    """
    index, model, name = _given(options) if options.db else _made(options)
    shelf = folder / "shelf"
    shelf.mkdir()
    return Desk(model, index, name, Shelf(shelf), options.max_seconds)


def _given(options: DemoSpec) -> tuple[Index, EmbeddingModel, str]:
    unread = sorted(options.model_fields_set & {"data", "which"})
    if unread:
        raise UserError(
            f"demo: {' and '.join(unread)} cannot be chosen for an index that is there; leave it "
            "out, or leave db= out"
        )
    index = Index.open(options.db)
    index.check_finished()
    return index, search.load_model(index, options.run, option="run"), options.db


def _made(options: DemoSpec) -> tuple[Index, EmbeddingModel, str]:
    run = Path(options.run or _RUN)
    if not run.is_dir():
        raise UserError(
            f"{run}: no such run folder; train one with `make quickstart` or name one with "
            "run=FOLDER"
        )
    model = embedding.load(run, options.which)
    data = options.data or model.spec.data.test or model.spec.data.val
    if not data:
        raise UserError(
            f"{model.spec.name}: the run names no shards of tests; give some with data=FOLDER, or "
            "an index with db=FOLDER"
        )
    name = open_corpus(data, model.spec.data.max_bytes).name
    # weights change as a run goes on, and models are never mixed
    out = run / "demo" / f"{model.hash[:16]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    build.build(data, build.BuildSpec(model=str(run), which=options.which, out=str(out)))
    return Index.open(out), model, data


def _free_port(host: str, port: int) -> int:
    """The port itself, of 0 any that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise UserError(
                f"host={host} port={port}: cannot be listened on ({error.strerror}); choose "
                "another with port=, port=0 for any"
            ) from error


class _Policy:
    """Says with every page what it may reach, and fetches nothing from elsewhere for it.

    Gradio would hand through what `file=http://...` names.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse  # comes with Gradio

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", _POLICY.encode()))
                message["headers"].append((b"referrer-policy", b"no-referrer"))
            await send(message)

        if "=http" in scope.get("path", ""):
            await PlainTextResponse("not found", 404)(scope, receive, send)
        else:
            await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def _launch(page: gr.Blocks, options: DemoSpec, port: int, folder: Path) -> None:
    from starlette.middleware import Middleware

    from mmssl.demos.web import pages

    page.launch(
        server_name=options.host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=options.max_mb * 2**20,
        allowed_paths=[str(folder / "shelf")],
        app_kwargs={"middleware": [Middleware(_Policy)]},
        css=pages.css(),
        head=pages.head(),
    )
