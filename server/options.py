"""Options of the local server (sample.py --serve)."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from annotated_types import Interval


@dataclass(frozen=True)
class ServerOptions:
    serve: bool = False
    """Serve the model on this machine: a web page to try prompts, and OpenAI's /v1/completions for other programs."""
    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address needs --api_token."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    """Port to listen on; 0 picks a free one and prints it."""
    api_token: str | None = None
    """Require this token in every request (Authorization: Bearer TOKEN); the page asks for it."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a host name other than localhost
            return False

    def problems(self) -> list[str]:
        found = []
        if not self.is_local and self.api_token is None:
            found.append(f"--host={self.host} lets other machines connect: set --api_token=TOKEN, or remove --host")
        if self.api_token is not None and not re.fullmatch(r"[!-~]{8,}", self.api_token):
            found.append(
                "--api_token must have at least 8 characters: printable ASCII, no spaces (it is sent in a header)"
            )
        return found
