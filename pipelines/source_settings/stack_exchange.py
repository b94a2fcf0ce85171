"""Questions and answers of a Stack Exchange site, from a dump or by the API."""

from typing import ClassVar, Literal

from pipelines.source_settings.every import EverySource


class StackExchangeSource(EverySource):
    """A site such as stats.stackexchange.com; `path` names a dump, else the API is asked."""

    FETCHES: ClassVar = ("site",)
    HAS_DATES: ClassVar = True

    type: Literal["stack-exchange"]
    site: str | None = None
