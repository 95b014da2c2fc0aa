"""Tiny Shakespeare (from karpathy/char-rnn): 1.1 MB of plays in one file, downloaded once."""

import hashlib
from pathlib import Path

from common.download import DownloadFailed, download
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
        except DownloadFailed as error:
            raise UserError(
                f"use a text of your own (--data=FILE_OR_FOLDER), or save {ADDRESS} from another machine as {path} and"
                f" repeat this command: tinyshakespeare could not be downloaded ({error})"
            ) from None
    return Corpus("shakespeare", ADDRESS, text.corpus(str(path), separator=separator).pieces)
