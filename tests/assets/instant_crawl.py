"""The crawl's process on a clock that never waits, with a spider that visits a list of pages."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from pipelines.spiders import SPIDERS, crawl
from pipelines.spiders.conversation import Ask, Patience, ask_patiently

SECRETS = ("STARLOOM_TEST_SECRET",)


class InstantClock:
    """Real time plus all the waits that were asked for."""

    def __init__(self):
        self.ahead = 0.0

    def now(self):
        return time.time() + self.ahead

    async def sleep(self, seconds):
        self.ahead += seconds
        await asyncio.sleep(0)


def converse(request, folder, now):
    """Ask for each page in turn; return what came, and the time that was waited on the way."""
    started, came = now(), []
    for number, page in enumerate(request["pages"]):
        ask = Ask(page, request.get("headers", {}))
        answer = yield from ask_patiently(ask, now, Patience(attempts=request.get("attempts", 3)))
        Path(folder, f"{number}.bin").write_bytes(answer.body)
        came.append({"status": answer.status, "bytes": len(answer.body), "url": answer.url})
    secret = os.environ.get(SECRETS[0])
    if request.get("leak"):
        sys.stderr.write(json.dumps(dict(os.environ)) + "\n")
    return {"pages": came, "waited": round(now() - started), "secret": bool(secret)}


if __name__ == "__main__":
    SPIDERS["pages"] = "tests.assets.instant_crawl"
    sys.exit(crawl.main(InstantClock()))
