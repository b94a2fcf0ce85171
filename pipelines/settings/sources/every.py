"""The keys that every source has."""

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from pipelines.settings.section import Count, Section


def _without_login(address: str) -> str:
    if "@" in address:
        raise ValueError(
            "expected OWNER/NAME or an address without a login: recipes are shared and stored; a "
            "token belongs into the environment, as GITHUB_TOKEN"
        )
    return address


RepositoryName = Annotated[str, AfterValidator(_without_login)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class EverySource(Section):
    """What is said of any source.

    `path` reads local raw input instead of fetching it. `license` is that of rows which name none.
    `max_records` caps what is read; `weight` and `epochs` say how often it is trained on.
    """

    # The keys that decide what is fetched; all others select from what was.
    FETCHES: ClassVar[tuple[str, ...]] = ()
    # Whether a fetch can be limited to a window of dates, hence backfilled.
    HAS_DATES: ClassVar[bool] = False

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    path: str | None = None
    revision: str | None = None
    license: str | None = None
    allow_unlicensed: bool = False
    openai_outputs: bool = False
    allow_openai_outputs: bool = False
    max_records: Count | None = None
    weight: Weight | None = None
    epochs: Weight = 1.0
