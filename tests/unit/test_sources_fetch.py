"""Fetching: once, again only when asked, one folder for each question, window by window."""

import json
from datetime import UTC, datetime
from itertools import pairwise
from types import SimpleNamespace

import pytest

from pipelines import sources
from pipelines.errors import PreflightError, RecipeError, SourceError
from pipelines.settings.sources import RepositorySource, StackExchangeSource
from pipelines.sources import backfill as backfilling
from pipelines.sources import fetch as fetching
from pipelines.sources.backfill import backfill, find_sources, parse_date, windows
from pipelines.sources.fetch import fetch_missing, fetch_source, fetched_folder, raw_folder
from pipelines.sources.raw import FETCHED, Fetched
from tests.assets.curation import curation_recipe

DAY = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Let a fake module fetch everything; return the windows it was asked for."""
    calls = []

    def fetch(source, folder, window):
        calls.append((source.id, window))
        if source.id == "broken":
            raise SourceError("the site is down")
        (folder / "page.json").write_text("{}")
        return Fetched(changed=True, summary="1 page", counts={"pages": 1})

    module = SimpleNamespace(
        is_remote=lambda source: source.path is None, fetch=fetch, find_problem=lambda source: None
    )
    for place in (fetching, backfilling, sources):
        monkeypatch.setattr(place, "get_source", lambda source: module)
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path))
    return calls


def site(source_id="se", **keys):
    return StackExchangeSource(type="stack-exchange", id=source_id, **{"site": "x.com", **keys})


def test_a_missing_source_is_fetched_once_and_a_local_one_never(asked):
    recipe = curation_recipe(
        {"type": "stack-exchange", "id": "se", "site": "x.com"},
        {"type": "stack-exchange", "id": "local", "path": "."},
    )

    first, second = fetch_missing(recipe), fetch_missing(recipe)

    assert first == {"se": Fetched(True, "1 page", {"pages": 1})}
    assert second == {}
    assert [name for name, _ in asked] == ["se"]
    note = json.loads((fetched_folder(recipe.sources[0]) / FETCHED).read_text())
    assert note["asked"]["site"] == "x.com"
    assert (note["changed"], note["summary"], note["counts"]) == (True, "1 page", {"pages": 1})


def test_a_refresh_asks_again(asked):
    fetch_source(site())
    fetch_source(site(), refresh=True)

    assert len(asked) == 2


def test_what_is_asked_for_names_the_folder_and_what_selects_from_it_does_not(asked):
    here = raw_folder(site())

    assert raw_folder(site(site="y.com")) != here
    assert raw_folder(site(weight=2, max_records=5, allow_unlicensed=True)) == here


def test_a_failed_fetch_leaves_no_note_and_is_named_when_it_is_read(asked):
    with pytest.raises(SourceError, match="the site is down"):
        fetch_source(site("broken"))

    with pytest.raises(SourceError, match="source 'broken' has not been fetched yet"):
        fetched_folder(site("broken"))


def test_output_of_openai_models_needs_to_be_allowed_by_name(asked):
    source = {"type": "dataset", "id": "a", "path": ".", "openai_outputs": True}

    with pytest.raises(PreflightError, match="sources.0: 'a' holds output of OpenAI models"):
        sources.check_sources(curation_recipe(source))

    sources.check_sources(curation_recipe({**source, "allow_openai_outputs": True}))


def test_a_backfill_goes_window_by_window_and_goes_on_where_it_stopped(asked, monkeypatch):
    source = site()
    span = (DAY, DAY.replace(month=4))
    first = backfill(source, *span)
    assert next(first)[1] is not None
    assert next(first)[1] is not None

    rest = list(backfill(source, *span))

    assert [fetched is None for _, fetched in rest] == [True, True, False, False]
    assert [window for _, window in asked] == [window for window, _ in rest]
    assert rest[0][0].since == DAY
    assert rest[-1][0].until == DAY.replace(month=4)


def test_a_window_that_failed_is_fetched_again(asked):
    with pytest.raises(SourceError, match="the site is down"):
        list(backfill(site("broken"), DAY, DAY.replace(day=3), step="day"))
    with pytest.raises(SourceError, match="the site is down"):
        list(backfill(site("broken"), DAY, DAY.replace(day=3), step="day"))

    assert [window.since for _, window in asked] == [DAY, DAY]


def test_windows_cover_the_span_without_gap_or_overlap():
    found = list(windows(DAY, DAY.replace(month=12), "week"))

    assert (found[0].since, found[-1].until) == (DAY, DAY.replace(month=12))
    assert all(a.until == b.since for a, b in pairwise(found))
    with pytest.raises(SourceError, match="--since 2024-01-01 is not before --until 2024-01-01"):
        list(windows(DAY, DAY, "day"))


def test_a_source_without_dates_and_a_wrong_name_or_date_are_explained(asked):
    with pytest.raises(SourceError, match="always fetched as a whole"):
        list(backfill(RepositorySource(type="repository", id="r"), DAY, DAY.replace(month=2)))
    with pytest.raises(RecipeError, match="'stack-exchang', did you mean 'stack-exchange'"):
        find_sources("stack-exchang")
    with pytest.raises(SourceError, match="expected YEAR-MONTH-DAY"):
        parse_date("yesterday")
    assert parse_date("2024-01-01") == DAY


def test_the_sources_of_a_backfill_are_those_that_recipes_fetch(asked):
    assert [source.id for source in find_sources("stack-exchange")] == ["stack-exchange"]
