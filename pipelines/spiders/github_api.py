"""Asks GitHub's API and its raw server: limits are waited out, unchanged answers cost nothing."""

import json
import logging
import os
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from pipelines.errors import SourceError
from pipelines.spiders.conversation import (
    Answer,
    Ask,
    Exchange,
    Failed,
    Now,
    Pause,
    ask_patiently,
    is_transient,
    retry_after,
)
from pipelines.spiders.github_folder import git_hash

logger = logging.getLogger(__name__)

TOKEN, OTHER_TOKEN = "GITHUB_TOKEN", "GITHUB_ENTERPRISE_TOKEN"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
OWN_HOSTS = ("api.github.com", "raw.githubusercontent.com", *LOCAL_HOSTS)
LONGEST_LIMIT_WAIT = 900.0  # seconds
LIMIT_PAUSE = 60.0  # what GitHub asks for where it names no time
ATTEMPTS = 4

Fetching = Generator[Ask | Pause, Answer | Failed | None, None]


@dataclass(slots=True)
class Server:
    """Asks one repository's API and raw server; waits out limits, keeps ETags."""

    request: dict[str, Any]
    now: Now
    etags: dict[str, dict[str, Any]] = field(default_factory=dict)
    quiet_until: float = 0.0
    asked: int = 0

    def get_json(self, path: str, keep: dict[str, str] | None = None) -> Generator[Any, Any, Any]:
        """Return the JSON below the API's URL, or of a 304 what was kept of the same answer.

        `keep` maps names to dotted paths in the answer: what the caller needs and the state holds.
        Raises SourceError for everything else.
        """
        before = self.etags.get(path, {})
        headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
        if keep and before.get("etag") and before["kept"].keys() == keep.keys():
            headers["If-None-Match"] = before["etag"]
        url = self.request["api_url"].rstrip("/") + path
        for attempt in range(ATTEMPTS):
            answer = yield from self._ask(url, headers, limited=True)
            if answer.status == 304 and "If-None-Match" in headers:
                return before["kept"]
            if answer.status != 200:
                _explain(answer, path, self.request)
            if _is_json(answer.body):
                break
            logger.info("%s: the answer is no JSON, asking again", path)
            yield Pause(2.0 * 2**attempt)
        else:
            raise SourceError(
                f"{path}: the answer is no JSON ({ATTEMPTS} attempts); check api_url "
                f"{self.request['api_url']!r}, or run the same command again later"
            )
        data = json.loads(answer.body)
        if keep is None:
            return data
        kept = {name: _pick(data, dotted) for name, dotted in keep.items()}
        self.etags[path] = {"etag": answer.headers.get("etag", ""), "kept": kept}
        return kept

    def get_raw(self, path: str, sha: str) -> Generator[Any, Any, bytes]:
        """Return a file's bytes, whose git hash is checked; SourceError where it stays another."""
        url = self.request["raw_url"].rstrip("/") + quote(path)
        found = ""
        for attempt in range(ATTEMPTS):
            answer = yield from self._ask(url, {}, limited=False)
            if answer.status != 200:
                _explain(answer, path, self.request)
            found = git_hash(answer.body)
            if found == sha:
                return answer.body
            logger.info("%s: not the bytes of the commit, asking again", path)
            yield Pause(2.0 * 2**attempt)
        raise SourceError(
            f"{path}: the bytes that came have git hash {found}, the commit has {sha} "
            f"({ATTEMPTS} attempts); what has arrived is kept, run the same command again later"
        )

    def _ask(self, url: str, headers: dict[str, str], *, limited: bool) -> Exchange:
        ask = Ask(url, {**headers, **self._authorization(url)})

        def transient(answer: Answer) -> bool:
            return is_transient(answer) and limit_wait(answer, 0.0, 0) is None

        for attempt in range(ATTEMPTS):
            if limited and self.quiet_until > self.now():
                yield from self._wait(self.quiet_until - self.now(), ask)
            answer = yield from ask_patiently(ask, self.now, transient=transient)
            self.asked += 1
            wait = limit_wait(answer, self.now(), attempt)
            if wait is None:
                if limited:
                    self.quiet_until = _limit_reset(answer, self.now())
                return answer
            yield from self._wait(wait, ask)
        raise SourceError(
            f"{ask.name}: refused for too many requests ({ATTEMPTS} attempts); what has arrived is "
            "kept, run the same command again later"
        )

    def _wait(self, seconds: float, ask: Ask) -> Fetching:
        if seconds > LONGEST_LIMIT_WAIT:
            raise SourceError(
                f"{ask.name}: GitHub's limit of requests is used up for {seconds / 60:.0f} more "
                f"minutes; what has arrived is kept, run the same command again then, or set "
                f"{TOKEN} in the environment (5,000 requests an hour instead of 60)"
            )
        logger.info("waiting %.0f s for GitHub's limit of requests", seconds)
        yield Pause(seconds)

    def _authorization(self, url: str) -> dict[str, str]:
        """Return the token's header: GITHUB_TOKEN is github.com's, no other host gets to see it."""
        parts = urlsplit(url)
        name = TOKEN if parts.hostname in OWN_HOSTS else OTHER_TOKEN
        token = os.environ.get(name)
        if not token or not (parts.scheme == "https" or parts.hostname in LOCAL_HOSTS):
            return {}
        return {"Authorization": f"Bearer {token}"}


def limit_wait(answer: Answer, now: float, attempt: int) -> float | None:
    """Return the seconds to wait where an answer refuses for too many requests, else None.

    GitHub's own rules: Retry-After, else the reset of an exhausted limit, else a minute that
    doubles.
    """
    if answer.status not in (403, 429):
        return None
    if "retry-after" in answer.headers:
        return max(retry_after(answer.headers["retry-after"], now), 1.0)
    if answer.headers.get("x-ratelimit-remaining") == "0" and "x-ratelimit-reset" in answer.headers:
        return max(_limit_reset(answer, now) - now, 1.0)
    if answer.status == 429 or b"rate limit" in answer.body[:10_000].lower():
        return float(LIMIT_PAUSE * 2**attempt)
    return None


def _limit_reset(answer: Answer, now: float) -> float:
    """Return when requests are free again (seconds since 1970), 0 where some are left."""
    reset = answer.headers.get("x-ratelimit-reset", "")
    if answer.headers.get("x-ratelimit-remaining") != "0" or not re.fullmatch(r"\d{1,12}", reset):
        return 0.0
    return float(reset) + 1.0


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _explain(answer: Answer, path: str, request: dict[str, Any]) -> NoReturn:
    try:
        said = str(json.loads(answer.body)["message"])[:200]
    except (ValueError, LookupError, TypeError, RecursionError):
        said = ""
    repository, ref = request["repository"], request["ref"]
    advice = {
        401: f"the token in {TOKEN} is not accepted; renew it or unset it",
        403: f"access is denied; set {TOKEN} to a token that may read {repository}",
        404: f"not there, or private: check {repository!r} and revision {ref!r}, or set {TOKEN}",
        409: "the repository is empty",
        422: f"revision {ref!r} is no commit, branch or tag of {repository}",
        451: "taken down for legal reasons",
    }.get(answer.status, "an answer nobody expected")
    said = f" ({said})" if said else ""
    raise SourceError(f"{path}: HTTP status {answer.status}{said}: {advice}")


def _pick(data: Any, dotted: str) -> str | None:
    """Return the text at a dotted path of JSON objects, None where it is null or missing."""
    for name in dotted.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, str) else None
