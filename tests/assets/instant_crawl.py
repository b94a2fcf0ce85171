"""The crawl's process on a clock that never waits, with a spider that visits a list of pages."""

import asyncio
import os
import sys
import time
from pathlib import Path

from pipelines.errors import SourceError
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
    """Ask for each page in turn; return what came of it, and what was waited on the way."""
    came = []
    for number, page in enumerate(request["pages"]):
        started = now()
        ask = Ask(page, request.get("headers", {}))
        try:
            patience = Patience(attempts=request.get("attempts", 3))
            answer = yield from ask_patiently(ask, now, patience)
        except SourceError as error:
            came.append(str(error).removeprefix(f"{page}: "))
        else:
            Path(folder, f"{number}.bin").write_bytes(answer.body)
            came.append([answer.status, len(answer.body), round(now() - started)])
    if request.get("crash"):
        raise RuntimeError(f"a bug, told {os.environ.get(SECRETS[0])}")
    return {"pages": came, "environment": sorted(os.environ)}


if __name__ == "__main__":
    SPIDERS["pages"] = "tests.assets.instant_crawl"
    sys.exit(crawl.main(InstantClock()))
