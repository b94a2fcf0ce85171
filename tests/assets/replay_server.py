"""A web site that answers by script, with faults: over a real socket, or played without any.

A site is a function from a request (path with query, headers) to a Reply. `ReplayServer` serves it
on 127.0.0.1; `play` carries a conversation to it in this process, on a clock of the test's own.
"""

import gzip
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from pipelines.spiders.conversation import Answer, Ask, Failed, Pause


@dataclass
class Reply:
    """An answer. `fault`: truncated, slow, reset, unsized (its end is that of the connection)."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""
    gzip: bool = False

    @classmethod
    def json(cls, value, status=200, **kwargs):
        return cls(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json; charset=utf-8"},
            **kwargs,
        )

    @classmethod
    def html(cls, status=502, text="<html><body><h1>Bad Gateway</h1></body></html>", **headers):
        return cls(text.encode(), status, {"Content-Type": "text/html", **headers})

    @classmethod
    def redirect(cls, location, status=302):
        return cls(b"", status, {"Location": location})


NOT_FOUND = Reply(b"nothing here", 404)
Site = Callable[[str, dict[str, str]], Reply]


@dataclass
class Script:
    """A site that gives each path's replies in turn, the last one for ever; notes what is asked."""

    pages: dict[str, list[Reply] | Reply] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, path, headers):
        if path != "/robots.txt":
            self.asked.append(path)
            self.headers.append(headers)
        replies = self.pages.get(path, self.pages.get(path.partition("?")[0], NOT_FOUND))
        if isinstance(replies, Reply):
            return replies
        return replies.pop(0) if len(replies) > 1 else replies[0]


class ReplayServer:
    """Serves a site on a free port of 127.0.0.1; a context manager. `tls` is an SSLContext."""

    def __init__(self, site: Site, slow_seconds: float = 30.0, tls=None):
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(site, slow_seconds))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that hang up are what we test
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.most_at_once = 0

    def __enter__(self):
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self, site, slow_seconds):
        outer = self
        lock = threading.Lock()
        now_open = [0]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                with lock:
                    now_open[0] += 1
                    outer.most_at_once = max(outer.most_at_once, now_open[0])
                    reply = site(self.path, {k.lower(): v for k, v in self.headers.items()})
                try:
                    self._send(reply)
                finally:
                    with lock:
                        now_open[0] -= 1

            def _send(self, reply):
                body = gzip.compress(reply.body, mtime=0) if reply.gzip else reply.body
                if reply.fault == "reset":
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.gzip:
                    self.send_header("Content-Encoding", "gzip")
                if reply.fault != "unsized":
                    self.send_header("Content-Length", str(len(body)))
                if reply.fault:
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                if reply.fault in {"truncated", "slow"}:
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    if reply.fault == "slow":
                        outer._ended.wait(slow_seconds)
                    return
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        return Handler


class TestClock:
    """A clock that only moves when somebody waits; remembers every wait."""

    __test__ = False

    def __init__(self, start: float = 1_700_000_000.0):
        self.time = start
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.time += seconds

    async def sleep(self, seconds: float) -> None:
        self.wait(seconds)


FAULTS = {
    "truncated": Failed("truncated", "the body was cut off"),
    "unsized": Failed("truncated", "the body has no length"),
    "slow": Failed("timeout", "no whole answer in time"),
    "reset": Failed("connection", "no connection"),
}


def play(conversation, site: Site, clock: TestClock):
    """Carry a conversation to a site without a network; return what the conversation returns.

    Each request takes a tenth of a second. Redirects are not followed: that is Scrapy's part.
    """
    answer = None
    while True:
        try:
            step = conversation.send(answer)
        except StopIteration as end:
            return end.value
        if isinstance(step, Pause):
            clock.wait(step.seconds)
            answer = None
            continue
        assert isinstance(step, Ask)
        clock.time += 0.1
        parts = urlsplit(step.url)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        reply = site(path, {name.lower(): value for name, value in step.headers.items()})
        answer = FAULTS.get(reply.fault) or Answer(
            reply.status,
            {name.lower(): value for name, value in reply.headers.items()},
            reply.body,
            step.url,
        )


def until(condition, seconds=20.0):
    """Return the first true value of a condition."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("not in time")
