"""Downloads one file: with a timeout, under a `.part` name until complete, checked by sha256."""

import hashlib
import os
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from terminal import progress_bar


class DownloadFailed(Exception):
    """Why a download failed, in a few words."""


def download(address: str, path: Path, sha256: str) -> None:
    """Downloads `address` to `path`. Raises DownloadFailed, and leaves `path` as it was."""
    import requests

    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.get(address, stream=True, timeout=(10, 30)) as response, part.open("wb") as file:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length") or 0) or None
            with progress_bar(path.name, size) as bar:
                for block in response.iter_content(1 << 16):
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != sha256:
            found = f"{part.stat().st_size} bytes with sha256 {digest.hexdigest()[:12]}…"
            raise DownloadFailed(f"the server sent another file: {found}, expected sha256 {sha256[:12]}…")
        os.replace(part, path)
    except requests.RequestException as error:
        raise DownloadFailed(_reason(error, urlsplit(address).hostname or address)) from None
    except OSError as error:
        raise DownloadFailed(f"{path.parent} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _reason(error: Exception, host: str) -> str:
    """What went wrong, without the library's chain of causes."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{host} answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy of this network did not connect to {host}"
    if isinstance(error, requests.exceptions.SSLError):
        return f"no secure connection to {host}"
    if isinstance(error, requests.Timeout):
        return f"{host} did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the connection to {host} broke off"
    return f"no connection to {host}"
