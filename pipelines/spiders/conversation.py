"""What spider and network say to each other: requests, pauses, answers; and patience with faults.

A conversation is a generator: it yields Ask or Pause and is sent an Answer or Failed for an Ask,
None for a Pause. It never sleeps or reads a clock by itself.
"""

import email.utils
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import SourceError

logger = logging.getLogger(__name__)

Now = Callable[[], float]  # seconds since 1970

PERMANENT = ("refused", "robots", "redirects", "too_large")


@dataclass(frozen=True, slots=True)
class Ask:
    """A GET request. `shown` is its address in messages: one without keys."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    shown: str = ""

    @property
    def name(self) -> str:
        """Return the address to name in messages."""
        return self.shown or self.url.partition("?")[0]


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for some seconds before going on."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response, its body decompressed; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    url: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """No whole response: timeout, connection, truncated; or one of PERMANENT, never asked again."""

    reason: str
    detail: str = ""


Conversation = Generator[Ask | Pause, Answer | Failed | None, dict[str, Any]]
Exchange = Generator[Ask | Pause, Answer | Failed | None, Answer]


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long a fault is waited out; all times in seconds."""

    attempts: int = 6
    first_wait: float = 2.0
    longest_wait: float = 120.0
    longest_retry_after: float = 900.0


def is_transient(answer: Answer) -> bool:
    """Say whether the same request may well succeed later: 408, 425, 429 and 5xx."""
    return answer.status in {408, 425, 429} or answer.status >= 500


def ask_patiently(
    ask: Ask,
    now: Now,
    patience: Patience | None = None,
    transient: Callable[[Answer], bool] = is_transient,
    wanted: Callable[[Answer, float], float] | None = None,
) -> Exchange:
    """Ask until there is an answer that is not `transient`; waits double.

    `wanted` returns the seconds of quiet that an answer (received at a time) asks for, by default
    those of its Retry-After header. Raises SourceError for a permanent failure, after too many
    attempts, and where more quiet is wanted than anybody waits for.
    """
    patience = patience or Patience()
    problem = ""
    for attempt in range(1, patience.attempts + 1):
        answer = yield ask
        wait = min(patience.first_wait * 2 ** (attempt - 1), patience.longest_wait)
        if isinstance(answer, Failed):
            if answer.reason in PERMANENT:
                raise SourceError(f"{ask.name}: {answer.detail or answer.reason}")
            problem = answer.detail or answer.reason
        else:
            assert answer is not None
            if not transient(answer):
                return answer
            problem = f"HTTP status {answer.status}"
            asked = (wanted or wanted_quiet)(answer, now())
            if asked > patience.longest_retry_after:
                raise SourceError(
                    f"{ask.name}: {problem}, and the server wants {asked:.0f} seconds of quiet; "
                    "what has arrived is kept, run the same command again after that"
                )
            wait = max(wait, asked)
        if attempt < patience.attempts:
            logger.info("%s: %s, asking again in %.0f s", ask.name, problem, wait)
            yield Pause(wait)
    raise SourceError(
        f"{ask.name}: {problem} ({patience.attempts} attempts); what has arrived is kept, "
        "run the same command again later"
    )


def wanted_quiet(answer: Answer, now: float) -> float:
    """Return the seconds of quiet that an answer asks for by its Retry-After header."""
    return retry_after(answer.headers.get("retry-after"), now)


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds that a Retry-After header (seconds or a date) asks for, 0 without one."""
    if not value:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
