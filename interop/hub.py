"""Fetches a model from the Hugging Face hub, by its library and into its cache; only where the user says --download."""

from __future__ import annotations

from pathlib import Path

from errors import UserError

FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]
PICKLED = ["pytorch_model*.bin"]


def hub_errors() -> tuple[type[Exception], ...]:
    """What the library raises, and httpx below it where a connection breaks off (requests before it: OSError)."""
    found: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
    try:
        import httpx
    except ImportError:
        return found
    return (*found, httpx.HTTPError, httpx.InvalidURL)


def fetch(name: str, pickle: bool) -> Path:
    """The folder of a model in the cache, or the file OWNER/NAME/FILE.gguf; a download that broke off goes on. Raises
    UserError."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise UserError("--download needs the package huggingface_hub: pip install huggingface_hub") from None
    parts = name.split("/")
    try:
        if name.endswith(".gguf") and len(parts) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        return Path(snapshot_download(name, allow_patterns=[*FILES, *(PICKLED if pickle else [])]))
    except hub_errors() as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name} could not be fetched from the hub ({type(error).__name__}: {why}). What has arrived is kept: the"
            " same command goes on from there. Or copy the model's folder here from another machine, and name it"
        ) from None
