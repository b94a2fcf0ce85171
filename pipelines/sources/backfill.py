"""Fetches a source's past window by window, so that a long history arrives in steps that last."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.errors import RecipeError, SourceError, did_you_mean
from pipelines.recipe import load_recipe, recipe_names
from pipelines.settings.sources import Source
from pipelines.sources import get_source
from pipelines.sources.fetch import fetch_source, raw_folder
from pipelines.sources.raw import Fetched, Window
from pipelines.store import write_atomic

DONE = "backfilled.json"
DAYS = {"day": 1, "week": 7, "month": 30}


def find_sources(source_id: str, names: list[str] | None = None) -> list[Source]:
    """Return the differing sources with an id that recipes fetch; RecipeError where none does."""
    recipes = [load_recipe(name) for name in names or recipe_names()]
    every = [source for recipe in recipes for source in recipe.sources]
    found = {raw_folder(source): source for source in every if source.id == source_id}
    if not found:
        known = sorted({source.id for source in every})
        raise RecipeError(
            f"no recipe uses a source {source_id!r}{did_you_mean(source_id, known)} "
            f"(sources: {', '.join(known)})"
        )
    remote = [each for each in found.values() if get_source(each).is_remote(each)]
    if not remote:
        raise SourceError(f"source {source_id!r} is read where it is: there is nothing to backfill")
    return remote


def backfill(
    source: Source, since: datetime, until: datetime, *, step: str = "month"
) -> Iterator[tuple[Window, Fetched | None]]:
    """Fetch the windows between two dates (UTC), oldest first; one fetched before yields None.

    Killed or failed at any point, the same call goes on with the window it was in. Raises
    SourceError where the source has no dates or cannot be reached.
    """
    if not source.HAS_DATES:
        raise SourceError(
            f"source {source.id!r} (type {source.type}) is always fetched as a whole: it has no "
            "dates to go through"
        )
    note = raw_folder(source) / DONE
    for window in windows(since, until, step):
        done = json.loads(note.read_text(encoding="utf-8")) if note.exists() else []
        name = _written(window)
        if name in done:
            yield window, None
            continue
        fetched = fetch_source(source, refresh=True, window=window)
        write_atomic(note, json.dumps([*done, name], indent=1) + "\n")
        yield window, fetched


def windows(since: datetime, until: datetime, step: str) -> Iterator[Window]:
    """Yield windows of equal length that cover a span; the last one may be shorter.

    >>> [first, last] = windows(datetime(2024, 1, 1), datetime(2024, 1, 9), "week")
    >>> (first.until, last.until)
    (datetime.datetime(2024, 1, 8, 0, 0), datetime.datetime(2024, 1, 9, 0, 0))
    """
    if since >= until:
        raise SourceError(f"--since {since:%Y-%m-%d} is not before --until {until:%Y-%m-%d}")
    start = since
    while start < until:
        end = min(start + timedelta(days=DAYS[step]), until)
        yield Window(start, end)
        start = end


def parse_date(text: str) -> datetime:
    """Return midnight UTC of a date such as 2024-05-01; SourceError for anything else."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise SourceError(f"date {text!r}: expected YEAR-MONTH-DAY, e.g. 2024-05-01") from None


def _written(window: Window) -> dict[str, Any]:
    return {"since": f"{window.since:%Y-%m-%d}", "until": f"{window.until:%Y-%m-%d}"}
