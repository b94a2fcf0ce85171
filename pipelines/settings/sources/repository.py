"""Source code: an installed distribution, a folder, an archive, or a GitHub repository."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipelines.settings.section import Count
from pipelines.settings.sources.every import EverySource, RepositoryName

Extension = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9_+.-]+$", max_length=20)]
Kind = Literal["function", "method", "class", "file"]
ServerUrl = Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(?:/[^?#\s]*)?$")]


class RepositorySource(EverySource):
    """Source code as pairs of docstring and code, and as whole files.

    Where it comes from, the first that is given: `path` is a folder or an archive (sdist, wheel,
    zip, tar), `distribution` an installed package, `repository` OWNER/NAME on GitHub or its URL.
    `revision` is a tag, branch or commit there (by default the default branch) and is resolved to
    a commit. `api_url` and `raw_url` name another server than github.com. A token is optional:
    GITHUB_TOKEN in the environment for github.com, GITHUB_ENTERPRISE_TOKEN for other servers.
    Files over `max_file_bytes` are not fetched.

    What of it is read: files with one of the `extensions`, less those that match a glob in
    `exclude`, those that .gitignore names, other projects' code (`include_vendored`) and what
    programs wrote (`include_generated`). `licenses` keeps files under one of these only.

    What is made of it: `kinds` of records. Functions, methods and classes are those of Python with
    a docstring; files of any language are whole, notebooks without their outputs. `completion` is
    `seed` (the docstring cut out, its line left blank, as in the project's seed data) or `clean`
    (the line goes, too). `strip_doctests` takes interactive sessions out of docstrings.
    """

    FETCHES: ClassVar[tuple[str, ...]] = (
        "repository", "revision", "api_url", "raw_url", "extensions", "max_file_bytes",
    )  # fmt: skip

    type: Literal["repository"]
    distribution: str | None = None
    repository: RepositoryName | None = None
    api_url: ServerUrl = "https://api.github.com"
    raw_url: ServerUrl = "https://raw.githubusercontent.com"
    max_file_bytes: Count = 1_000_000

    extensions: Annotated[tuple[Extension, ...], Field(min_length=1)] = (".py",)
    exclude: tuple[str, ...] = ()
    include_vendored: bool = False
    include_generated: bool = False
    licenses: tuple[str, ...] | None = None

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("function", "method", "file")
    completion: Literal["seed", "clean"] = "seed"
    strip_doctests: bool = False
