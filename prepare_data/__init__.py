"""Raw text → tokenized shards. This file only declares the options, so that --help is fast.

Reading order: sources/ (documents), split.py (train and val), shards.py (the format and its reader), shard_writer.py,
folders.py (names, atomic renames), pipeline.py (the order of these steps), resolve.py (--data). convert.py turns the
shards of other programs into a dataset and back. Tokenizers are in common/tokenizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from common.option import escaped, path

if TYPE_CHECKING:
    from annotated_types import Ge, Interval

SOURCES = ("text", "shakespeare", "python_stdlib")


@dataclass(frozen=True)
class TextOptions:
    """How text files are read: by preparation, and by sample.py for a text that it scores."""

    encoding: str = "utf-8"
    """Encoding of the text files: utf-8, cp1252, gb18030, utf-16, … or auto: decided for each file, with a note of what
    was found. A byte order mark is removed."""
    exclude: tuple[str, ...] = ()
    """Leaves out files and folders of the text folder: a name, a path or a pattern, such as drafts/ or '*.log'. May be
    repeated. Images, archives, documents that are not plain text and hidden files are left out anyway."""
    follow_links: bool = False
    """Also reads what symbolic links in the text folder lead to outside of it."""
    separator: str | None = escaped(None)
    r"""Ends a document within a file; \n, \t and \\ are escapes: '\n' is one document per line. none: one per file."""

    def problems(self) -> list[str]:
        empty = self.separator == ""
        return ["--separator must not be empty; use none for one document per file"] if empty else []


@dataclass(frozen=True)
class PrepareOptions(TextOptions):
    """How text becomes tokens. train.py has the same options, for a text that it prepares itself."""

    tokenizer: str = path("bpe")
    """bpe (trained on the corpus), bytes, char, a published encoding (gpt2, o200k_base, …), or a tokenizer's file."""
    vocab_size: Annotated[int, Ge(1)] = 4096
    """Vocabulary size of bpe, EOS included, at least 257; larger: fewer tokens, more parameters. Other tokenizers have
    their own."""
    split_pattern: Literal["gpt4o", "gpt2"] = "gpt4o"
    """Regular expression that splits text before byte pairs are merged: GPT-4o's or GPT-2's."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """Validation split: whole documents, chosen by hash, or the tail of the text. auto: documents where they come near
    val_fraction, with 20 or more of them."""
    val_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    """Fraction of the text kept for validation: of its bytes by documents, of its characters by tail."""
    shard_tokens: Annotated[int, Interval(ge=8, le=2**31 - 1)] = 100_000_000
    """Maximum number of tokens per shard file."""
    data_dir: str = path("data")
    """Folder for datasets and downloads."""

    def problems(self) -> list[str]:
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            return [f"--vocab_size={self.vocab_size}: bpe needs at least 257, for 256 bytes and end-of-sequence"]
        return []


@dataclass(frozen=True)
class SourceOptions:
    """What `python -m prepare_data SOURCE` reads and writes; SOURCE is text, shakespeare, python_stdlib or convert."""

    input: str | None = path(None)
    """Source text: a file, a folder, a quoted glob, or - for standard input. Gzip files are decompressed. With convert:
    a folder of token shards, or a dataset's name or folder."""
    name: str | None = None
    """Name of the dataset, a folder under --data_dir. Default: the input's name without extension, or the source's."""
    dry_run: bool = False
    """Print counts and a decoded sample without writing anything."""
    overwrite: bool = False
    """Replace a dataset of the same name, or what convert wrote in --out, that has other content or other options."""


@dataclass(frozen=True)
class ConvertOptions:
    """What `python -m prepare_data convert` writes for other programs."""

    to: Literal["nanogpt", "llmc", "llmc-uint32", "modded-nanogpt", "build-nanogpt"] | None = None
    """Convert to the token shards of this program, which are written to --out. none: convert shards to a dataset."""
    out: str | None = path(None)
    """Folder that convert makes for the other program's files."""

    def problems(self) -> list[str]:
        if self.to and not self.out:
            return [f"--to={self.to} needs the folder to write: --out=DIR"]
        if self.out and not self.to:
            return [f"--out={self.out} is the folder for another program's files: add --to=nanogpt, for example"]
        return []
