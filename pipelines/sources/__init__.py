"""Where records come from: one module per source type, raw input in, canonical records out.

`fetch` brings remote raw input below data/raw; `collect` is the stage that turns raw input into
records. A source knows no template.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from pipelines.engine import Params, Work
from pipelines.errors import PreflightError
from pipelines.recipe import Recipe
from pipelines.settings.sources import Source
from pipelines.sources.raw import Fetched, Raw, Read, Window


class SourceModule(Protocol):
    """What the module of a source type offers; each takes the settings of its own type."""

    @property
    def find_problem(self) -> Callable[[Any], str | None]:
        """Say in one sentence why a source cannot be read on this machine, or return None."""

    @property
    def is_remote(self) -> Callable[[Any], bool]:
        """Say whether a source has to be fetched before it is read."""

    @property
    def fetch(self) -> Callable[[Any, Path, Window], Fetched]:
        """Bring a remote source's raw files in a folder up to date; raises SourceError."""

    @property
    def locate(self) -> Callable[[Any], Raw]:
        """List the raw input of a source; raises SourceError."""

    @property
    def read(self) -> Callable[[Any, Raw, Work, Params], Read]:
        """Turn raw input into shards of records."""


MODULES = {
    "repository": "pipelines.sources.repository",
    "oasst": "pipelines.sources.oasst",
    "dataset": "pipelines.sources.dataset",
    "code-alpaca": "pipelines.sources.dataset",
    "gpteacher": "pipelines.sources.dataset",
    "stack-exchange": "pipelines.sources.stack_exchange",
    "code-qa": "pipelines.sources.code_qa",
}


def get_source(source: Source) -> SourceModule:
    """Return the module that reads a source; PreflightError for a type of a later version."""
    if source.type not in MODULES:
        raise PreflightError(
            f"source type {source.type!r} of source {source.id!r} is not available in this "
            f"version; available: {', '.join(MODULES)}"
        )
    return cast(SourceModule, importlib.import_module(MODULES[source.type]))


def check_sources(recipe: Recipe) -> None:
    """Raise one PreflightError that lists every source which cannot be read on this machine."""
    problems = []
    ids = [source.id for source in recipe.sources]
    for index, source in enumerate(recipe.sources):
        if source.id in ids[:index]:
            problems.append(f"sources.{index}.id: {source.id!r} is taken by another source")
        if source.openai_outputs and not source.allow_openai_outputs:
            problems.append(
                f"sources.{index}: {source.id!r} holds output of OpenAI models, whose terms forbid "
                "training competing models; set allow_openai_outputs: true if yours may be trained "
                "on it"
            )
        try:
            problem = get_source(source).find_problem(source)
        except PreflightError as error:
            problem = str(error)
        if problem:
            problems.append(f"sources.{index}: {problem}")
    if problems:
        raise PreflightError("; ".join(problems))
