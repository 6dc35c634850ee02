"""Captions and transcripts to a SentencePiece model: unigram or BPE, for `data.tokenizer`.

    python -m data_tools.train_tokenizer SHARDS_OR_MANIFEST... OUT.model [--vocab 8000]

Train it on the training split only. Ids: 0 padding, 1 unknown, 2 begin, 3 end, 4 <mask>, then all
bytes, in which unknown characters are spelt. Texts are streamed; of more than --max-texts a uniform
random sample is kept, chosen by a hash of the seed and of each text's clip, so that it does not
depend on their order. The same texts and options give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import math
import re
import sys
import tarfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_tools.manifest import Row, find_manifests, read_rows
from mmssl.data.folders import MANIFEST, read_manifest
from mmssl.data.integrity import DamagedSampleError, read_record
from mmssl.data.text import MASK, Tokenizer
from mmssl.files import whole_file
from mmssl.types import UserError

MODEL_TYPES = ("unigram", "bpe")
_MAX_BYTES = 4192
_TOO_LARGE = re.compile(r"value <= (\d+)")


@dataclass(frozen=True)
class Options:
    """How to train; vocab: largest vocabulary, reduced to what the texts support.

    coverage: share of all characters that get pieces of their own; the others are spelt in bytes.
    max_texts: how many are held in memory, and trained on.
    """

    vocab: int = 8000
    model_type: str = "unigram"
    coverage: float = 0.9995
    max_texts: int = 1_000_000
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A written model; asked: the vocabulary size that was asked for; used: texts trained on.

    languages: texts by language, "" where a clip names none.
    """

    path: Path
    vocab_size: int
    asked: int
    texts: int
    used: int
    languages: dict[str, int]


class Text(NamedTuple):
    """A caption or a transcript.

    clip: what tells its clip from others, wherever and in what order it is read.
    """

    text: str
    language: str
    clip: str


def texts_of(place: str | Path) -> Iterator[Text]:
    """Every text of a shard folder, a manifest, or a folder of manifests or media, in order.

    Raises:
        UserError: no such input, or a damaged shard.
    """
    path = Path(place)
    if path.is_dir() and ((path / MANIFEST).exists() or any(path.glob(f"*/{MANIFEST}"))):
        for shard in read_manifest(path):
            yield from _shard_texts(path / shard.name)
        return
    for manifest in find_manifests(place):
        for row in read_rows(manifest):
            yield from _row_texts(row)


def _row_texts(row: Row) -> Iterator[Text]:
    """What its sample in a shard would have."""
    if row.has is not None and "text" not in row.has:
        return
    said = row.transcript
    if said is not None and said.words and row.media is not None:
        said = said.within(row.start_s, math.inf if row.end_s is None else row.end_s)
    for text in (*row.captions, *((said.text,) if said and said.text else ())):
        yield Text(text, row.language, f"{row.source} {row.index}")


def _shard_texts(path: Path) -> Iterator[Text]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                if name != "json":
                    continue
                file = tar.extractfile(member)
                record = read_record(key, {"json": b"" if file is None else file.read()})
                said = record.get("transcript")
                for text in (*record["captions"], *((said["text"],) if said else ())):
                    yield Text(text, record.get("language", ""), key)
    except (tarfile.TarError, DamagedSampleError) as error:
        raise UserError(
            f"{path}: damaged ({error}); run python -m data_tools.check_shards"
        ) from error


def sample(texts: Iterable[Text], most: int, seed: int) -> list[str]:
    """All texts in their order, or if there are more than `most` a sample of that size.

    A sample has the texts with the smallest hashes of (seed, clip, text), sorted by them: the same
    for any order of reading. Never more than `most` texts are held.
    """
    kept: list[tuple[int, str]] = []
    full = False
    for text in texts:
        identity = f"{seed}\n{text.clip}\n{text.text}".encode()
        # negative: the heap's first, which goes next, is the largest hash
        rank = -int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest())
        if len(kept) < most:
            kept.append((rank, " ".join(text.text.split())))
            continue
        if not full:
            heapq.heapify(kept)
            full = True
        heapq.heappushpop(kept, (rank, " ".join(text.text.split())))
    return [text for _, text in (sorted(kept) if full else kept)]


def train_tokenizer(
    inputs: str | Path | Sequence[str | Path], out: str | Path, vocab: int = 8000, **options: Any
) -> Trained:
    """Train and write a model.

    Args:
        inputs: shard folders or manifests, see `texts_of`; read in their order.
        out: the `.model` file to write.
        vocab: largest vocabulary; reduced to what the texts support.
        options: other fields of `Options`.

    Raises:
        UserError: no texts, a vocabulary too small to hold all bytes, or another impossible option.
    """
    chosen = Options(vocab=vocab, **options)
    check_options(chosen)
    paths = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    languages: Counter[str] = Counter()

    def read() -> Iterator[Text]:
        every = (c for p in paths for c in texts_of(p))
        for text in tqdm(every, desc="read", unit="text", disable=None):
            languages[text.language] += 1
            yield text

    texts = sample(read(), chosen.max_texts, chosen.seed)
    if not texts:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: no captions or transcripts to train a tokenizer on")
    model = train_model(texts, chosen)
    out = Path(out)
    with whole_file(out) as partial:
        partial.write_bytes(model)
    size = Tokenizer(model, str(out)).vocab_size
    found = dict(languages.most_common())
    return Trained(out, size, vocab, languages.total(), len(texts), found)


def check_options(options: Options) -> None:
    """Refuse what nobody can mean.

    Raises:
        UserError: names the option.
    """
    if options.vocab < 300:
        raise UserError(f"--vocab {options.vocab}: byte fallback needs at least 300 pieces")
    if options.model_type not in MODEL_TYPES:
        raise UserError(f"--model-type {options.model_type}: is one of {', '.join(MODEL_TYPES)}")
    if not 0.98 <= options.coverage <= 1:
        raise UserError(f"--coverage {options.coverage:g}: must lie within 0.98 and 1")
    if options.max_texts < 1:
        raise UserError(f"--max-texts {options.max_texts}: must be 1 or more")


def train_model(texts: Sequence[str], options: Options) -> bytes:
    """Bytes of a model; if the texts do not support its size, of the largest that they do.

    Raises:
        UserError: SentencePiece's own objection.
    """
    import sentencepiece

    sink = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(_sentences, texts)),
            model_writer=sink,
            model_type=options.model_type,
            vocab_size=options.vocab,
            byte_fallback=True,
            character_coverage=options.coverage,
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
        if found is None or int(found[1]) >= options.vocab:
            raise UserError(f"SentencePiece cannot train on these texts: {error}") from error
        return train_model(texts, replace(options, vocab=int(found[1])))
    return sink.getvalue()


def _sentences(text: str) -> list[str]:
    """A long text in parts: SentencePiece leaves out lines of more than _MAX_BYTES."""
    if len(text.encode()) <= _MAX_BYTES:
        return [text]
    return textwrap.wrap(text, _MAX_BYTES // 4, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.train_tokenizer", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", nargs="+", metavar="SHARDS_OR_MANIFEST")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab", type=int, default=Options.vocab)
    parser.add_argument("--model-type", choices=MODEL_TYPES, default=Options.model_type)
    parser.add_argument(
        "--coverage", type=float, default=Options.coverage, help="of characters by own pieces"
    )
    parser.add_argument("--max-texts", type=int, default=Options.max_texts)
    parser.add_argument("--seed", type=int, default=Options.seed, help="of the sample")
    args = vars(parser.parse_args(argv))
    try:
        trained = train_tokenizer(args.pop("inputs"), args.pop("out"), **args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{trained.path}: {trained.vocab_size} pieces from {trained.texts} texts")
    if trained.vocab_size < trained.asked:
        print(f"  the texts support no more; {trained.asked} were asked for")
    if trained.used < trained.texts:
        print(f"  trained on a sample of {trained.used} texts")
    if set(trained.languages) != {""}:
        for language, count in trained.languages.items():
            print(f"  {language or 'no language'}: {count / trained.texts:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
