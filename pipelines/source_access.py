"""Can the remote sources of a recipe be had: fetched already, or from a hub that lets us in.

Nothing is downloaded.
"""

import os
from pathlib import Path

from pipelines.base_model import ON
from pipelines.errors import PreflightError
from pipelines.hub_errors import hub_errors
from pipelines.recipe import Recipe
from pipelines.source_settings import Source
from pipelines.sources import get_source
from pipelines.sources.fetch import raw_folder
from pipelines.sources.raw import FETCHED


def missing_sources(recipe: Recipe) -> list[Source]:
    """Return the recipe's remote sources that a run has to fetch first."""
    return [source for source in recipe.sources if _is_missing(source)]


def access_problems(recipe: Recipe) -> list[str]:
    """Say which hub datasets can be neither fetched nor read from the hub's cache.

    Other servers are not asked: what they answer is seen when they are fetched from.
    """
    problems = []
    for index, source in enumerate(recipe.sources):
        name = getattr(source, "dataset", None)
        if name and _is_missing(source) and not _is_cached(name):
            problem = _hub_problem(name, source.revision)
            problems += [f"sources.{index}: {problem}"] if problem else []
    return problems


def _is_missing(source: Source) -> bool:
    try:
        module = get_source(source)
    except PreflightError:
        return False  # said by the check of the sources themselves
    if module.find_problem(source) or not module.is_remote(source):
        return False
    return not (raw_folder(source) / FETCHED).exists()


def _is_cached(name: str) -> bool:
    """Return whether the hub's cache holds some snapshot; fetching says whether it is whole."""
    from huggingface_hub import constants, file_download

    folder = file_download.repo_folder_name(repo_id=name, repo_type="dataset")
    return any((Path(constants.HF_HUB_CACHE) / folder).glob("snapshots/*/*"))


def _hub_problem(name: str, revision: str | None) -> str | None:
    local = "or give your own copy with `--data PATH` or the source's `path:`"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ON:
        return (
            f"dataset {name!r} is not in the hub's cache and HF_HUB_OFFLINE is set: unset it where "
            f"the hub is reached, {local}"
        )
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/datasets/{name}"
    try:
        api = HfApi()
        api.auth_check(name, repo_type="dataset")  # dataset_info answers for gated ones to anybody
        api.dataset_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        who = "your token has no access to it" if get_token() else "no token is set here"
        return (
            f"dataset {name!r} is gated and {who}: accept its terms on {page} in the browser, then "
            f"`hf auth login` (or HF_TOKEN=<a token with read access> in the environment); {local}"
        )
    except RepositoryNotFoundError:
        return f"dataset {name!r} does not exist or needs a login: see {page}; {local}"
    except RevisionNotFoundError:
        return f"dataset {name!r} has no revision {revision!r}: see {page}; {local}"
    except HfHubHTTPError:
        return None  # it answers: fetching tries several times
    except hub_errors() as error:
        reason = f"the hub cannot be reached ({type(error).__name__})"
        return (
            f"dataset {name!r} is not in the hub's cache and {reason}: run the same command where "
            f"it is reached, {local}"
        )
    return None
