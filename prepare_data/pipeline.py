"""From a corpus to a dataset: count → split → tokenizer → encode → shards → rename. `resolve_data` does it on the way to training."""

import difflib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.option import unescape
from common.tokenizer import PUBLISHED, Tokenizer, char_tokenizer, named_tokenizer, train_bpe
from errors import UserError
from prepare_data import PrepareOptions, folders
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import SPLITS, Dataset, is_dataset, open_dataset
from prepare_data.sources import Corpus, python_stdlib, shakespeare, text
from prepare_data.split import HASHES, Counts, LabelledPiece, SplitRule, choose_rule, count

SOURCES = ("text", "shakespeare", "python_stdlib")
BATCH = 1 << 22  # characters encoded at a time
BPE_BYTES = 1 << 28  # text that a tokenizer is trained on, at most
DRY_CHARACTERS = 1 << 21  # text that a dry run encodes; from more, it estimates
LAYOUT = 1  # raise it when the same text and options come to lie differently on disk


def make_corpus(source: str, source_input: str | None, options: PrepareOptions) -> Corpus:
    """The corpus of a source's name, one of SOURCES."""
    separator = None if options.separator is None else unescape(options.separator)
    if source == "python_stdlib":
        if source_input is not None:
            raise UserError(
                f"--input={source_input}: python_stdlib reads the standard library; to read a text of yours, use the source text"
            )
        return python_stdlib.corpus(separator)
    if source == "shakespeare" and source_input is None:
        return shakespeare.corpus(Path(options.data_dir), separator)
    if source_input is None:
        raise UserError("text needs --input=FILE, a folder, a glob in quotes, or - for standard input")
    return text.corpus(source_input, options.encoding, separator)


def prepare(corpus: Corpus, options: PrepareOptions, name: str, overwrite: bool = False) -> Dataset:
    """The dataset data_dir/NAME of a corpus; if it is there already with the same content and options, it is left as it is."""
    final = Path(options.data_dir) / folders.check_name(name)
    counts = count(corpus, options.tokenizer == "char")
    request = _request(counts, options, None)
    if not overwrite:
        ready = _ready(final, request)
        if ready:
            print(f"{final}: already prepared ({describe(ready)})")
            return ready
    elif final.exists() and not (final / "dataset.json").is_file():
        raise UserError(f"{final}: is no dataset of this program, so it is not overwritten; choose another --name")
    return _build(corpus, counts, options, request, final, None, overwrite)


def resolve_data(data: str, options: PrepareOptions, tokenizer: Tokenizer | None = None) -> Dataset:
    """What --data names: a dataset's folder or name, or a text or source, which is prepared once, with `tokenizer` if one is given."""
    for folder in (Path(data), Path(options.data_dir) / data):
        if folder.is_dir() and is_dataset(folder):
            return _checked(open_dataset(folder, options.tokenizer), options, tokenizer)
    if text.find_files(data):
        corpus = make_corpus("text", data, options)
    elif data in SOURCES[1:]:
        corpus = make_corpus(data, None, options)
    else:
        known = sorted(folder.name for folder in Path(options.data_dir).glob("[!.]*") if is_dataset(folder))
        near = difflib.get_close_matches(data, [*known, *SOURCES[1:]], n=1)
        raise UserError(
            f"--data={data}: no dataset, file or folder of that name here ({Path.cwd()}), and no dataset in {options.data_dir}/"
            + (f"; did you mean {near[0]}?" if near else ".")
            + f" Datasets there: {', '.join(known) or 'none'}. Expected one of them, a text file or folder, or {' or '.join(SOURCES[1:])}"
        )
    counts = count(corpus, options.tokenizer == "char")
    request = _request(counts, options, tokenizer)
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    final = Path(options.data_dir) / folders.check_name(f"{corpus.name[:60]}-{key}")
    ready = _ready(final, request)
    if ready:
        print(f"data: {data} as prepared in {final} ({describe(ready)})")
        return ready
    print(f"data: preparing {data} in {final}")
    return _build(corpus, counts, options, request, final, tokenizer)


def describe(dataset: Dataset) -> str:
    train, val = len(dataset.train), len(dataset.val)
    return f"{train:,} + {val:,} tokens, {dataset.tokenizer.name} of {dataset.tokenizer.vocab_size:,} ids"


def dry_run(corpus: Corpus, options: PrepareOptions) -> None:
    """Prints what a preparation would give; writes nothing."""
    counts = count(corpus, options.tokenizer == "char")
    rule = choose_rule(counts, options)
    tokenizer = _make_tokenizer(corpus, counts, rule, options)
    characters, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    encoded, size, sample = 0, 0, np.empty(0, np.int64)
    for piece in rule.pieces(corpus):
        characters[piece.split] += len(piece.text)
        if encoded < DRY_CHARACTERS:
            ids = tokenizer.encode(piece.text)
            encoded, size = encoded + len(piece.text), size + len(ids)
            tokens[piece.split] += len(ids)
            if piece.split == "train" and not len(sample):
                sample = ids[:200]
    about = "" if encoded == counts.characters else "about "
    if about:
        tokens = {split: round(size * characters[split] / encoded) for split in SPLITS}
    total = max(1, sum(tokens.values()))
    print(f"{corpus.origin}: {counts.documents:,} documents, {counts.characters:,} characters, {counts.bytes:,} bytes")
    print(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} ids; {about}{counts.bytes / total:.2f} bytes a token")
    for split in SPLITS:
        share = characters[split] / counts.characters
        print(
            f"{split} (by {rule.name}): {characters[split]:,} characters ({share:.1%}), {about}{tokens[split]:,} tokens and the EOS"
        )
    print(
        f"the first {len(sample)} ids of train: {' '.join(map(str, sample[:20]))} …\n{tokenizer.decode(sample.tolist())}"
    )
    print("dry run: nothing was written")


def _request(counts: Counts, options: PrepareOptions, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """All that decides what a dataset holds; two equal requests make equal datasets."""
    asked: dict[str, Any] = {"name": options.tokenizer}
    if tokenizer is None and options.tokenizer not in ("bpe", "bytes", "char", *PUBLISHED):
        tokenizer = named_tokenizer(options.tokenizer)
    if tokenizer:
        asked = {"hash": tokenizer.content_hash}
    elif options.tokenizer == "bpe":
        asked |= {"vocab_size": options.vocab_size, "split_pattern": options.split_pattern}
    rest = {"split": options.split, "val_fraction": options.val_fraction, "shard_tokens": options.shard_tokens}
    return {"layout": LAYOUT, "content": counts.content, "tokenizer": asked, **rest}


def _ready(final: Path, request: dict[str, Any]) -> Dataset | None:
    """The dataset at `final`, if it is there; a UserError if it is another one."""
    if not final.exists():
        return None
    if not (final / "dataset.json").is_file():
        raise UserError(f"{final}: exists and is no dataset of this program; choose another --name, or delete it")
    dataset = open_dataset(final)
    there = dataset.meta.get("request")
    if there != request:
        changed = [key for key in request if not isinstance(there, dict) or there.get(key) != request[key]]
        what = ", ".join(changed).replace("content", "another text")
        raise UserError(
            f"{final}: a dataset of this name was made differently ({what}); choose another --name, or replace it with --overwrite=true"
        )
    return dataset


def _checked(dataset: Dataset, options: PrepareOptions, tokenizer: Tokenizer | None) -> Dataset:
    """A dataset that was ready before must fit the tokenizer of the weights it is to train."""
    own = dataset.tokenizer
    if tokenizer and tokenizer.content_hash != own.content_hash:
        raise UserError(
            f"{dataset.folder} was prepared with the tokenizer {own.name} ({own.vocab_size} ids, {own.content_hash[:8]}), but the model has"
            f" {tokenizer.name} ({tokenizer.vocab_size} ids, {tokenizer.content_hash[:8]}); give --data the text itself"
        )
    print(f"data: {dataset.folder} ({describe(dataset)})")
    if not tokenizer and options.tokenizer not in ("bpe", own.name):
        print(
            f"data: --tokenizer={options.tokenizer} is for text that is yet to be prepared; this dataset keeps {own.name}"
        )
    return dataset


def _make_tokenizer(corpus: Corpus, counts: Counts, rule: SplitRule, options: PrepareOptions) -> Tokenizer:
    if options.tokenizer == "char":
        return char_tokenizer(counts.alphabet)
    if options.tokenizer != "bpe":
        return named_tokenizer(options.tokenizer)
    share = min(1.0, BPE_BYTES / counts.bytes)
    texts = (
        piece.text
        for piece in rule.pieces(corpus)
        if piece.split == "train" and (share == 1 or _sampled(piece.text, share))
    )
    tokenizer = train_bpe(texts, options.vocab_size, options.split_pattern)
    if tokenizer.vocab_size < options.vocab_size:
        print(
            f"note: the text gives a byte-pair vocabulary of {tokenizer.vocab_size} ids only, not the {options.vocab_size} of --vocab_size"
        )
    return tokenizer


def _sampled(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"bpe sample")  # independent of the split's hash
    return int.from_bytes(digest.digest(), "little") < share * HASHES


def _build(
    corpus: Corpus,
    counts: Counts,
    options: PrepareOptions,
    request: dict[str, Any],
    final: Path,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
) -> Dataset:
    began = time.perf_counter()
    rule = choose_rule(counts, options)
    folder = None
    writers: dict[str, ShardWriter] = {}
    try:
        folders.clean(final.parent)
        folder = folders.temporary(final.parent)
        tokenizer = tokenizer or _make_tokenizer(corpus, counts, rule, options)
        writers |= {split: ShardWriter(folder, split, tokenizer, options.shard_tokens) for split in SPLITS}
        _encode(rule.pieces(corpus), tokenizer, writers, counts.bytes)
        shards = {split: writer.close() for split, writer in writers.items()}
        how = {key: value for key, value in asdict(options).items() if key != "data_dir"}
        about: dict[str, Any] = {
            "source": {"name": corpus.name, "origin": corpus.origin},
            "options": how,
            "request": request,
        }
        about |= {"split": {"rule": rule.name, "val_fraction": options.val_fraction}}
        about |= {"documents": counts.documents, "characters": counts.characters, "bytes": counts.bytes}
        write_dataset(folder, tokenizer, shards, about)
        if overwrite and final.exists():
            folders.replace(folder, final)
        else:
            folders.publish(folder, final)  # or another process was first; then its dataset is taken
    except OSError as error:
        raise UserError(
            f"{final}: could not be written ({error}); nothing was changed: make room or choose another --data_dir"
        ) from None
    finally:
        for writer in writers.values():
            writer.abort()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    dataset = _ready(final, request)
    assert dataset
    seconds = time.perf_counter() - began
    tokens = len(dataset.train) + len(dataset.val)
    for note in corpus.notes:
        print(f"note: {note}")
    print(
        f"prepared {final}: {counts.documents:,} documents, {counts.bytes:,} bytes → {describe(dataset)}, split by {rule.name};"
    )
    print(f"  {counts.bytes / tokens:.2f} bytes a token, {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    return dataset


def _encode(
    pieces: Iterator[LabelledPiece], tokenizer: Tokenizer, writers: dict[str, ShardWriter], total_bytes: int
) -> None:
    """Writes `EOS document EOS document … EOS` for each split; a split that begins within a document begins without EOS."""
    eos = np.array([tokenizer.eos_id], dtype=np.int64)
    began = time.perf_counter()
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(pieces):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                if writer.tokens == 0 and piece.starts:
                    writer.append(eos)
                writer.append(ids)
                if piece.ends:
                    writer.append(eos)
                bar.update(len(piece.text.encode()))
            tokens = sum(writer.tokens for writer in writers.values())
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s")


def _batches(pieces: Iterator[LabelledPiece]) -> Iterator[list[LabelledPiece]]:
    batch: list[LabelledPiece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
