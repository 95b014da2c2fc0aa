"""Downloads one file: with a timeout, under a `.part` name until complete, checked by sha256."""

import hashlib
import os
import uuid
from pathlib import Path

from terminal import progress_bar


def download(address: str, path: Path, sha256: str) -> None:
    """Downloads `address` to `path`. Raises OSError on any failure and leaves `path` as it was."""
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    digest = hashlib.sha256()
    try:
        with requests.get(address, stream=True, timeout=(10, 30)) as response, part.open("wb") as file:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length") or 0) or None
            with progress_bar(path.name, size) as bar:
                for block in response.iter_content(1 << 16):
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != sha256:
            found = f"{part.stat().st_size} bytes with sha256 {digest.hexdigest()}"
            raise OSError(f"the downloaded file is not the expected one: {found}, expected sha256 {sha256}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
