"""Turns plain functions into Prefect tasks and flows whose ends can be read.

Invariant: what a user can cause ends a run with one line (Failed, Crashed or Cancelled), never with
a traceback; a bug keeps its traceback.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Crashed, Failed

from pipelines.errors import Interrupted, StarloomError

P = ParamSpec("P")
R = TypeVar("R")


class Stopped(StarloomError):
    """The run was cancelled while it worked."""


def outcome_of(error: StarloomError) -> State[Any]:
    """Return the state a run ends in for an error; only what can go on by itself is Crashed."""
    if isinstance(error, Stopped):
        return Cancelled(message=str(error), data=error)
    if isinstance(error, Interrupted):
        return Crashed(message=str(error), data=error)
    return Failed(message=str(error), data=error)


def drop_traceback(record: logging.LogRecord) -> bool:
    """Return whether a log record is no StarloomError's traceback: the state says it already."""
    return not (record.exc_info and isinstance(record.exc_info[1], StarloomError))


def explained(function: Callable[P, Any]) -> Callable[P, Any]:
    """Let a function return the state that explains a StarloomError, instead of raising it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return function(*args, **kwargs)
        except StarloomError as error:
            # Prefect raises the data of a failed state once more and logs it as unexpected.
            logging.getLogger("prefect.flow_runs").addFilter(drop_traceback)
            return outcome_of(error)

    return run


def step(**options: Any) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
    """Make a task of a function. Calling it runs the task and returns the value, or raises.

    The function may return a State: its name and message show in the UI, its data is the value.
    The stage store is the cache, Prefect's own stays off. `.task` is the task itself.
    """

    def decorate(function: Callable[P, Any]) -> Callable[P, Any]:
        wrapped = task(cache_policy=NO_CACHE, **options)(explained(function))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return wrapped(*args, return_state=True, **kwargs).result()

        call.task = wrapped  # type: ignore[attr-defined]
        return call

    return decorate
