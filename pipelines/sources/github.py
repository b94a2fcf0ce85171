"""The fetch side of a repository on GitHub: what is asked for, and what lies here of it."""

import re
from pathlib import Path

from pipelines.errors import SourceError
from pipelines.settings.sources import RepositorySource
from pipelines.sources.checkout import ATTRIBUTES_FILE
from pipelines.sources.fetch import fetched_folder
from pipelines.sources.licenses import LICENSE_FILE, folder_licenses
from pipelines.sources.raw import Fetched, Origin

ADDRESS = re.compile(
    r"(?:https?://(?P<host>[\w.-]+(?::\d+)?)/)?(?P<name>[\w.-]+/[\w.-]+?)(?:\.git)?/?"
)
FULL_SHA = re.compile(r"[0-9a-f]{40}")
API_URL = "https://api.github.com"
PUBLIC = (API_URL, "https://raw.githubusercontent.com")
NO_LICENSE = (None, "", "NOASSERTION", "NONE")
MAX_ANSWER_BYTES = 50_000_000  # the API's own limit of a tree is 7 MB


def find_problem(source: RepositorySource) -> str | None:
    """Say in one sentence why a source names no repository that can be fetched, or return None."""
    if source.repository is None:
        return (
            "nothing to read is named; give `path:` (a folder or an archive), `distribution:` "
            "(an installed package) or `repository:` (OWNER/NAME on GitHub)"
        )
    found = ADDRESS.fullmatch(source.repository)
    if found is None or ".." in source.repository:
        return (
            f"repository {source.repository!r} is neither OWNER/NAME nor a repository's address; "
            "give e.g. scikit-learn/scikit-learn, and a branch, tag or commit as `revision:`"
        )
    if found["host"] not in (None, "github.com", "www.github.com") and source.api_url == API_URL:
        return (
            f"repository {source.repository!r} is not on github.com; name its server's `api_url:` "
            "and `raw_url:`, or give a local `path:`"
        )
    if source.revision is not None and not re.fullmatch(r"[\w][\w./+@-]*", source.revision):
        return f"revision {source.revision!r} is no branch, tag or commit"
    return None


def fetch(source: RepositorySource, folder: Path) -> Fetched:
    """Bring the folder to the commit that the revision names; raises SourceError.

    A full commit that is here already is not asked for again: it cannot change.
    """
    from pipelines.spiders.github import SECRETS
    from pipelines.spiders.github_folder import is_whole, read_commit
    from pipelines.spiders.launch import run_spider

    before = read_commit(folder)
    sha = source.revision or ""
    if FULL_SHA.fullmatch(sha) and before.get("sha") == sha and is_whole(folder, before):
        summary = f"nothing changed: commit {sha[:12]} is here, and a commit never does"
        return Fetched(False, summary, {"files": len(before["files"]), "requests": 0})
    found = ADDRESS.fullmatch(source.repository or "")
    request = {
        "repository": found["name"] if found else "",
        "ref": source.revision,
        "api_url": source.api_url,
        "raw_url": source.raw_url,
        "suffixes": list(source.extensions),
        "names": f"{re.escape(ATTRIBUTES_FILE)}|{LICENSE_FILE.pattern}",
        "max_file_bytes": source.max_file_bytes,
        "max_bytes": max(MAX_ANSWER_BYTES, source.max_file_bytes + 1),
        "trusted": [url for url in (source.api_url, source.raw_url) if url not in PUBLIC],
    }
    done = run_spider("github", request, folder, secrets=SECRETS)
    counts = {key: value for key, value in done.items() if type(value) is int}
    where = f"{done['name']} at {source.revision or 'its default branch'}"
    if not done["changed"]:
        return Fetched(False, f"nothing changed: {where} still is {done['sha'][:12]}", counts)
    summary = (
        f"{where} is {done['sha'][:12]}: {done['files']} files, {done['downloaded']} of them new "
        f"or changed, {done['deleted']} gone"
    )
    return Fetched(True, summary, counts)


def find_fetched(source: RepositorySource) -> tuple[Path, list[str], Origin, dict[str, int]]:
    """Return folder, files, origin and counts of files left out of what was fetched.

    Raises SourceError where nothing was.
    """
    from pipelines.spiders.github_folder import read_commit

    folder = fetched_folder(source)
    state = read_commit(folder)
    if not state:
        raise SourceError(
            f"source {source.id!r}: {folder} holds no finished commit; remove that folder and run "
            "the same command again"
        )
    root = folder / state["sha"]
    files = list(state["files"])
    page = state["page"] or f"https://github.com/{state['name']}"
    named = {} if state["license"] in NO_LICENSE else {"": state["license"]}
    origin = Origin(
        revision=state["sha"],
        url=page,
        blob=f"{page}/blob/{state['sha']}/",
        author=state["author"],
        licenses={**named, **folder_licenses(root, files)},
        created=state["created"],
    )
    return root, files, origin, state["left_out"]
