"""Brings remote sources to this machine: each into a folder below data/raw, from where it is read.

The folder's name holds a digest of what is asked for, so that another question never mixes with
an older answer. `fetched.json` is written last: without it a fetch is unfinished, and the next one
goes on where it stopped. One process at a time fetches into a folder.
"""

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError
from pipelines.manifest import digest_of
from pipelines.plan import data_root
from pipelines.recipe import Recipe
from pipelines.settings.sources import Source
from pipelines.sources import get_source
from pipelines.sources.raw import FETCHED, Fetched, Window
from pipelines.store import locked, write_atomic

logger = logging.getLogger(__name__)


def fetch_missing(recipe: Recipe) -> dict[str, Fetched]:
    """Fetch the recipe's remote sources that are not here yet; return what was done by source."""
    done = {source.id: fetch_source(source) for source in recipe.sources}
    return {name: fetched for name, fetched in done.items() if fetched is not None}


def fetch_source(
    source: Source, *, refresh: bool = False, window: Window | None = None
) -> Fetched | None:
    """Fetch a remote source, or with `refresh` what changed since; None where there is nothing to.

    Raises SourceError where the source cannot be reached or answers nonsense; what has arrived
    is kept.
    """
    module = get_source(source)
    if not module.is_remote(source):
        return None
    folder = raw_folder(source)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".lock-{folder.name}")):
        if (folder / FETCHED).exists() and not refresh:
            return None
        fetched = module.fetch(source, folder, window or Window())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"time": now, "asked": asked(source), **asdict(fetched)}
        write_atomic(folder / FETCHED, json.dumps(note, indent=1) + "\n")
    logger.info("fetch      %s: %s", source.id, fetched.summary)
    return fetched


def raw_folder(source: Source) -> Path:
    """Return the folder that a remote source is fetched into."""
    return data_root() / "raw" / f"{source.id}-{digest_of(asked(source))[:12]}"


def fetched_folder(source: Source) -> Path:
    """Return the folder of a source that was fetched; SourceError where it was not."""
    folder = raw_folder(source)
    if not (folder / FETCHED).exists():
        raise SourceError(
            f"source {source.id!r} has not been fetched yet (no {folder / FETCHED}); run "
            f"`starloom run` or the refresh flow with network access, or name a local `path:`"
        )
    return folder


def asked(source: Source) -> dict[str, Any]:
    """Return what decides the raw input: the settings less those that only select from it."""
    return source.model_dump(mode="json", include=set(source.FETCHES) | {"type", "id"})
