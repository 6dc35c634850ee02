"""A pipeline of `transformers` as a program for transcribe; needs the extra `hf`.

    python -m data_tools.caption_model FOLDER TASK [PROMPT]

speaks the protocol of `data_tools.caption_program`. FOLDER has the model with its tokenizer and
feature extractor; nothing is ever downloaded. TASK is `automatic-speech-recognition` (CTC models
and Whisper give words with times, Whisper without alignment heads phrases) or `image-text-to-text`,
which describes the picture in the middle of the clip. Clips without sound, or without pictures, get
an empty answer. Worker number n takes GPU n, modulo their number.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_tools.manifest.row import parse
from mmssl.data import media
from mmssl.data.decode import ClipReader
from mmssl.data.integrity import DamagedSampleError
from mmssl.data.media import Limits
from mmssl.data.samples import Record
from mmssl.views.plan import Need

_LIMITS = Limits(max_seconds=math.inf)  # of the file; what is cut out of it is the caller's choice
_CHUNK_S = 30.0  # of CTC models, whose memory grows with the square of the length
_PROMPT = "Describe the picture in one sentence."


class Recogniser:
    """Speech to words with times."""

    def __init__(self, pipe: Any) -> None:
        """Find out what the model can tell."""
        self._pipe, self._options = pipe, {}
        if pipe.type in ("ctc", "ctc_with_lm"):
            self._options = {"return_timestamps": "word", "chunk_length_s": _CHUNK_S}
        elif pipe.type == "seq2seq_whisper":
            config = pipe.model.generation_config
            if hasattr(config, "no_timestamps_token_id"):
                words = getattr(config, "alignment_heads", None) is not None
                self._options["return_timestamps"] = "word" if words else True
            self._options["return_language"] = bool(getattr(config, "is_multilingual", False))

    def __call__(self, reader: ClipReader, start_s: float, end_s: float) -> dict[str, Any]:
        """Transcript, words and language of a part of a clip."""
        if "audio" not in reader.has:
            return {}
        rate = self._pipe.feature_extractor.sampling_rate
        clip = reader.clip(Need(audio_hz=rate, audio_start_s=start_s, audio_end_s=end_s))
        assert clip.waveform is not None
        sound = {"raw": clip.waveform[0].numpy(), "sampling_rate": rate}
        found = self._pipe(sound, **self._options)
        words, language = [], ""
        for chunk in found.get("chunks", ()):
            first, last = chunk["timestamp"]
            # Whisper leaves open when what it was cut off in ends, and may begin after the end
            first = min(start_s + float(first), end_s)
            last = end_s if last is None else min(max(start_s + float(last), first), end_s)
            words.append([round(first, 3), round(last, 3), chunk["text"].strip()])
            language = language or chunk.get("language") or ""
        answer = {"transcript": found["text"].strip(), "words": words}
        return answer | ({"language": _code(language)} if language else {})


class Describer:
    """The picture in the middle to a caption."""

    def __init__(self, pipe: Any, prompt: str | None = None) -> None:
        """prompt: of chat models what to do, of others how captions begin."""
        self._pipe = pipe
        self._chats = getattr(pipe.processor, "chat_template", None) is not None
        self._prompt = prompt if prompt is not None else _PROMPT if self._chats else ""

    def __call__(self, reader: ClipReader, start_s: float, end_s: float) -> dict[str, Any]:
        """A caption of a part of a clip."""
        from PIL import Image

        if "video" not in reader.has:
            return {}
        clip = reader.clip(Need(frame_times_s=((start_s + end_s) / 2,)))
        assert clip.frames is not None
        picture = Image.fromarray(clip.frames[0].numpy())
        if self._chats:
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": self._prompt}]
            chat = [{"role": "user", "content": parts}]
            found = self._pipe(text=chat, return_full_text=False)
        else:
            found = self._pipe(images=picture, text=self._prompt)
        return {"captions": [found[0]["generated_text"].strip()]}


def _code(language: str) -> str:
    """`english` to `en`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    return str(TO_LANGUAGE_CODE.get(language, language))


def load(folder: Path, task: str, prompt: str | None = None) -> Recogniser | Describer:
    """The model of a folder, on this worker's GPU if there is one.

    Raises:
        OSError, ValueError: as `transformers` says.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported
    import transformers

    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('WORKER', '0')) % torch.cuda.device_count()}"
    # local_files_only= would be taken for an argument of `generate`; a folder is never looked up
    pipeline: Any = transformers.pipeline
    pipe = pipeline(task, model=str(folder.resolve(strict=True)), device=device)
    return Describer(pipe, prompt) if task == "image-text-to-text" else Recogniser(pipe)


def answer(model: Recogniser | Describer, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says of the clip of a request; `error` where it cannot be read."""
    tree = {name: value for name, value in request.items() if name != "id"}
    row = parse(Path("/"), "request", 0, tree)
    assert row.media is not None
    try:
        data = row.media.read_bytes()
        header = media.probe(data, _LIMITS)
        streams = {"audio": header.audio_streams, "video": header.video_streams}
        has = frozenset(modality for modality, count in streams.items() if count)
        record = Record("clip", "clip", 0, has, (), {}, video=data, sound=None)
        with ClipReader(record, _LIMITS) as reader, torch.inference_mode():
            end_s = min(row.end_s or math.inf, reader.duration_s)
            if row.start_s >= end_s:
                return {"error": f"start lies after the end ({reader.duration_s:.3f} s)"}
            return model(reader, row.start_s, end_s)
    except DamagedSampleError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{row.media}: {error.strerror or error}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Answer until the input ends; returns the exit status."""
    folder, task, *prompt = sys.argv[1:] if argv is None else argv
    # libraries print; what they print must not become an answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model = load(Path(folder), task, *prompt)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"id": request["id"], **answer(model, request)}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
