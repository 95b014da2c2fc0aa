"""The local server of sample.py --serve: HTTP around completions.py, and the page. Starlette and uvicorn speak HTTP itself.

Read in this order: Gate (who may ask), the routes, serve; queue.py has the thread that generates. Nothing in a request is ever taken as a
path: the routes are fixed, and the one file that is sent is the page beside this module, read once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from common.option import show
from common.tokenizer import Tokenizer
from errors import UserError
from generation.engine import first_kept
from generation.options import SamplingOptions
from generation.text import Piece
from model import GPT
from server.completions import Answer, Refused, Served, read_request, write
from server.options import ServerOptions
from server.queue import Job, Queue

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as error:
    raise UserError(
        f"--serve needs the package {error.name}, which is not installed: pip install starlette uvicorn"
    ) from None

PAGE = Path(__file__).with_name("page.html")
ROUTES = "GET /, /health, /v1/models, /v1/models/NAME and POST /v1/completions (a base model: it has no chat)"
MAX_BODY = 2**22  # bytes
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


# ---- who may ask -----------------------------------------------------------------------------------------------------


class Gate:
    """In front of all routes: refuses what comes from another web page, or without the token, before any of it is read."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = (
            self.refusal(scope["method"], scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        )
        await (self.app if refused is None else error_response(refused))(scope, receive, send)

    def refusal(self, method: str, path: str, headers: Headers) -> Refused | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.options.is_local and _hostname(host) not in (*LOCAL_NAMES, self.options.host):
            return Refused(
                f"the Host {show(repr(host))} is not this machine's own name; use one of {', '.join(LOCAL_NAMES)}",
                status=403,
            )
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return Refused(f"requests from another web page ({show(repr(origin))}) are not answered", status=403)
        token, given = self.options.api_token, headers.get("authorization", "")
        if token is None or (path == "/" and method in ("GET", "HEAD")):  # the page asks for the token
            return None
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            found = "a wrong one was given" if given else "none was given"
            return Refused(
                f"this server expects its token, as Authorization: Bearer TOKEN; {found}",
                status=401,
                code="invalid_api_key",
            )
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


# ---- the routes ------------------------------------------------------------------------------------------------------


class Completions:
    """POST /v1/completions, as an ASGI application. A client that goes away frees the model."""

    def __init__(self, served: Served, queue: Queue) -> None:
        self.served, self.queue = served, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(Request(scope, receive))
        except ClientDisconnect:
            return
        asked = await run_in_threadpool(read_request, body, self.served)
        job, answer = self.queue.add(write(self.served, asked)), Answer(self.served, asked)
        watching = asyncio.create_task(leave_when_gone(receive, job))
        try:
            if asked.stream:
                await stream(job, answer, send)
            else:
                pieces = list[Piece]()
                while batch := await job.take():
                    pieces += batch
                await json_response(answer.whole(pieces))(scope, receive, send)
        finally:
            watching.cancel()
            self.queue.remove(job)


async def read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(f"the body is larger than {MAX_BODY} bytes", status=413)
    return bytes(body)


async def leave_when_gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.leave()


async def stream(job: Job, answer: Answer, send: Send) -> None:
    """Server-sent events: a chunk each, then [DONE]; an error after the first one is an event too."""
    batch = await job.take()  # what goes wrong before there is text still has its own status
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        while batch:
            await send({"type": "http.response.body", "body": _events(answer.chunks(batch)), "more_body": True})
            batch = await job.take()
        last = _events(answer.last_chunks()) + b"data: [DONE]\n\n"
    except (Refused, UserError) as error:
        last = _events([as_refused(error).to_dict()])
    await send({"type": "http.response.body", "body": last})


def _events(contents: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + _json(content) + b"\n\n" for content in contents)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def json_response(content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_json(content), status, headers, "application/json")


def as_refused(error: Exception) -> Refused:
    """What goes wrong in the model is the server's fault, not the request's."""
    return error if isinstance(error, Refused) else Refused(str(error), status=500)


def error_response(error: Exception) -> Response:
    refused = as_refused(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refused.status)
    return json_response(refused.to_dict(), refused.status, headers)


def page_response() -> Response:
    """The page. Its browser runs the one script in it and nothing else, and lets that talk to this server alone."""
    page = PAGE.read_bytes()
    sources = {
        "connect-src": "'self'",
        "img-src": "data:",
        "script-src": _source(page, "script"),
        "style-src": _source(page, "style"),
    }
    rules = {
        "default-src": "'none'",
        **sources,
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(page, headers=headers, media_type="text/html")


def _source(page: bytes, tag: str) -> str:
    """The content of the page's one element of this kind, as a policy names it."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


def make_app(served: Served, options: ServerOptions, queue: Queue, start: Mapping[str, Any]) -> Starlette:
    """`start`: what the page begins with beside the sampling options."""
    page = page_response()
    entry = served.to_dict(**start)

    async def show_page(_: Request) -> Response:
        return page

    async def models(_: Request) -> Response:
        return json_response({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != served.name:
            raise Refused(
                f"no model {show(repr(name))} here; there is {served.name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return json_response(entry)

    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "model": served.name, "requests": len(queue.jobs)})

    async def on_error(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {show(repr(request.url.path))}: {error.detail.lower()}; there are {ROUTES}"
        response = error_response(Refused(message, status=error.status_code))
        response.headers.update(error.headers or {})
        return response

    async def on_failure(_: Request, error: Exception) -> Response:
        return error_response(
            Refused(f"the server failed ({type(error).__name__}); what it prints says more", status=500)
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        queue.close()
        queue.thread.shutdown()  # a token at most

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", Completions(served, queue), methods=["POST"]),
        ],
        middleware=[Middleware(Gate, options)],
        exception_handlers={
            Refused: on_error,
            UserError: on_error,
            HTTPException: on_http_error,
            Exception: on_failure,
        },
        lifespan=lifespan,
    )


# ---- the server ------------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn's, which on a signal first ends the streams that it would otherwise wait for."""

    def __init__(self, app: Starlette, queue: Queue) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                http="h11",
                timeout_graceful_shutdown=1,
            )
        )
        self.queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.queue.close()
        logging.getLogger("uvicorn.error").disabled = True  # connections that break now are no errors
        super().handle_exit(sig, frame)


def listen(options: ServerOptions) -> socket.socket:
    """Raises UserError where the address cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        where = f"--host={options.host} --port={options.port}"
        raise UserError(f"{where}: cannot listen there: {error.strerror}; --port=0 takes any free port") from None


def serve(
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    sampling: SamplingOptions,
    options: ServerOptions,
    start: Mapping[str, Any],
) -> int:
    """Serves the model until Ctrl-C. `start`: the prompt and the number of samples that the page begins with. Raises UserError."""
    first_kept(0, model.config.block_size, sampling.keep_head)  # raises where the option does not fit the model
    queue = Queue()
    served = Served(name, model, tokenizer, sampling, int(time.time()))
    server = Server(make_app(served, options, queue, start), queue)
    listening = listen(options)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"serving {name} at {url} (its API: {url}/v1); Ctrl-C ends it", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again when all is closed
        server.run(sockets=[listening])
    return 0
