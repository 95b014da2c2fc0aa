"""Raw text → tokenized shards. This file declares the options; it imports none of the work, so that --help stays quick.

Reading order: sources/ (documents), tokenizer.py (text ↔ ids), shards.py (ids ↔ disk), pipeline.py (how they follow each other).
"""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes tokens; train.py uses the same options where it prepares a text on the way."""

    tokenizer: str = "bpe"
    """bpe (trained on the corpus), bytes, char, a published encoding (gpt2, o200k_base, …), or the path of a sprout_tokenizer.json."""
    vocab_size: Annotated[int, "257 <= x"] = 4096
    """Ids of a bpe tokenizer, end-of-sequence included; larger reads faster and needs a larger model. Other tokenizers bring their own."""
    split_pattern: Literal["gpt4o", "gpt2"] = "gpt4o"
    """How bpe splits text before merging: GPT-4o's pattern or GPT-2's."""
    encoding: str = "utf-8"
    """Encoding of the text files: utf-8, gb18030, utf-16, latin-1, … A byte order mark is removed."""
    separator: str | None = None
    r"""Ends a document within a file; \n, \t and \\ are understood: '\n' is one document a line. None: a file is a document."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """Validation part: whole documents chosen by their content, or the tail of the text. auto: tail under 20 documents."""
    val_fraction: Annotated[float, "0 < x < 1"] = 0.1
    """Share of the documents (or of the characters, by tail) kept for validation."""
    shard_tokens: Annotated[int, "8 <= x <= 2147483647"] = 100_000_000
    """Tokens a file of the dataset holds at most."""
    data_dir: str = "data"
    """Folder of the datasets and downloads."""

    def problems(self) -> list[str]:
        return ["--separator must not be empty; none means that a file is a document"] if self.separator == "" else []


@dataclass(frozen=True)
class SourceOptions:
    """What `python -m prepare_data SOURCE` reads and writes; SOURCE is text, shakespeare or python_stdlib."""

    input: str | None = None
    """Source text: a file, a folder, a glob in quotes, or - for standard input. Files that end in .gz are unpacked."""
    name: str | None = None
    """Name of the dataset, a folder under --data_dir. By default the input's name without its ending, or the source's."""
    dry_run: bool = False
    """Print counts and a decoded sample; write nothing."""
    overwrite: bool = False
    """Replace a dataset of that name that was made from another content or with other options."""
