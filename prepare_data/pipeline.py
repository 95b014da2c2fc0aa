"""From a corpus to a dataset on disk: count, split, train the tokenizer, encode, write shards, rename the folder.

Owns the order of these steps and the decision whether an existing dataset can be reused. Entry points: `prepare` and
`dry_run` for `python -m prepare_data`; resolve.py is that of train.py. Knows nothing of models or training.
"""

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import PUBLISHED, Tokenizer, char_tokenizer, describe_unknown, named_tokenizer, train_bpe
from errors import UserError
from prepare_data import PrepareOptions, folders
from prepare_data.shard_format import SPLITS
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import Dataset, open_dataset
from prepare_data.sources import Corpus, python_stdlib, shakespeare, text
from prepare_data.split import HASHES, Counts, LabeledPiece, SplitRule, choose_rule, count, percent
from terminal import progress_bar

BATCH_CHARACTERS = 1 << 22  # encoded at a time
MAX_BPE_BYTES = 1 << 28  # UTF-8 bytes that a bpe tokenizer is trained on
DRY_RUN_CHARACTERS = 1 << 21  # a dry run encodes this much and extrapolates from it
LAYOUT = 2  # increment when the same text and options produce different files


def make_corpus(source: str, source_input: str | None, options: PrepareOptions) -> Corpus:
    """The corpus of `source`, one of SOURCES. Raises UserError if `source_input` is missing or not allowed."""
    if source == "python_stdlib":
        if source_input is not None:
            raise UserError(
                f"--input={source_input}: python_stdlib always reads the standard library;"
                " for your own text, use the source text"
            )
        return python_stdlib.corpus(options.separator)
    if source == "shakespeare" and source_input is None:
        return shakespeare.corpus(Path(options.data_dir), options.separator)
    if source_input is None:
        raise UserError("text needs --input=FILE, a folder, a glob in quotes, or - for standard input")
    return text.corpus(source_input, options.encoding, options.separator, options.exclude, options.follow_links)


def prepare(corpus: Corpus, options: PrepareOptions, name: str, overwrite: bool = False) -> Dataset:
    """Writes the dataset data_dir/NAME, or returns the existing one if it was made from the same content and options.

    Raises UserError if the name is taken by another dataset and `overwrite` is false, or by anything but a dataset.
    """
    final = Path(options.data_dir) / folders.check_name(name)
    counts = count(corpus, options.tokenizer == "char")
    request = make_request(counts, options, None)
    if not overwrite:
        existing = open_existing(final, request)
        if existing:
            print(f"{final}: already prepared ({describe(existing)})")
            return existing
    elif final.exists() and not (final / "dataset.json").is_file():
        raise UserError(f"{final}: is not a Sprout dataset, so it is not overwritten; choose another --name")
    return build(corpus, counts, options, request, final, None, overwrite)


def describe(dataset: Dataset) -> str:
    """Token counts of train and val, and the tokenizer, for the console."""
    train, val = len(dataset.train), len(dataset.val)
    return f"{train:,} + {val:,} tokens, {dataset.tokenizer.name} of {dataset.tokenizer.vocab_size:,} ids"


def dry_run(corpus: Corpus, options: PrepareOptions) -> None:
    """Prints the counts, the tokenizer, the split and a decoded sample that `prepare` would produce; writes nothing."""
    counts = count(corpus, options.tokenizer == "char")
    rule = choose_rule(counts, options)
    tokenizer = _make_tokenizer(corpus, counts, rule, options)
    characters, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    encoded, sample = 0, np.empty(0, np.int64)
    for piece in rule.pieces(corpus):
        characters[piece.split] += len(piece.text)
        if encoded < DRY_RUN_CHARACTERS:
            ids = tokenizer.encode(piece.text)
            encoded += len(piece.text)
            tokens[piece.split] += len(ids)
            if piece.split == "train" and not len(sample):
                sample = ids[:200]
    about = "" if encoded == counts.characters else "about "
    if about:
        tokens_per_character = sum(tokens.values()) / encoded
        tokens = {split: round(characters[split] * tokens_per_character) for split in SPLITS}
    total = max(1, sum(tokens.values()))
    print(f"{corpus.origin}: {counts.n_documents()}, {counts.characters:,} characters, {counts.bytes:,} bytes")
    print(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids; {about}{counts.bytes / total:.2f} bytes a token")
    print(f"split by {describe_rule(rule)}")
    for split in SPLITS:
        share = characters[split] / counts.characters
        print(
            f"{split}: {characters[split]:,} characters ({share:.1%}), {about}{tokens[split]:,} tokens, EOS not counted"
        )
    for note in rule.notes:
        print(f"note: {note}")
    print(f"first {len(sample)} ids of train: {' '.join(map(str, sample[:20]))} …\n{tokenizer.decode(sample.tolist())}")
    print("dry run: nothing was written")


def make_request(counts: Counts, options: PrepareOptions, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything that determines the files of a dataset: equal requests give equal datasets. Stored in dataset.json."""
    tokenizer_request: dict[str, Any] = {"name": options.tokenizer}
    if tokenizer is None and options.tokenizer not in ("bpe", "bytes", "char", *PUBLISHED):
        tokenizer = named_tokenizer(options.tokenizer)
    if tokenizer:
        tokenizer_request = {"hash": tokenizer.content_hash}
    elif options.tokenizer == "bpe":
        tokenizer_request |= {"vocab_size": options.vocab_size, "split_pattern": options.split_pattern}
    return {
        "layout": LAYOUT,
        "content": counts.content,
        "tokenizer": tokenizer_request,
        "split": options.split,
        "val_fraction": options.val_fraction,
        "shard_tokens": options.shard_tokens,
    }


def open_existing(final: Path, request: dict[str, Any]) -> Dataset | None:
    """The dataset at `final`; None if there is nothing. Raises UserError if it was made by another request."""
    if not final.exists():
        return None
    if not (final / "dataset.json").is_file():
        raise UserError(f"{final}: exists but is not a Sprout dataset; choose another --name, or delete it")
    dataset = open_dataset(final)
    stored = dataset.meta.get("request")
    if stored != request:
        changed = [key for key in request if not isinstance(stored, dict) or stored.get(key) != request[key]]
        words = {"content": "the text", "layout": "the version of Sprout that wrote it"}
        differences = ", ".join(words.get(key, key) for key in changed)
        raise UserError(
            f"{final}: the existing dataset differs in {differences};"
            " choose another --name, or replace it with --overwrite=true"
        )
    return dataset


def _make_tokenizer(corpus: Corpus, counts: Counts, rule: SplitRule, options: PrepareOptions) -> Tokenizer:
    if options.tokenizer == "char":
        return char_tokenizer(counts.alphabet)
    if options.tokenizer != "bpe":
        return named_tokenizer(options.tokenizer)
    fraction = min(1.0, MAX_BPE_BYTES / counts.bytes)
    texts = (
        piece.text
        for piece in rule.pieces(corpus)
        if piece.split == "train" and (fraction == 1 or _is_sampled(piece.text, fraction))
    )
    tokenizer = train_bpe(texts, options.vocab_size, options.split_pattern)
    if tokenizer.vocab_size < options.vocab_size:
        print(f"note: this text yields only {tokenizer.vocab_size:,} ids, fewer than vocab_size={options.vocab_size:,}")
    return tokenizer


def _is_sampled(text: str, fraction: float) -> bool:
    """Whether a piece is among the fraction that bpe is trained on; a hash decides, so the choice is reproducible."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"bpe sample")  # independent of the split's hash
    return int.from_bytes(digest.digest(), "little") < fraction * HASHES


def build(
    corpus: Corpus,
    counts: Counts,
    options: PrepareOptions,
    request: dict[str, Any],
    final: Path,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
) -> Dataset:
    """Writes the dataset into a temporary folder and renames it to `final`. Raises UserError if the disk fails."""
    start = time.perf_counter()
    rule = choose_rule(counts, options)
    folder = None
    writers: dict[str, ShardWriter] = {}
    try:
        folders.clean(final.parent)
        folder = folders.temporary(final.parent)
        tokenizer = tokenizer or _make_tokenizer(corpus, counts, rule, options)
        writers |= {split: ShardWriter(folder, split, tokenizer, options.shard_tokens) for split in SPLITS}
        unknown = _encode(rule.pieces(corpus), tokenizer, writers, counts.bytes)
        shards = {split: writer.close() for split, writer in writers.items()}
        metadata = {
            "source": {"name": corpus.name, "origin": corpus.origin},
            "options": {key: value for key, value in asdict(options).items() if key != "data_dir"},
            "request": request,
            "split": {"rule": rule.name, "reason": rule.reason, "val_fraction": options.val_fraction},
            "documents": counts.documents,
            "characters": counts.characters,
            "bytes": counts.bytes,
        }
        write_dataset(folder, tokenizer, shards, metadata)
        if overwrite and final.exists():
            folders.replace(folder, final)
        else:
            folders.publish(folder, final)  # False if another process published first: its dataset is used below
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written ({error}); nothing was changed: free disk space or choose another --data_dir"
        ) from None
    finally:
        for writer in writers.values():
            writer.abort()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    dataset = open_existing(final, request)
    assert dataset
    seconds = time.perf_counter() - start
    tokens = len(dataset.train) + len(dataset.val)
    for note in (*rule.notes, *([f"left out {describe_unknown(unknown)}"] if unknown else [])):
        print(f"note: {note}")
    print(
        f"prepared {final}: {counts.n_documents()}, {counts.bytes:,} bytes →"
        f" {describe(dataset)}, split by {describe_rule(rule)};"
    )
    val_bytes = sum(entry["bytes"] for entry in dataset.meta["shards"]["val"])
    print(
        f"  val is {percent(val_bytes / counts.bytes)} of the text, {counts.bytes / tokens:.2f} bytes a token,"
        f" {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    )
    return dataset


def describe_rule(rule: SplitRule) -> str:
    return f"{rule.name} ({rule.reason})" if rule.reason else rule.name


def _encode(
    pieces: Iterator[LabeledPiece], tokenizer: Tokenizer, writers: dict[str, ShardWriter], total_bytes: int
) -> Counter[str]:
    """Writes `EOS document EOS … document EOS` for each split, without the first EOS if it begins inside a document.
    Returns how often the characters stand there that the tokenizer lacks and leaves out."""
    unknown = Counter[str]()
    eos = np.array([tokenizer.eos_id], dtype=np.int64)
    start = time.perf_counter()
    with progress_bar("encoding", total_bytes) as bar:
        for batch in _batches(pieces):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                if writer.tokens == 0 and piece.starts:
                    writer.append(eos)
                writer.append(ids)
                unknown.update({char: piece.text.count(char) for char in tokenizer.unknown(piece.text)})
                if piece.ends:
                    writer.append(eos)
                bar.update(len(piece.text.encode()))
            tokens = sum(writer.tokens for writer in writers.values())
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
    return unknown


def _batches(pieces: Iterator[LabeledPiece]) -> Iterator[list[LabeledPiece]]:
    batch: list[LabeledPiece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
