"""Asks an OpenAI-compatible chat endpoint, patiently: one request at a time, with retries.

The key stands in one header and nowhere else. Redirects are not followed: they would take it along.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.errors import SourceError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 120.0
TIMEOUT = 180.0
MAX_REPLY_BYTES = 4 << 20
BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({400, 413, 422})

sleep = time.sleep


class Refused(Exception):
    """The server does not want this very request, e.g. because the code is too long for it."""


class Unavailable(Exception):
    """An attempt that failed and may succeed later; `pause` is what the server asks for, if so."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Completion:
    """The text of a reply, why it ended, and the tokens it is charged with (None: not told)."""

    text: str
    finish_reason: str
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Chat:
    """An endpoint with what goes into each request but the messages."""

    client: "httpx.Client"
    url: str
    settings: dict[str, Any]

    def ask(self, messages: list[dict[str, str]], may_send: Callable[[], None]) -> Completion:
        """Return the reply to some messages; calls `may_send` before each attempt.

        Raises Refused for these messages, SourceError where the endpoint cannot be used at all,
        and whatever `may_send` raises.
        """
        pause = FIRST_PAUSE
        for attempt in range(ATTEMPTS):
            may_send()
            try:
                return self._send(messages)
            except Unavailable as error:
                if attempt == ATTEMPTS - 1:
                    raise SourceError(
                        f"{self.url}: no reply after {ATTEMPTS} attempts ({error}); the replies so "
                        "far are kept, run the same command again"
                    ) from error
                wait = min(error.pause if error.pause is not None else pause, LONGEST_PAUSE)
                logger.warning("%s: %s, next attempt in %.0f s", self.url, error, wait)
                sleep(wait)
                pause = min(pause * 2, LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _send(self, messages: list[dict[str, str]]) -> Completion:
        import httpx

        body = {**self.settings, "messages": messages}
        try:
            with self.client.stream("POST", self.url, json=body) as response:
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > MAX_REPLY_BYTES:
                        raise Refused(f"the reply is over {MAX_REPLY_BYTES} bytes")
        except httpx.HTTPError as error:
            raise Unavailable(type(error).__name__) from error
        self._check_status(response, bytes(content))
        return _read_completion(bytes(content))

    def _check_status(self, response: "httpx.Response", content: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = _error_text(content)
        for secret in response.request.headers.get("authorization", "").split()[1:]:
            said = said.replace(secret, "***")
        if status in BUSY:
            raise Unavailable(f"HTTP {status}", _retry_after(response.headers.get("retry-after")))
        if status in REFUSED:
            raise Refused(f"HTTP {status}: {said}")
        what = {
            401: "the key is not accepted; check the variable that api_key_env names",
            403: "the key is not accepted; check the variable that api_key_env names",
            404: "no such model or address; check `endpoint` (it ends in /v1, mostly) and `model`",
        }.get(status, f"unexpected answer; check `endpoint` ({said})")
        raise SourceError(f"{self.url}: HTTP {status}: {what}")


def _retry_after(value: str | None) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _error_text(content: bytes) -> str:
    """Return the message of an error reply, short: a server may quote what it was sent."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "no reason given"
    return " ".join(str(message).split())[:200] if isinstance(message, str) else "no reason given"


def _read_completion(content: bytes) -> Completion:
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Unavailable("a reply that is no chat completion") from error
    usage = reply.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    known = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
    return Completion(
        text if isinstance(text, str) else "",
        str(choice.get("finish_reason") or ""),
        tokens if known else None,
    )
