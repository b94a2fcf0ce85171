"""Finds out what a user's data is from a path, a repository or a hub id: for `starloom new`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipelines.errors import SourceError
from pipelines.settings.sources import Source
from pipelines.sources import get_source
from pipelines.sources.fetch import fetch_source
from pipelines.sources.preview import detect_source, read_sample

SAMPLE_RECORDS = 20

Body = Literal["messages", "prompt", "text", "code"]

GITHUB = re.compile(r"(?:https?://|git@|ssh://git@)?github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?")
HUB = re.compile(r"(?:https?://huggingface\.co/datasets/|hf:)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?")

LOGIN = re.compile(r"https?://[^/\s]*@")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class OriginFound:
    """The settings of a source, the body its records have, and in words what was found."""

    source: dict[str, Any]
    body: Body
    summary: str


def find_origin(
    origin: str,
    name: str,
    *,
    revision: str | None = None,
    license_: str | None = None,
    allow_openai_outputs: bool = False,
) -> OriginFound:
    """Return the source that reads an origin. A hub dataset is fetched, to see its rows.

    Raises SourceError where there is nothing of the kind, or nothing that can be read.
    """
    path = Path(origin).expanduser()
    said = {"license": license_} if license_ else {"allow_unlicensed": True}
    if path.exists():
        # Whether rows may lack a license is for what the data is to say, not for every kind.
        entry = {**detect_source(path.resolve()), "id": name}
        entry |= {"license": license_} if license_ else {}
        if _validate(entry).openai_outputs and not allow_openai_outputs:
            raise SourceError(
                f"--from {origin!r}: known to hold output of OpenAI models, whose terms forbid "
                "training competing models; --allow-openai-outputs says that you may train on it"
            )
        entry |= {"allow_openai_outputs": True} if allow_openai_outputs else {}
        return OriginFound(entry, _find_body(entry), f"{entry['type']} in {path.resolve()}")
    if LOGIN.match(origin):
        raise SourceError(
            "--from: an address with a name or token in it is not taken, as recipes are shared; "
            "give https://github.com/OWNER/NAME and set GITHUB_TOKEN in the environment"
        )
    repository = GITHUB.fullmatch(origin)
    if repository:
        entry = {"type": "repository", "id": name, "repository": repository[1]}
        entry |= {"revision": revision} if revision else {}
        entry |= said
        return OriginFound(entry, "code", f"repository {repository[1]} on GitHub")
    dataset = HUB.fullmatch(origin)
    if dataset:
        commit = _find_commit(dataset[1], revision)
        entry = {"type": "dataset", "id": name, "dataset": dataset[1], "revision": commit, **said}
        fetch_source(_validate(entry))
        return OriginFound(entry, _find_body(entry), f"hub dataset {dataset[1]} at {commit[:12]}")
    raise SourceError(
        f"--from {origin!r}: no such file or folder here, and neither a GitHub repository "
        "(https://github.com/OWNER/NAME) nor a hub dataset (OWNER/NAME)"
    )


def _find_body(entry: dict[str, Any]) -> Body:
    """Return the kind of body that the first records of a source have."""
    source = _validate(entry)
    problem = get_source(source).find_problem(source)
    if problem:
        raise SourceError(f"source {source.id!r}: {problem}")
    rows = read_sample(source, SAMPLE_RECORDS)
    if not rows:
        raise SourceError(
            f"source {source.id!r}: no record could be made of it; `starloom preview` says why"
        )
    if source.type == "repository":
        return "code"
    if rows[0]["messages"] is not None:
        return "messages"
    return "text" if rows[0]["text"] is not None else "prompt"


def _find_commit(dataset: str, revision: str | None) -> str:
    """Return the commit that a revision of a hub dataset is now, the newest by default."""
    import huggingface_hub
    from huggingface_hub import errors

    if revision and COMMIT.fullmatch(revision):
        return revision
    try:
        info = huggingface_hub.HfApi().dataset_info(dataset, revision=revision, timeout=20)
    except errors.HfHubHTTPError as error:
        raise SourceError(
            f"--from {dataset!r}: no such file here, and no such dataset on the hub that you may "
            "read; a GitHub repository is named by its address, https://github.com/OWNER/NAME"
        ) from error
    except Exception as error:
        raise SourceError(
            f"--from {dataset!r}: no such file here, and the hub cannot be reached "
            f"({type(error).__name__}); where the dataset is cached, name its commit with "
            "--revision"
        ) from error
    return str(info.sha)


def _validate(entry: dict[str, Any]) -> Source:
    adapter: TypeAdapter[Source] = TypeAdapter(Source)
    return adapter.validate_python(entry)
