"""Source code: an installed distribution, a folder, an archive, or a GitHub repository."""

from typing import Literal

from pipelines.source_settings.every import EverySource


class RepositorySource(EverySource):
    """Functions with docstrings as pairs, and whole files."""

    type: Literal["repository"]
    distribution: str | None = None
    repository: str | None = None
    exclude: tuple[str, ...] = ()
