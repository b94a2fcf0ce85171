"""Talks to the server beside a long step: publishes its progress, and notices a cancellation.

Invariant: it works in its own thread, so that a slow or absent server never holds up the step.
It sees what nobody else will tell us when the worker above us has died, or when this run was
declared dead by mistake.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run

logger = logging.getLogger(__name__)

# Each update is an event on the server.
EVERY_SECONDS = 5.0
PICTURE_SECONDS = 15.0
AWAY = (httpx.HTTPError, PrefectException)
WORKING = frozenset({"SCHEDULED", "PENDING", "RUNNING", "PAUSED"})


class Picture:
    """A Markdown artifact that is made once and then updated in place, so the database stays small.

    `draw` returns (Markdown, description), or None where there is nothing new to show.
    """

    def __init__(self, key: str, draw: Callable[[], tuple[str, str] | None]) -> None:
        """Prepare; nothing is drawn yet."""
        self.key = key
        self._draw = draw
        self._artifact: UUID | None = None
        self._drawn = time.monotonic()

    def publish(self) -> None:
        """Draw and publish, at most every PICTURE_SECONDS; an absent server is only logged."""
        if time.monotonic() - self._drawn < PICTURE_SECONDS:
            return
        self._drawn = time.monotonic()
        try:
            drawn = self._draw()
        except Exception:  # whatever a picture lacks, the watch over the run goes on
            logger.exception("%s not drawn", self.key)
            return
        if drawn is None:
            return
        text, description = drawn
        try:
            if self._artifact is None:
                made = create_markdown_artifact(text, key=self.key, description=description)
                self._artifact = cast(UUID, made)
            else:
                update = ArtifactUpdate(data=text, description=description)
                with get_client(sync_client=True) as client:
                    client.update_artifact(self._artifact, update)
        except AWAY as error:
            logger.warning("%s not published: %s", self.key, type(error).__name__)


class Monitor:
    """Publishes what `show` is told as the progress artifact `key`; `stopped` says when to end.

    A `picture` is published beside it, less often.
    """

    def __init__(self, key: str, picture: Picture | None = None) -> None:
        """Prepare a monitor of the flow run around us."""
        self.key = key
        self._picture = picture
        self._id = flow_run.get_id()
        self._latest: tuple[float, str] | None = None
        self._artifact: UUID | None = None
        self._stop = threading.Event()
        self._over = threading.Event()
        # The artifact belongs to the run whose context this is.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._watch,), daemon=True, name="monitor"
        )

    def __enter__(self) -> Self:
        """Start watching."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publish the last progress; give up after some seconds where the server is away."""
        self._over.set()
        self._thread.join(timeout=10)

    def show(self, percent: float, text: str) -> None:
        """Set what the next update shows."""
        self._latest = (percent, text)

    def stopped(self) -> bool:
        """Return whether the flow run was cancelled, or ended by somebody else."""
        return self._stop.is_set()

    def _watch(self) -> None:
        shown = None
        while not self._over.wait(EVERY_SECONDS):
            shown = self._publish(shown)
            self._read_state()
            if self._picture is not None:
                self._picture.publish()
        self._publish(shown)

    def _publish(self, shown: tuple[float, str] | None) -> tuple[float, str] | None:
        latest = self._latest
        if latest is None or latest == shown:
            return shown
        try:
            if self._artifact is None:
                made = create_progress_artifact(latest[0], self.key, latest[1])
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, latest[0], latest[1])
        except AWAY as error:
            logger.warning("progress not published: %s", type(error).__name__)
            return shown
        return latest

    def _read_state(self) -> None:
        if self._id is None:
            return
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(UUID(str(self._id))).state_type
        except AWAY as error:
            logger.warning("own state not read: %s", type(error).__name__)
            return
        if state is not None and state.value not in WORKING:
            self._stop.set()
