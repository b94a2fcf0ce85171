"""Questions and answers of a Stack Exchange site, from a dump or by the API."""

from datetime import date
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipelines.settings.section import Count
from pipelines.settings.sources.every import EverySource


class StackExchangeSource(EverySource):
    """A site such as stats.stackexchange.com; `path` names a dump, else the API is asked.

    Asked of the API: `tags` (questions with any of them; all where empty), `since` and `until`
    (days; questions created from the first on, before the second), `min_fetched_score` (of the
    question: saves requests, see also `min_question_score`), `api_url` (another server of the API,
    which may have a private address).

    How it is asked: `page_size` questions per request, `request_delay` seconds between requests,
    never below `quota_reserve` requests left for the day, known questions asked again for
    deletions and votes by up to `recheck_requests` requests per refresh, `contact` (address or
    page of whoever runs the crawl) in the user agent. `allow_partial` reads a first crawl that the
    quota cut short. A key is taken from STARLOOM_STACK_EXCHANGE_KEY.

    Which questions become records, whatever way they came: `tags` (any of them), `since` and
    `until` as above, `min_question_score`, `closed_questions` and `duplicate_questions` (dumps
    with PostLinks.xml only) kept or dropped. Which of their answers: `select` the accepted one,
    the best by score, the best `top_k`, or all, with `min_answer_score` or more. With `pairs` a
    record is a selected answer and in its `meta` a worse one, `max_pairs` of a question at most.
    """

    FETCHES: ClassVar = ("site", "api_url", "tags", "since", "until", "min_fetched_score")
    HAS_DATES: ClassVar = True

    type: Literal["stack-exchange"]
    site: str | None = None
    tags: tuple[str, ...] = ()
    since: date | None = None
    until: date | None = None
    api_url: str = "https://api.stackexchange.com/2.3"
    min_fetched_score: int | None = None
    page_size: Annotated[int, Field(ge=1, le=100)] = 100
    request_delay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    quota_reserve: Annotated[int, Field(ge=0)] = 50
    recheck_requests: Annotated[int, Field(ge=0)] = 50
    contact: str | None = None
    allow_partial: bool = False
    select: Literal["accepted", "best", "top-k", "all"] = "accepted"
    top_k: Count = 3
    min_question_score: int | None = None
    min_answer_score: int | None = None
    closed_questions: Literal["keep", "drop"] = "keep"
    duplicate_questions: Literal["keep", "drop"] = "keep"
    pairs: bool = False
    max_pairs: Count = 10
