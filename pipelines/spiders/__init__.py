"""Scrapy spiders, each run in a process of its own because a reactor cannot be started twice.

What a spider asks and what it makes of the answers is a plain generator (a conversation), so that
it can be tested on an invented clock and network; Scrapy carries the requests. A spider module has

    SECRETS: tuple[str, ...]      # names of the environment variables it reads keys from
    def converse(request: dict, folder: Path, now: Callable[[], float]) -> Conversation: ...

where `converse` writes below `folder` (each file whole or not at all), resumes from what it finds
there, raises SourceError, and returns what `run_spider` returns (plain JSON values):

    def converse(request, folder, now):
        answer = yield from ask_patiently(Ask("https://host/page", {"Accept": "text/html"}), now)
        write_atomic(folder / "page.html", answer.body.decode())
        return {"pages": 1}

A source starts it with

    from pipelines.spiders.launch import run_spider
    done = run_spider("stack-exchange", {"site": "stats", "trusted": []}, folder, secrets=SECRETS)

`request` holds JSON values; these keys are read by the crawl itself, all optional:
`trusted` (list of URLs that the user named, whose host may have a private address), `delay`
(seconds between requests to a host), `timeout` (seconds for a whole response), `max_bytes` (of a
response) and `contact` (address or page for the user agent). Importing this package and `launch`
loads no Scrapy.
"""

SPIDERS = {
    "stack-exchange": "pipelines.spiders.stack_exchange",
    "github": "pipelines.spiders.github",
}
