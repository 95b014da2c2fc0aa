"""The local server of sample.py --serve: HTTP routes around completions.py and tokenization.py, and the page, on
Starlette and uvicorn.

Read in this order: AccessControl, the routes, serve; queue.py has the generating thread. No part of a request is used
as a file path: the routes are fixed, and the only file sent is page.html beside this module, read once.
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
from prepare_data.novelty import Novelty
from server.completions import RequestError, ResponseBuilder, ServedModel, generate_pieces, parse_request
from server.options import ServerOptions
from server.queue import Job, Queue
from server.tokenization import detokenize, tokenize, tokenizer_info

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
ROUTES = (
    "GET /, /health, /v1/models, /v1/models/NAME, /tokenizer_info and POST /v1/completions, /tokenize, /detokenize "
    "(a base model: no chat endpoint)"
)
MAX_BODY = 2**22  # bytes
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


# ---- access control --------------------------------------------------------------------------------------------------


class AccessControl:
    """Middleware that refuses foreign Host and Origin headers (DNS rebinding, CSRF) and requests without the token."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http":
            error = self.check(scope["method"], scope["path"], Headers(scope=scope))
        await (self.app if error is None else error_response(error))(scope, receive, send)

    def check(self, method: str, path: str, headers: Headers) -> RequestError | None:
        """Returns the error to answer with, or None if the request may pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.options.is_local and _hostname(host) not in (*LOCAL_NAMES, self.options.host):
            return RequestError(
                f"the Host {show(repr(host))} is not a name of this machine; use one of {', '.join(LOCAL_NAMES)}",
                status=403,
            )
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return RequestError(f"requests from another web page ({show(repr(origin))}) are refused", status=403)
        token, authorization = self.options.api_token, headers.get("authorization", "")
        if token is None or (path == "/" and method in ("GET", "HEAD")):  # the page has a login form
            return None
        if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
            found = "a wrong one was given" if authorization else "none was given"
            return RequestError(
                f"this server requires its --api_token as Authorization: Bearer TOKEN; {found}",
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
    """POST /v1/completions, as an ASGI application. Generation stops if the client disconnects."""

    def __init__(self, served: ServedModel, queue: Queue) -> None:
        self.served, self.queue = served, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(Request(scope, receive))
        request = await run_in_threadpool(parse_request, body, self.served)
        job, builder = self.queue.add(generate_pieces(self.served, request)), ResponseBuilder(self.served, request)
        watcher = asyncio.create_task(cancel_on_disconnect(receive, job))
        try:
            if request.stream:
                await stream(job, builder, send)
            else:
                pieces = list[Piece]()
                while batch := await job.next_batch():
                    pieces += batch
                await json_response(builder.response(pieces))(scope, receive, send)
        finally:
            watcher.cancel()
            self.queue.remove(job)


async def read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the body is larger than {MAX_BODY} bytes", status=413)
    return bytes(body)


async def cancel_on_disconnect(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def stream(job: Job, builder: ResponseBuilder, send: Send) -> None:
    """Sends chunks as server-sent events, then [DONE]; an error after the first chunk is sent as an event too."""
    batch = await job.next_batch()  # before the headers, so that an early error gets its own HTTP status
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        while batch:
            await send({"type": "http.response.body", "body": _events(builder.chunks(batch)), "more_body": True})
            batch = await job.next_batch()
        last = _events(builder.last_chunks()) + b"data: [DONE]\n\n"
    except (RequestError, UserError) as error:
        last = _events([as_request_error(error).to_dict()])
    await send({"type": "http.response.body", "body": last})


def _events(contents: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + _json(content) + b"\n\n" for content in contents)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def json_response(content: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_json(content), status, headers, "application/json")


def as_request_error(error: Exception) -> RequestError:
    """Errors of the model become status 500: the request was valid."""
    return error if isinstance(error, RequestError) else RequestError(str(error), status=500)


def error_response(error: Exception) -> Response:
    content = as_request_error(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(content.status)
    return json_response(content.to_dict(), content.status, headers)


def page_response() -> Response:
    """The page, with a policy that lets browsers run only its own script, which may connect only to this server."""
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
    """Hash of the content of the page's only element with this tag, as a Content-Security-Policy source."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


async def on_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {show(repr(request.url.path))}: {error.detail.lower()}; the routes are {ROUTES}"
    response = error_response(RequestError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


async def on_disconnect(_: Request, error: Exception) -> Response:
    return Response()  # that nobody reads


async def on_failure(_: Request, error: Exception) -> Response:
    return error_response(
        RequestError(f"internal server error ({type(error).__name__}); see the server's output", status=500)
    )


def tokenizer_routes(served: ServedModel) -> list[Route]:
    async def info(_: Request) -> Response:
        return json_response(tokenizer_info(served))

    async def to_ids(request: Request) -> Response:
        return json_response(await run_in_threadpool(tokenize, await read_body(request), served))

    async def to_text(request: Request) -> Response:
        return json_response(await run_in_threadpool(detokenize, await read_body(request), served))

    return [
        Route("/tokenizer_info", info),
        Route("/tokenize", to_ids, methods=["POST"]),
        Route("/detokenize", to_text, methods=["POST"]),
    ]


def make_app(served: ServedModel, options: ServerOptions, queue: Queue, page_defaults: Mapping[str, Any]) -> Starlette:
    """`page_defaults`: initial values of the page's settings beside the sampling options."""
    page = page_response()
    entry = served.to_dict(**page_defaults)

    async def show_page(_: Request) -> Response:
        return page

    async def models(_: Request) -> Response:
        return json_response({"object": "list", "data": [entry]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != served.name:
            raise RequestError(
                f"unknown model {show(repr(name))}; this server has {served.name!r}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return json_response(entry)

    async def health(_: Request) -> Response:
        return json_response({"status": "ok", "model": served.name, "requests": len(queue.jobs)})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        queue.close()
        queue.thread.shutdown()  # waits for one token at most

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", Completions(served, queue), methods=["POST"]),
            *tokenizer_routes(served),
        ],
        middleware=[Middleware(AccessControl, options)],
        exception_handlers={
            RequestError: on_error,
            UserError: on_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
            Exception: on_failure,
        },
        lifespan=lifespan,
    )


# ---- the server ------------------------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """uvicorn.Server that cancels all jobs on a signal; otherwise uvicorn would wait for open streams."""

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
        logging.getLogger("uvicorn.error").disabled = True  # connections closed by the shutdown are not errors
        super().handle_exit(sig, frame)


def listen(options: ServerOptions) -> socket.socket:
    """A socket that listens on the address of the options. Raises UserError if that is not possible."""
    try:
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        where = f"--host={options.host} --port={options.port}"
        raise UserError(f"{where}: cannot listen there: {error.strerror}; use --port=0 for any free port") from None


def serve(
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    sampling: SamplingOptions,
    options: ServerOptions,
    page_defaults: Mapping[str, Any],
    novelty: Novelty | str | None = None,
) -> int:
    """Serves the model until Ctrl-C. `page_defaults`: the page's initial prompt, n and seed. novelty: see ServedModel.
    Raises UserError."""
    first_kept(0, model.config.block_size, sampling.keep_head)  # raises if keep_head does not fit the model
    queue = Queue()
    served = ServedModel(name, model, tokenizer, sampling, int(time.time()), novelty)
    server = Server(make_app(served, options, queue, page_defaults), queue)
    listening = listen(options)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"serving {name} at {url} (API: {url}/v1); Ctrl-C stops it", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        server.run(sockets=[listening])
    return 0
