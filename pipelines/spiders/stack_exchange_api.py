"""The Stack Exchange API 2.3 as a polite client sees it: quota, backoff, throttling, errors.

All of it survives in state.json: a new process knows what the one before was told.
"""

import json
import os
import re
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pipelines.errors import SourceError
from pipelines.spiders.conversation import (
    Answer,
    Ask,
    Failed,
    Now,
    Patience,
    Pause,
    ask_patiently,
    is_transient,
    retry_after,
)
from pipelines.store import write_atomic

KEY = "STARLOOM_STACK_EXCHANGE_KEY"
STATE = "state.json"
TRANSIENT_ERRORS = (500, 502, 503)  # error_id: internal_error, throttle_violation, unavailable
THROTTLED = 502
SHORTEST_QUIET = 30.0  # seconds after a throttle_violation that names no time

Talk = Generator[Ask | Pause, Answer | Failed | None, "Page"]


class StopForNow(Exception):
    """The crawl may not go on now: `quota` or `throttled`; the next run does."""


class Page:
    """An answer of the API: the wrapper's items, `has_more`, and the body as received."""

    def __init__(self, wrapper: dict[str, Any], body: bytes) -> None:
        self.items: list[Any] = wrapper["items"]
        self.has_more = wrapper.get("has_more") is True
        self.body = body


class ApiState:
    """What is remembered between runs; `values` is JSON, saved whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Load the state of a folder; SourceError where it is damaged."""
        self._path = folder / STATE
        self.values: dict[str, Any] = {
            "next_page": 0,
            "filter": None,
            "quota_remaining": None,
            "quota_time": 0.0,
            "blocked_until": 0.0,
            "backoff_until": {},
            "passes": {},
            "windows": {},
            "recheck_after": 0,
            "finished": 0.0,
        }
        if self._path.exists():
            try:
                self.values |= json.loads(self._path.read_text(encoding="utf-8"))
            except (ValueError, TypeError) as error:
                raise SourceError(
                    f"{self._path}: the crawl's state cannot be read ({error}); "
                    f"remove the folder {folder} to fetch it again"
                ) from error

    def save(self) -> None:
        """Write the state."""
        write_atomic(self._path, json.dumps(self.values, indent=1, sort_keys=True) + "\n")


class ApiClient:
    """Asks one method after another, as fast as the API allows and no faster."""

    def __init__(self, request: dict[str, Any], state: ApiState, now: Now) -> None:
        """Prepare for `site` at `api_url`, stopping at `quota_reserve` requests left."""
        self._url = request["api_url"].rstrip("/")
        self._site = request["site"]
        self._reserve = request["quota_reserve"]
        self._state = state
        self._now = now
        self._patience = Patience()
        self._parsed: tuple[Answer, dict[str, Any] | None] | None = None
        self.requests = 0

    def get(self, method: str, query: dict[str, Any], ids: list[int] | None = None) -> Talk:
        """Ask a method such as /questions/{ids}; the page it answers.

        Raises StopForNow at the quota's reserve and for long throttling, SourceError for a request
        the API refuses and for faults that last.
        """
        values = self._state.values
        self._check_quota()
        quiet = max(values["backoff_until"].get(method, 0.0), values["blocked_until"])
        wait = quiet - self._now()
        if wait > self._patience.longest_retry_after:
            raise StopForNow("throttled")
        if wait > 0:
            yield Pause(wait)
        ask = self._ask(method, query, ids)
        answer = yield from ask_patiently(
            ask, self._now, self._patience, self._is_transient, self._wanted_quiet
        )
        wrapper = self._parse(answer)
        if wrapper is None or "error_id" in wrapper:
            raise SourceError(f"{ask.name}: {_explain(answer, wrapper)}")
        self._note(method, wrapper)
        return Page(wrapper, answer.body)

    def _ask(self, method: str, query: dict[str, Any], ids: list[int] | None) -> Ask:
        path = method.replace("{ids}", quote(";".join(str(each) for each in ids or ())))
        asked = {name: value for name, value in query.items() if value not in {None, ""}}
        if "/filters/" not in method:
            asked["site"] = self._site
        key = os.environ.get(KEY)
        if key:
            asked["key"] = key
        shown = f"{self._url}{method} (site {self._site})"
        headers = {"Accept": "application/json"}
        return Ask(f"{self._url}{path}?{urlencode(asked)}", headers, shown)

    def _check_quota(self) -> None:
        """Raise StopForNow where no more than the reserve is left; a quota lasts a UTC day."""
        left, told = self._state.values["quota_remaining"], self._state.values["quota_time"]
        if left is None or left > self._reserve:
            return
        if (
            datetime.fromtimestamp(told, UTC).date()
            == datetime.fromtimestamp(self._now(), UTC).date()
        ):
            raise StopForNow("quota")

    def _parse(self, answer: Answer) -> dict[str, Any] | None:
        """Return `parse_wrapper`, once for each answer."""
        if self._parsed is None or self._parsed[0] is not answer:
            self._parsed = (answer, parse_wrapper(answer))
        return self._parsed[1]

    def _is_transient(self, answer: Answer) -> bool:
        self.requests += 1
        wrapper = self._parse(answer)
        if wrapper is None:  # an HTML page of a balancer in front, whatever its status
            return answer.status < 400 or is_transient(answer)
        return wrapper.get("error_id") in TRANSIENT_ERRORS or answer.status >= 500

    def _wanted_quiet(self, answer: Answer, now: float) -> float:
        """Return how long the API wants nothing to be asked; remembered for every method."""
        wanted = retry_after(answer.headers.get("retry-after"), now)
        wrapper = self._parse(answer) or {}
        if wrapper.get("error_id") == THROTTLED:
            named = re.search(r"(\d+) second", str(wrapper.get("error_message", "")))
            wanted = max(wanted, float(named[1]) if named else SHORTEST_QUIET)
        if wanted:
            self._state.values["blocked_until"] = now + wanted
            self._state.save()
            if wanted > self._patience.longest_retry_after:
                raise StopForNow("throttled")
        return wanted

    def _note(self, method: str, wrapper: dict[str, Any]) -> None:
        """Remember quota and backoff, which any answer may bring; whoever asked saves the state."""
        values, now = self._state.values, self._now()
        left = wrapper.get("quota_remaining")
        if isinstance(left, int):
            values["quota_remaining"], values["quota_time"] = left, now
        values["backoff_until"].pop(method, None)
        backoff = wrapper.get("backoff")
        if isinstance(backoff, int | float) and backoff > 0:
            values["backoff_until"][method] = now + backoff


def parse_wrapper(answer: Answer) -> dict[str, Any] | None:
    """Return the API's wrapper object (of items or of an error), None for anything else."""
    try:
        wrapper = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(wrapper, dict):
        return None
    whole = isinstance(wrapper.get("items"), list) and answer.status == 200
    return wrapper if whole or "error_id" in wrapper else None


def _explain(answer: Answer, wrapper: dict[str, Any] | None) -> str:
    if wrapper is None:
        return f"HTTP status {answer.status} and no answer of the API; check api_url and site"
    name, text = wrapper.get("error_name"), str(wrapper.get("error_message", ""))[:200]
    return f"the API refuses the request: {name} ({wrapper['error_id']}): {text}"
