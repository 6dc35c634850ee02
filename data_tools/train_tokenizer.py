"""Captions to a SentencePiece model: unigram with byte fallback, ready for `data.tokenizer`.

    python -m data_tools.train_tokenizer SHARDS_OR_MANIFEST... OUT.model [--vocab 8000]

Train it on the captions of the training split only. Ids: 0 padding, 1 unknown, 2 begin, 3 end, 4
<mask>. The same captions and options give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.manifest import read_rows
from mmssl.data.folders import MANIFEST, read_manifest
from mmssl.data.integrity import DamagedSampleError, read_record
from mmssl.data.text import MASK, Tokenizer
from mmssl.files import whole_file
from mmssl.types import UserError

_MAX_SENTENCES = 1_000_000
_TOO_LARGE = re.compile(r"value <= (\d+)")


@dataclass(frozen=True)
class Trained:
    """A written model; asked is the vocabulary size that was asked for."""

    path: Path
    vocab_size: int
    asked: int
    captions: int


def captions_of(path: Path) -> Iterator[str]:
    """Every caption of a shard folder, a manifest, or a folder of media.

    Raises:
        UserError: no such input, or a damaged shard.
    """
    if path.is_dir() and ((path / MANIFEST).exists() or any(path.glob(f"*/{MANIFEST}"))):
        for shard in read_manifest(path):
            yield from _shard_captions(path / shard.name)
        return
    for row in read_rows(path):
        yield from row.captions


def _shard_captions(path: Path) -> Iterator[str]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                if name != "json":
                    continue
                file = tar.extractfile(member)
                record = read_record(key, {"json": b"" if file is None else file.read()})
                yield from record["captions"]
    except (tarfile.TarError, DamagedSampleError) as error:
        raise UserError(
            f"{path}: damaged ({error}); run python -m data_tools.check_shards"
        ) from error


def train_tokenizer(
    inputs: str | Path | Sequence[str | Path], out: str | Path, vocab: int = 8000
) -> Trained:
    """Train and write a model.

    Args:
        inputs: shard folders or manifests; captions are read in their order.
        out: the `.model` file to write.
        vocab: largest vocabulary; reduced to what the captions support.

    Raises:
        UserError: no captions, or a vocabulary too small to hold all bytes.
    """
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    captions = [" ".join(c.split()) for p in paths for c in captions_of(Path(p))]
    if not captions:
        raise UserError(f"{', '.join(map(str, paths))}: no captions to train a tokenizer on")
    if vocab < 300:
        raise UserError(f"--vocab {vocab}: byte fallback needs at least 300 pieces")
    model = _train(captions, vocab)
    out = Path(out)
    with whole_file(out) as partial:
        partial.write_bytes(model)
    return Trained(out, Tokenizer(model, str(out)).vocab_size, vocab, len(captions))


def _train(captions: Sequence[str], vocab: int) -> bytes:
    """Train; if the captions do not support the size, SentencePiece says which size they do."""
    import sentencepiece

    sink = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions[:_MAX_SENTENCES]),
            model_writer=sink,
            model_type="unigram",
            vocab_size=vocab,
            byte_fallback=True,
            character_coverage=0.9995,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            user_defined_symbols=[MASK],
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        found = _TOO_LARGE.search(str(error))
        if found is None or int(found[1]) >= vocab:
            raise UserError(f"SentencePiece cannot train on these captions: {error}") from error
        return _train(captions, int(found[1]))
    return sink.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.train_tokenizer", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", nargs="+", type=Path, metavar="SHARDS_OR_MANIFEST")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=8000)
    args = parser.parse_args(argv)
    try:
        trained = train_tokenizer(args.inputs, args.out, args.vocab)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{trained.path}: {trained.vocab_size} pieces from {trained.captions} captions")
    if trained.vocab_size < trained.asked:
        print(f"  the captions support no more; {trained.asked} were asked for")
    return 0


if __name__ == "__main__":
    sys.exit(main())
