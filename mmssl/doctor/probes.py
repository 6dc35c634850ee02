"""The probes of `mmssl doctor`: each uses one library for real and returns a `Finding`."""

from __future__ import annotations

import io
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mmssl.doctor import Finding, Status
from mmssl.doctor.samples import SIDE, frames_problem, tone_problem, write_film

SAMPLES = 4  # in the test shard
PIP = "python -m pip install {}"
REINSTALL = "python -m pip install --force-reinstall --no-deps {}"


class TroubleError(Exception):
    """A probe's own finding: the cause, the remedy, and whether the part is there at all."""

    def __init__(self, cause: str, remedy: str, status: Status = "failed"):
        super().__init__(cause)
        self.remedy = remedy
        self.status = status


def probe(name: str, folder: Path) -> Finding:
    """Run the probe `name` with samples in `folder`; every failure becomes a finding."""
    run, package = PROBES[name]
    try:
        return Finding("ok", run(folder))
    except TroubleError as trouble:
        return Finding(trouble.status, str(trouble), trouble.remedy)
    except ModuleNotFoundError as error:
        what = f"no module `{error.name}`" if error.name else str(error)
        return Finding("missing", what, PIP.format(package))
    except Exception as error:  # a diagnosis has to report whatever a library raises
        cause = f"{type(error).__name__}: {_first_line(error)}"
        return Finding("failed", cause, REINSTALL.format(package))


def _first_line(error: BaseException) -> str:
    return next((t.strip() for t in str(error).splitlines() if t.strip()), "no message")


# ---------------------------------------------------------------- device


def device(folder: Path) -> str:
    """A matrix product on every device that torch sees."""
    import torch

    names = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in names:
        ones = torch.ones(64, 64, device=name)
        total = float((ones @ ones).sum())
        if total != 64.0**3:
            raise TroubleError(f"wrong product on {name}: {total}", "test the hardware")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not cards and shutil.which("nvidia-smi"):
        raise TroubleError(
            f"torch {torch.__version__} sees no GPU though nvidia-smi is installed",
            f"driver must support CUDA {torch.version.cuda}: compare with the output of nvidia-smi",
        )
    place = ", ".join(cards) or f"CPU only, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {place}"


# ---------------------------------------------------------------- decoders


def _film(folder: Path) -> Path:
    path = folder / "film.mp4"
    if not path.exists():
        try:
            write_film(path)
        except Exception as error:  # the film is needed by every decoder's probe
            path.unlink(missing_ok=True)
            cause = f"the test film cannot be written with PyAV: {_first_line(error)}"
            raise TroubleError(cause, PIP.format("'av>=17'")) from error
    return path


def _require(problem: str, remedy: str) -> None:
    if problem:
        raise TroubleError(problem, remedy)


def pyav(folder: Path) -> str:
    """Frames and tone of the film."""
    import av

    with av.open(str(_film(folder))) as film:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in film.decode(video=0)])
    with av.open(str(_film(folder))) as film:
        wave = np.concatenate([f.to_ndarray()[0] for f in film.decode(audio=0)])
    _require(frames_problem(frames) or tone_problem(wave), REINSTALL.format("av"))
    return f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}"


def decord(folder: Path) -> str:
    """Frames of the film; video only, it is not used for audio."""
    try:
        import decord as library
    except ModuleNotFoundError as error:
        if error.name != "decord":
            raise
        cause = f"not installed; no wheel may exist for {platform.system()} {platform.machine()}"
        raise TroubleError(cause, "nothing to do: PyAV alone serves", "missing") from error
    frames = library.VideoReader(str(_film(folder)), num_threads=1)[:].asnumpy()
    _require(frames_problem(frames), "set data.decoder=pyav")
    return f"decord {version('decord') if _has('decord') else version('eva-decord')}"


def _has(package: str) -> bool:
    from importlib.metadata import distributions

    return any(d.name == package for d in distributions())


def torchcodec(folder: Path) -> str:
    """Frames of the film."""
    film = _film(folder)
    try:
        from torchcodec.decoders import VideoDecoder

        reader = VideoDecoder(str(film), dimension_order="NHWC")  # newer releases load FFmpeg here
    except (RuntimeError, OSError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise TroubleError(*torchcodec_cause(str(error))) from error
    frames = reader[:].numpy()
    _require(frames_problem(frames), "set data.decoder=pyav")
    return f"torchcodec {version('torchcodec')}"


def torchcodec_cause(text: str) -> tuple[str, str]:
    """(cause, remedy) read out of the text of torchcodec's load error.

    The text lists one attempt per FFmpeg version; a missing symbol in any of them means that FFmpeg
    was found and torch does not fit, so that cause is looked for first.
    """
    symbol = re.search(r"undefined symbol: (\S+)", text)
    if symbol:
        cause = f"built for another torch than {version('torch')} (symbol {symbol[1][:40]} missing)"
        return (
            cause,
            "install the torchcodec release that matches this torch (its README has a table)",
        )
    cuda = re.search(r"(lib(?:npp|nv|cu)\w*\.so[.\d]*): cannot open", text)
    if cuda:
        return (
            f"CUDA library {cuda[1]} not found",
            "install torchcodec's CPU build, or that library",
        )
    wanted = sorted(set(re.findall(r"(libav\w+\.so\.\d+|libsw\w+\.so\.\d+): cannot open", text)))
    if wanted:
        return (
            f"no FFmpeg shared libraries found (looked for {', '.join(wanted)})",
            "install FFmpeg 4 to 9 with shared libraries, e.g. apt-get install ffmpeg",
        )
    return f"cannot be loaded: {text.strip().splitlines()[0]}", PIP.format("-U torchcodec")


def ffmpeg(folder: Path) -> str:
    """Frames of the film through the command line tool."""
    binary = shutil.which("ffmpeg")
    if binary is None:
        raise TroubleError("no ffmpeg command on the PATH", "apt-get install ffmpeg", "missing")
    size = SIDE * SIDE * 3
    command = [binary, "-nostdin", "-v", "error", "-i", str(_film(folder))]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise TroubleError(
            done.stderr.decode(errors="replace").strip(), "reinstall the package ffmpeg"
        )
    frames = np.frombuffer(done.stdout, np.uint8)
    _require(
        "" if frames.size % size == 0 else "a frame is cut off", "reinstall the package ffmpeg"
    )
    _require(frames_problem(frames.reshape(-1, SIDE, SIDE, 3)), "reinstall the package ffmpeg")
    head = subprocess.run([binary, "-version"], capture_output=True, text=True, check=True).stdout
    return " ".join(head.split()[:3])


# ---------------------------------------------------------------- training stack


def deepspeed(folder: Path) -> str:
    """One optimiser step on the CPU; the weight of y = w x must move by exactly the gradient."""
    import logging

    logging.disable(logging.WARNING)
    import deepspeed as library
    import torch

    from mmssl import dist

    ops = library.ops.__compatible_ops__
    ops["deepspeed_shm_comm"] = False  # it would be compiled, and a user's machine has no compiler
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, its launcher or not
    dist.init()
    layer = torch.nn.Linear(1, 1, bias=False)
    start = float(layer.weight.detach())
    engine, *_ = library.initialize(
        model=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.5),
        config={
            "train_batch_size": 1,
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 10**9,
        },
    )
    loss = engine(torch.ones(1, 1, device=engine.device)).sum()
    engine.backward(loss)
    engine.step()
    moved = start - float(layer.weight.detach())
    dist.shutdown()
    _require(
        "" if abs(moved - 0.5) < 1e-6 else f"a step moved by {moved}, not 0.5",
        REINSTALL.format("deepspeed"),
    )
    return f"deepspeed {version('deepspeed')}, one step on {engine.device}"


def energon(folder: Path) -> str:
    """Index a shard of four samples and read them back in order."""
    from megatron.energon import WorkerConfig, get_loader, get_val_dataset

    root = folder / "shards"
    _write_shard(root)
    worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
    rows = list(
        get_loader(get_val_dataset(str(root), split_part="val", worker_config=worker, batch_size=1))
    )
    texts = sorted(text for row in rows for text in row.text)
    wanted = [f"sample {i}" for i in range(SAMPLES)]
    _require("" if texts == wanted else f"read {texts}", REINSTALL.format("megatron-energon"))
    return f"megatron-energon {version('megatron-energon')}, {len(texts)} samples read"


def _write_shard(root: Path) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for i in range(SAMPLES):
            data = f"sample {i}".encode()
            member = tarfile.TarInfo(f"{i:04d}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    WebdatasetPreparator.prepare_dataset(
        root, ["shard-0.tar"], split_parts_ratio=[("val", 1.0)], shuffle_seed=None, workers=1
    )
    (root / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: TextWebdataset\nfield_map: {text: txt}\n"
    )


# ---------------------------------------------------------------- the rest


def faiss(folder: Path) -> str:
    """Exact search finds every point itself."""
    import faiss as library

    points = np.eye(16, dtype=np.float32)
    index = library.IndexFlatIP(16)
    index.add(points)
    _, found = index.search(points, 1)
    right = bool((found[:, 0] == np.arange(16)).all())
    _require(
        "" if right else "exact search returns wrong neighbours", REINSTALL.format("faiss-cpu")
    )
    return f"faiss {library.__version__}"


def sentencepiece(folder: Path) -> str:
    """Train a tiny tokenizer and read a sentence back."""
    import sentencepiece as library

    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle beeps", "a green square is silent"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = library.SentencePieceProcessor(model_proto=model.getvalue())
    text = tokenizer.decode(tokenizer.encode("a red square"))
    _require(
        "" if text == "a red square" else f"read back {text!r}", REINSTALL.format("sentencepiece")
    )
    return f"sentencepiece {version('sentencepiece')}"


# name -> (probe, what to install where it is missing)
PROBES: dict[str, tuple[Callable[[Path], str], str]] = {
    "device": (device, "'torch>=2.11,<2.13'"),
    "pyav": (pyav, "'av>=17'"),
    "decord": (decord, "decord"),
    "torchcodec": (torchcodec, "'torchcodec>=0.11'"),
    "ffmpeg": (ffmpeg, ""),
    "deepspeed": (deepspeed, "'deepspeed>=0.19.8'"),
    "energon": (energon, "'megatron-energon>=7.4'"),
    "faiss": (faiss, "faiss-cpu"),
    "sentencepiece": (sentencepiece, "sentencepiece"),
}
