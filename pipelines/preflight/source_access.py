"""Can the remote sources of a recipe be had: fetched already, or from a hub that lets us in.

Nothing is downloaded.
"""

from pathlib import Path

from pipelines.errors import PreflightError
from pipelines.hub_access import ask_hub
from pipelines.recipe import Recipe
from pipelines.settings.sources import Source
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
    refusal = ask_hub(name, revision, "dataset")
    if refusal is None or refusal.kind == "failed":
        return None  # fetching tries several times
    page = f"https://huggingface.co/datasets/{name}"
    steps = {
        "offline": ": unset it where the hub is reached,",
        "gated": (
            f": accept its terms on {page} in the browser, then `hf auth login` (or HF_TOKEN=<a "
            "token with read access> in the environment);"
        ),
        "unknown": f": see {page};",
        "revision": f": see {page};",
        "unreached": ": run the same command where it is reached,",
    }[refusal.kind]
    before = {"gated": "is gated and ", "unknown": "", "revision": ""}
    subject = before.get(refusal.kind, "is not in the hub's cache and ")
    local = "or give your own copy with `--data PATH` or the source's `path:`"
    return f"dataset {name!r} {subject}{refusal.reason}{steps} {local}"
