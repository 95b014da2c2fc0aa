"""The options of the local server."""

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
    """Serve the model on this machine: a page to try prompts, and OpenAI's /v1/completions for other programs."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own needs --api_token."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 8000
    """Port to listen at; 0: any free one, which is printed."""
    api_token: str | None = None
    """Answer only requests that bring this token (Authorization: Bearer TOKEN); the page asks for it."""

    @property
    def is_local(self) -> bool:
        """Reachable from this machine alone."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # another name
            return False

    def problems(self) -> list[str]:
        found = []
        if not self.is_local and self.api_token is None:
            found.append(
                f"--host={self.host} lets other machines use it: give them a token by --api_token=TOKEN, or leave --host out"
            )
        if self.api_token is not None and not re.fullmatch(r"[!-~]{8,}", self.api_token):
            found.append(
                "--api_token must have 8 characters or more, all of them ASCII and none a space, so that it can stand in a header"
            )
        return found
