"""Requests per second and processor time per request of the spiders, against a local server.

    python -m benchmarks.spiders [--requests 300]

A server thread answers with pages as the Stack Exchange API gives them (100 questions, 120
answers, gzip); each client asks one page after another in a process of its own, without any delay
between requests. Prints a Markdown table. `bare` clients only ask, `storing` ones parse each page
and store it with fsync as ours does. Rates are from the first to the last request; CPU is the
client's own, less that of the same client asking only two pages.
"""

import argparse
import gzip
import json
import os
import platform
import random
import resource
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

CLIENTS = {
    "httpx loop, bare": "httpx",
    "Scrapy's own spider, bare": "scrapy",
    "starloom conversation, bare": "conversation",
    "httpx loop, storing": "httpx-storing",
    "starloom stack-exchange, storing": "stack-exchange",
}
WORDS = "the a model fit error value plot data sample mean test why how does loss code".split()


class Pages(socketserver.ThreadingTCPServer):
    """Answers every /questions request with the next page."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, number: int) -> None:
        self.pages = [make_page(n, last=n == number - 1) for n in range(number)]
        self.reset()
        super().__init__(("127.0.0.1", 0), Handler)

    def reset(self) -> None:
        """Begin with the first page again."""
        self.given, self.times = 0, []

    def answer(self, path: str) -> bytes:
        """Return the response to a request for a path."""
        if path.startswith("/robots.txt"):
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        if "/filters/create" in path:
            body = gzip.compress(json.dumps({"items": [{"filter": "!x"}]}).encode())
        else:
            self.times.append(time.perf_counter())
            body = self.pages[min(self.given, len(self.pages) - 1)]
            self.given += 1
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Handler(socketserver.BaseRequestHandler):
    """Keeps a connection open and answers its requests in turn."""

    def handle(self) -> None:
        """Answer until the client hangs up."""
        held = b""
        while data := self.request.recv(65536):
            held += data
            while b"\r\n\r\n" in held:
                head, _, held = held.partition(b"\r\n\r\n")
                self.request.sendall(self.server.answer(head.split(b" ", 2)[1].decode()))


def make_page(number: int, *, last: bool) -> bytes:
    draw = random.Random(number)  # noqa: S311 - invented text

    def text(words: int) -> str:
        return (
            f"<p>{' '.join(draw.choice(WORDS) + str(draw.randrange(99)) for _ in range(words))}</p>"
        )

    def post(date: int, words: int) -> dict:
        return {
            "owner": {"user_id": draw.randrange(10**6), "display_name": "someone"},
            "score": draw.randrange(50), "creation_date": date, "last_activity_date": date,
            "content_license": "CC BY-SA 4.0", "body": text(words),
        }  # fmt: skip

    items = []
    for index in range(100):
        date = 1_500_000_000 + number * 1000 + index
        found = post(date, 120) | {
            "question_id": number * 100 + index + 1, "title": text(8), "tags": ["regression"],
            "answers": [
                post(date, 150) | {"answer_id": 10**7 + date - 1_500_000_000, "question_id": 1}
                for _ in range(1 + (index % 5 == 0))
            ],
        }  # fmt: skip
        items.append(found)
    page = {"items": items, "has_more": not last, "quota_remaining": 9000, "quota_max": 10000}
    return gzip.compress(json.dumps(page).encode(), 5)


def ask_with_httpx(url: str, number: int, folder: Path, *, storing: bool) -> None:
    import httpx

    with httpx.Client(headers={"Accept-Encoding": "gzip"}) as client:
        for each in range(number):
            answer = client.get(f"{url}/2.3/questions?page={each}").raise_for_status()
            if storing:
                assert answer.json()["items"]
                with (folder / f"{each}.json.gz").open("wb") as file:
                    file.write(gzip.compress(answer.content, 6))
                    os.fsync(file.fileno())


def ask_with_scrapy(url: str, number: int) -> None:
    import scrapy
    from scrapy.crawler import AsyncCrawlerProcess

    class Bare(scrapy.Spider):
        name = "bare"

        async def start(self) -> AsyncIterator[Any]:
            yield scrapy.Request(f"{url}/2.3/questions?page=0", cb_kwargs={"page": 0})

        def parse(self, response: Any, page: int) -> Iterator[Any]:
            if page + 1 < number:
                address = f"{url}/2.3/questions?page={page + 1}"
                yield scrapy.Request(address, cb_kwargs={"page": page + 1})

    process = AsyncCrawlerProcess({"LOG_LEVEL": "ERROR", "REMOTE_CONTROL_ENABLED": False})
    process.crawl(Bare)
    process.start()


SECRETS = ()


def converse(request: dict[str, Any], folder: Path, now: Callable[[], float]) -> Iterator[Any]:
    """Ask for page after page: the spider `bench` of the child process."""
    from pipelines.spiders.conversation import Ask, ask_patiently

    for page in range(request["number"]):
        yield from ask_patiently(Ask(f"{request['url']}/2.3/questions?page={page}"), now)
    return {}


def crawl(spider: str, url: str, number: int, folder: Path) -> None:
    """Run a spider in this process, as `run_spider`'s child does."""
    from pipelines.spiders import SPIDERS
    from pipelines.spiders.crawl import SystemClock, run

    SPIDERS["bench"] = "benchmarks.spiders"
    request = {
        "url": url, "number": number, "trusted": [url], "delay": 0, "site": "stats",
        "api_url": f"{url}/2.3", "tags": [], "since": None, "until": None, "min_score": None,
        "window": None, "page_size": 100, "quota_reserve": 50, "recheck_requests": 0,
    }  # fmt: skip
    asked = {"spider": spider, "folder": str(folder), "result": str(folder / "result")}
    outcome = run(asked | {"request": request}, SystemClock())
    assert "done" in outcome, outcome


def run_client(name: str, url: str, number: int, folder: Path) -> None:
    if name.startswith("httpx"):
        ask_with_httpx(url, number, folder, storing=name.endswith("storing"))
    elif name == "scrapy":
        ask_with_scrapy(url, number)
    else:
        crawl("bench" if name == "conversation" else name, url, number, folder)


def measure(client: str, number: int) -> tuple[float, float]:
    """Return requests per second and CPU seconds of a client process asking `number` pages."""
    with Pages(number) as server, tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "benchmarks.spiders", "--client", client]
        with subprocess.Popen(
            [*command, "--url", url, "--requests", str(number), "--folder", folder],
            stdin=subprocess.PIPE,  # stays open: a crawl ends when it closes
            stdout=subprocess.DEVNULL,
        ) as process:
            code = process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        server.shutdown()
        assert code == 0, f"{client}: exit code {code}"
        times = server.times
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (len(times) - 1) / (times[-1] - times[0]), cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--client", choices=CLIENTS.values())
    parser.add_argument("--url", default="")
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    if given.client:
        run_client(given.client, given.url, given.requests, given.folder)
        return
    number = given.requests
    size = len(make_page(0, last=False))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("scrapy", "httpx"))
    print(
        f"{number} pages of {size / 1000:.0f} KB (gzip), Python {platform.python_version()}, "
        f"{versions}, {os.cpu_count()} cores; medians of three\n"
    )
    print("| client | requests/s | CPU ms/request | against httpx |")
    print("|---|---|---|---|")
    base: dict[bool, float] = {}
    for label, client in CLIENTS.items():
        runs = sorted((measure(client, number), measure(client, 2)[1]) for _ in range(3))
        (rate, cpu), start = runs[1]
        each = 1000 * (cpu - start) / (number - 2)
        storing = label.endswith("storing")
        base.setdefault(storing, each)
        print(f"| {label} | {rate:.0f} | {each:.1f} | {each / base[storing]:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
