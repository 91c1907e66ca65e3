"""The page's server: files of `page/`, one web socket per open page, and the message that a page shows as a file.

Who may ask: on a loopback address, requests that name this machine as their host (a page of a stranger that resolves
its own name to 127.0.0.1 does not); elsewhere, requests with the key that stands in the printed address. A web socket
must come from a page of this server.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from vla_perception.view.analysis import Palette
from vla_perception.view.session import MAX_MESSAGE, Feed, Session, parse_message

PAGE = Path(__file__).with_name("page")
#: Open pages at most.
MAX_SESSIONS = 16
#: Seconds between two looks at who is gone, and between two reports of health where nobody is.
WATCH_SEC, HEALTH_SEC = 0.1, 1.0
#: Seconds after which a frame that the page has not confirmed is followed by the next one.
PAINT_SEC = 2.0
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
T = TypeVar("T")


class Guard:
    """Middleware that lets through who may ask, and puts the safety headers on every answer.

    Args:
        key: what the address must hold; empty on a loopback address.
        port: of the server; cookies are shared between the ports of a host.
    """

    def __init__(self, app: ASGIApp, key: str, port: int) -> None:
        self._app = app
        self._key = key
        self._cookie = f"vla_perception_view_{port}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        reason = self._refusal(connection, scope["type"] == "websocket")
        if reason:
            if scope["type"] == "websocket":
                await WebSocket(scope, receive, send).close(1008, reason)  # before it is accepted: 403
            else:
                await PlainTextResponse(f"{reason}\n", 403, _HEADERS)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                if self._key and connection.query_params.get("key"):
                    cookie = f"{self._cookie}={self._key}; HttpOnly; SameSite=Strict; Path=/"
                    headers.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refusal(self, connection: HTTPConnection, is_socket: bool) -> str:
        """Why a request is not answered; empty if it is."""
        host = connection.headers.get("host", "")
        if self._key:
            given = connection.query_params.get("key") or connection.cookies.get(self._cookie, "")
            if not secrets.compare_digest(given.encode(), self._key.encode()):
                return "this address needs the key that `vla-perception view` printed"
        elif _host_name(host) not in _LOOPBACK:
            return "this server answers to localhost only; start it with --host for others"
        origin = connection.headers.get("origin")
        if is_socket and (origin is None or origin.partition("://")[2] != host):
            return "a web socket must come from this server's own page"
        return ""


def _host_name(host: str) -> str:
    """The name in ``name:port`` or ``[address]:port``."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class PageServer:
    """Serves the pages of one feed.

    Args:
        feed: what they show; its attribute `changed`, where it has one, is set to wake them.
        host: address to listen at.
        port: 0 for any that is free.
        allow_control: whether pages may change states and ask for encodings.
        hz: frames per second of a page at most, until it asks for others.

    Attributes:
        address: what a browser is to open.

    Raises:
        OSError: the address or port cannot be had.
    """

    def __init__(
        self, feed: Feed, *, host: str = "127.0.0.1", port: int = 0, allow_control: bool = False, hz: float = 5.0
    ) -> None:
        self._feed = feed
        self._allow_control = allow_control
        self._hz = hz
        self._palette = Palette()
        self._pages: set[_Page] = set()
        # One thread, so that no more than one core is taken, and sessions and palette need no locks.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pages")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        port = self._socket.getsockname()[1]
        self.key = "" if _is_loopback(host) else secrets.token_urlsafe(16)
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        self.address = f"http://{shown}:{port}/" + (f"?key={self.key}" if self.key else "")
        app = Starlette(
            routes=[
                WebSocketRoute("/socket", self._on_socket),
                Route("/message", self._on_message),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ],
            middleware=[Middleware(Guard, key=self.key, port=port)],
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            ws="auto",
            ws_max_size=MAX_MESSAGE * 4,
            ws_per_message_deflate=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            limit_concurrency=200,
        )
        self._server = _Server(config)

    def run(self) -> None:
        """Serves until SIGINT, SIGTERM or `stop`."""
        try:
            asyncio.run(self._serve())
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)
            self._socket.close()

    def stop(self) -> None:
        """Ends `run`. From any thread."""
        self._server.should_exit = True

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            for page in tuple(self._pages):
                page.changed.set()

        def changed() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake)

        if hasattr(self._feed, "changed"):
            self._feed.changed = changed
        await self._server.serve(sockets=[self._socket])

    async def in_worker(self, function: functools.partial[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    async def _on_socket(self, socket: WebSocket) -> None:
        if len(self._pages) >= MAX_SESSIONS:
            await socket.close(1013, "too many pages are open")
            return
        await socket.accept()
        page = _Page(self, socket, self._feed, Session(self._feed, self._palette, self._hz), self._allow_control)
        self._pages.add(page)
        try:
            await page.run()
        finally:
            self._pages.discard(page)
            await self.in_worker(functools.partial(page.session.select, ""))

    async def _on_message(self, request: Request) -> Response:
        """The message that an open page shows, or has pinned a place in, as the safetensors file that it is."""
        number = request.query_params.get("page", "")
        page = next((page for page in self._pages if page.number == number), None)
        snapshot = None
        if page is not None:
            snapshot = page.session.touched if "pinned" in request.query_params else page.session.shown
        if snapshot is None:
            return JSONResponse({"error": "that page has no such message"}, 404)
        data = await self.in_worker(functools.partial(snapshot.tokens.to_bytes))
        name = f"tokens-{snapshot.tokens.sequence}.safetensors"
        return Response(
            data,
            media_type="application/octet-stream",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )


class _Server(uvicorn.Server):
    """Ends at SIGINT and SIGTERM as any server, and does not raise them again: ending a viewer is not a failure."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


class _Page:
    """One web socket: reads what the page says, sends frames as fast as it paints them, and health once a second."""

    def __init__(
        self, server: PageServer, socket: WebSocket, feed: Feed, session: Session, allow_control: bool
    ) -> None:
        self.session = session
        self.number = secrets.token_urlsafe(12)
        self.changed = asyncio.Event()
        self._server = server
        self._socket = socket
        self._feed = feed
        self._allow_control = allow_control
        self._painted = asyncio.Event()
        self._painted.set()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Until the page is closed."""
        await self._send_json(
            {
                "type": "hello",
                "page": self.number,
                "title": self._feed.title,
                "allow_control": self._allow_control,
                "hz": self.session.hz,
                "is_recording": self._feed.is_recording,
            }
        )
        tasks = [asyncio.create_task(part()) for part in (self._read, self._send_frames, self._send_health)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (WebSocketDisconnect, RuntimeError):
            pass  # closed, also while something was being sent
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        while True:
            try:
                text = await self._receive()
                message = parse_message(text)
                if message.get("type") == "painted":
                    self._painted.set()
                elif message.get("type") == "control":
                    await self._control(message)
                else:
                    for answer in await self._server.in_worker(functools.partial(self.session.receive, text)):
                        await self._send(answer)
                    self.changed.set()
            except ValueError as error:
                await self._send_error(error)

    async def _receive(self) -> str:
        """The next message. ValueError for one of bytes."""
        text: str | None = None
        with contextlib.suppress(KeyError):  # what Starlette raises for one
            text = await self._socket.receive_text()
        if not isinstance(text, str):
            raise ValueError("a message of the page is not text")
        return text

    async def _control(self, message: dict[str, object]) -> None:
        if not self._allow_control:
            raise ValueError("this server only shows; start it with --allow-control")
        action = functools.partial(self._feed.control, self.session.topic, str(message.get("action")))
        text = await asyncio.get_running_loop().run_in_executor(None, action)
        await self._send_json({"type": "control", "text": text})

    async def _send_frames(self) -> None:
        """The latest snapshot, when the page has painted the one before; what came meanwhile is skipped."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            begin = time.monotonic()
            # In the worker: a recording's snapshot may have to be read, or even computed.
            try:
                frame = await self._server.in_worker(functools.partial(self.session.next_frame))
            except (ValueError, OSError) as error:  # a file that is damaged there, or gone
                await self._send_error(error)
                continue
            if frame is None:
                continue
            self._painted.clear()
            await self._send(frame)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._painted.wait(), PAINT_SEC)
            await asyncio.sleep(max(0.0, begin + 1 / self.session.hz - time.monotonic()))
            self.changed.set()

    async def _send_health(self) -> None:
        told, line, due, topic = None, 0, 0.0, None
        while True:
            tokenizers = self._feed.tokenizers()
            session = self.session
            if not session.topic and session.visible and tokenizers:
                await self._server.in_worker(functools.partial(session.select, str(tokenizers[0]["topic"])))
                self.changed.set()
            gone = [(tokenizer["topic"], tokenizer["gone"]) for tokenizer in tokenizers]
            if time.monotonic() >= due or gone != told or session.topic != topic:
                lines = self._feed.log_after(line)
                line = int(lines[-1]["number"]) if lines else line  # type: ignore[call-overload]
                samples = self._feed.samples(session.topic)
                await self._send_json(
                    {
                        "type": "health",
                        "tokenizers": tokenizers,
                        "topic": session.topic,
                        "details": self._feed.details(session.topic),
                        "samples": samples if session.topic != topic else samples[-1:],
                        "from_start": session.topic != topic,
                        "times": list(self._feed.times(session.topic)) if session.topic != topic else None,
                        "log": lines,
                    }
                )
                told, due, topic = gone, time.monotonic() + HEALTH_SEC, session.topic
            await asyncio.sleep(WATCH_SEC)

    async def _send(self, data: bytes) -> None:
        async with self._sending:
            await self._socket.send_bytes(data)

    async def _send_error(self, error: Exception) -> None:
        await self._send_json({"type": "error", "text": str(error)[:1000]})

    async def _send_json(self, message: dict[str, object]) -> None:
        async with self._sending:
            await self._socket.send_text(json.dumps(message, allow_nan=False))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
