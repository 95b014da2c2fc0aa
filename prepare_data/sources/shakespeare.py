"""Tiny Shakespeare (from karpathy/char-rnn): 1.1 MB of plays in one file, downloaded once."""

import hashlib
from pathlib import Path

from common.download import download
from errors import UserError
from prepare_data.sources import Corpus, text

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def corpus(data_dir: Path, separator: str | None = None) -> Corpus:
    """Downloads the text unless data_dir/downloads has it. Raises UserError if that fails."""
    path = data_dir / "downloads" / "tinyshakespeare.txt"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        try:
            download(ADDRESS, path, SHA256)
        except OSError as error:
            raise UserError(
                f"{ADDRESS}: download failed ({type(error).__name__}: {error}). Download it on another machine, run"
                " python -m prepare_data shakespeare --input=FILE, with any tokenizer options,"
                " and train with --data=shakespeare"
            ) from None
    return Corpus("shakespeare", ADDRESS, text.corpus(str(path), separator=separator).pieces)
