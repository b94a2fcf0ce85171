"""One crawl in a process of its own: `python -m pipelines.spiders.crawl`.

The first line of stdin is the request as JSON: {"spider", "folder", "result", "request"}. The
result file gets {"done": {...}} or {"error": "..."}, and is not written where the spider crashed.
When stdin closes (the parent died, however it died) or on SIGTERM the crawl stops: what is in
flight has a second left, what has arrived is stored, because a conversation stores at once.
"""

import asyncio
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import scrapy
from scrapy.crawler import AsyncCrawlerProcess
from scrapy.exceptions import (
    DownloadCancelledError,
    DownloadTimeoutError,
    IgnoreRequest,
    ResponseDataLossError,
)
from scrapy.http import Response

from pipelines.errors import StarloomError
from pipelines.spiders import SPIDERS
from pipelines.spiders.conversation import Answer, Ask, Conversation, Failed, Pause
from pipelines.spiders.guards import Refused, RobotsUnreachable, refused_hosts
from pipelines.spiders.settings import MAX_BYTES, scrapy_settings
from pipelines.store import write_atomic

STOPPED = "the crawl was stopped; what has arrived is kept, run the same command again to go on"
GRACE_SECONDS = 1
REDIRECTS = (301, 302, 303, 307, 308)


class Clock(Protocol):
    """The time of a crawl."""

    def now(self) -> float:
        """Return the seconds since 1970."""

    async def sleep(self, seconds: float) -> None:
        """Return after some seconds."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """Return the seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Return after some seconds."""
        await asyncio.sleep(seconds)


class ConversationSpider(scrapy.Spider):  # type: ignore[misc]
    """Carries a conversation's requests through Scrapy, one at a time."""

    name = "starloom"

    def __init__(self, conversation: Conversation, clock: Clock, max_bytes: int) -> None:
        """Prepare to carry a conversation; bodies may have `max_bytes` when decompressed."""
        super().__init__()
        self._conversation = conversation
        self._clock = clock
        self._max_bytes = max_bytes
        self._stop = asyncio.Event()
        self.outcome: dict[str, Any] | None = None

    def stop(self) -> None:
        """End the conversation at the next chance."""
        self._stop.set()

    async def start(self) -> AsyncIterator[scrapy.Request]:
        """Yield the first request."""
        async for request in self._go_on(None):
            yield request

    async def take_answer(self, response: Response) -> AsyncIterator[scrapy.Request]:
        """Pass on a response and yield the next request."""
        async for request in self._go_on(read_response(response, self._max_bytes)):
            yield request

    async def take_failure(self, failure: Any) -> AsyncIterator[scrapy.Request]:
        """Pass on a failure and yield the next request."""
        async for request in self._go_on(name_failure(failure.value)):
            yield request

    async def _go_on(self, answer: Answer | Failed | None) -> AsyncIterator[scrapy.Request]:
        try:
            step = self._conversation.send(answer)
            while isinstance(step, Pause) and not self._stop.is_set():
                await self._pause(step.seconds)
                step = next(self._conversation)
        except StopIteration as end:
            self.outcome = {"done": end.value}
        except StarloomError as error:
            self.outcome = {"error": str(error)}
        except OSError as error:
            self.outcome = {"error": f"{error.filename}: {error.strerror}; what arrived is kept"}
        else:
            if self._stop.is_set():
                self._conversation.close()
                self.outcome = {"error": STOPPED}
            else:
                assert isinstance(step, Ask)
                yield self._request(step)

    async def _pause(self, seconds: float) -> None:
        waits = [
            asyncio.ensure_future(self._clock.sleep(seconds)),
            asyncio.ensure_future(self._stop.wait()),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    def _request(self, ask: Ask) -> scrapy.Request:
        refused_hosts.clear()
        return scrapy.Request(
            ask.url,
            headers=ask.headers,
            callback=self.take_answer,
            errback=self.take_failure,
            dont_filter=True,
        )


def read_response(response: Response, max_bytes: int) -> Answer | Failed:
    """Return a response as an answer, its body decompressed; Failed where it is not whole."""
    if response.status in REDIRECTS:
        return Failed("refused", "leads to an address that is neither http nor https")
    if "partial" in response.flags:
        return Failed("truncated", "the body has no length, so nobody can tell whether it is whole")
    headers = {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in response.headers.items()
    }
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"gzip", "x-gzip", "identity", ""}:
        return Failed("encoding", f"the body is encoded as {encoding!r}, asked for was gzip")
    try:
        body = response.body
        if encoding.endswith("gzip") and body:
            body = gunzip(body, max_bytes)
    except OverflowError:
        return Failed("too_large", f"the body has more than {max_bytes} bytes")
    except (zlib.error, EOFError) as error:
        return Failed("truncated", f"the compressed body is cut off or damaged ({error})")
    return Answer(response.status, headers, body, response.url)


def gunzip(data: bytes, max_bytes: int) -> bytes:
    """Return the content of whole gzip members.

    Raises EOFError for a cut-off one, zlib.error for damage, OverflowError beyond `max_bytes`.
    """
    parts = []
    left = max_bytes
    while data:
        member = zlib.decompressobj(wbits=31)
        parts.append(member.decompress(data, left + 1))
        left -= len(parts[-1])
        if left < 0:
            raise OverflowError
        if not member.eof:
            raise EOFError("no end of the gzip stream")
        data = member.unused_data.lstrip(b"\0")
    return b"".join(parts)


def name_failure(error: BaseException) -> Failed:
    """Return what a failed download means for the conversation."""
    if isinstance(error, Refused):
        return Failed("refused", str(error))
    if isinstance(error, IgnoreRequest):
        text = str(error)
        if isinstance(error, RobotsUnreachable):
            return _name_connection(text)
        if "robots" in text:
            return Failed("robots", "forbidden by the site's robots.txt")
        if "redirections" in text:
            return Failed("redirects", "redirected in a circle or too often")
        return Failed("refused", text)
    if isinstance(error, DownloadTimeoutError):
        return Failed("timeout", "no whole answer in time")
    if isinstance(error, DownloadCancelledError):
        return Failed("too_large", "the body is larger than allowed")
    if isinstance(error, ResponseDataLossError):
        return Failed("truncated", "the body was cut off")
    return _name_connection(f"no connection ({type(error).__name__}: {error})")


def _name_connection(text: str) -> Failed:
    """Return the failed connection; it was us where a private address was asked for."""
    for host, address in refused_hosts.items():
        return Failed("refused", f"{host} resolves to {address}, a private address")
    return Failed("connection", text)


def run(asked: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """Run the crawl that was asked for to its end or its stop.

    Returns the outcome, which is empty where the spider crashed: the log says with what.
    """
    module = importlib.import_module(SPIDERS[asked["spider"]])
    request = asked["request"]
    folder = Path(asked["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    process = AsyncCrawlerProcess(scrapy_settings(request))
    _log_progress()
    crawler = process.create_crawler(ConversationSpider)
    max_bytes = int(request.get("max_bytes", MAX_BYTES))
    conversation = module.converse(request, folder, clock.now)
    process.crawl(crawler, conversation=conversation, clock=clock, max_bytes=max_bytes)
    _stop_on_signals(crawler, Path(asked["result"]))
    process.start(install_signal_handlers=False)
    outcome: dict[str, Any] | None = crawler.spider.outcome
    return outcome or {}


def _log_progress() -> None:
    """Send the spiders' own messages to stdout."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("progress %(message)s"))
    spiders = logging.getLogger("pipelines.spiders")
    spiders.setLevel(logging.INFO)
    spiders.addHandler(handler)


def _stop_on_signals(crawler: Any, result: Path) -> None:
    """Stop on SIGTERM and SIGINT, and when stdin closes; end for good after the grace."""
    loop = asyncio.get_event_loop()

    def end() -> None:
        write_result(result, {"error": STOPPED})
        os._exit(1)

    def stop() -> None:
        loop.call_later(GRACE_SECONDS, end)
        if crawler.spider is not None:
            crawler.spider.stop()

    def watch() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stop)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    threading.Thread(target=watch, daemon=True).start()


def main(clock: Clock | None = None) -> int:
    """Read the request from stdin, run it, write the result file."""
    asked = json.loads(sys.stdin.readline())
    outcome = run(asked, clock or SystemClock())
    if outcome:
        write_result(Path(asked["result"]), outcome)
    return 0 if "done" in outcome else 1


def write_result(path: Path, outcome: dict[str, Any]) -> None:
    """Write the result file, unless the parent that wanted it is gone with its folder."""
    if path.parent.is_dir():
        write_atomic(path, json.dumps(outcome))


if __name__ == "__main__":
    sys.exit(main())
