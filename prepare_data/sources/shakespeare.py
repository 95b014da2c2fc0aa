"""Tiny Shakespeare: 1.1 MB of plays in one file, downloaded once."""

import hashlib
from pathlib import Path

from common.download import download
from errors import UserError
from prepare_data.sources import Corpus, text

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def corpus(data_dir: Path, separator: str | None = None) -> Corpus:
    path = data_dir / "downloads" / "tinyshakespeare.txt"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        try:
            download(ADDRESS, path, SHA256)
        except OSError as error:
            raise UserError(
                f"{ADDRESS} could not be downloaded ({type(error).__name__}: {error}). Fetch it on another machine, then:"
                " python -m prepare_data shakespeare --input=FILE, with the tokenizer options you want, and --data=shakespeare for training"
            ) from None
    return Corpus("shakespeare", ADDRESS, text.corpus(str(path), separator=separator).pieces)
