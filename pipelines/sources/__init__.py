"""Where records come from: one module per source type, raw input in, canonical records out.

`collect` is the stage that runs them. A source knows no template.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pipelines.engine import Outcome, Params
from pipelines.errors import PreflightError
from pipelines.recipe import Recipe, Source
from pipelines.sources import repository
from pipelines.sources.raw import Raw


class SourceModule(Protocol):
    """What the module of a source type offers."""

    @property
    def find_problem(self) -> Callable[[Source], str | None]:
        """Say in one sentence why a source cannot be read on this machine, or return None."""

    @property
    def locate(self) -> Callable[[Source], Raw]:
        """List the raw input of a source; raises SourceError."""

    @property
    def extract(self) -> Callable[[Sequence[Path], Path, Params], Outcome]:
        """Turn raw files into one shard of records."""


SOURCES: dict[str, SourceModule] = {"repository": repository}


def get_source(source: Source) -> SourceModule:
    """Return the module that reads a source; PreflightError for a type of a later version."""
    if source.type not in SOURCES:
        raise PreflightError(
            f"source type {source.type!r} of source {source.id!r} is not available in this "
            f"version; available: {', '.join(SOURCES)}"
        )
    return SOURCES[source.type]


def check_sources(recipe: Recipe) -> None:
    """Raise one PreflightError that lists every source which cannot be read on this machine."""
    problems = []
    ids = [source.id for source in recipe.sources]
    for index, source in enumerate(recipe.sources):
        if source.id in ids[:index]:
            problems.append(f"sources.{index}.id: {source.id!r} is taken by another source")
        try:
            problem = get_source(source).find_problem(source)
        except PreflightError as error:
            problem = str(error)
        if problem:
            problems.append(f"sources.{index}: {problem}")
    if problems:
        raise PreflightError("; ".join(problems))
