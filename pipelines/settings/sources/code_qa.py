"""Questions and answers about code."""

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from pipelines.settings.section import Count, Section
from pipelines.settings.sources.every import EverySource
from pipelines.settings.sources.repository import RepositorySource

Endpoint = Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(?:/[^?#\s]*)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OPENAI_HOSTS = ("openai.com", "openai.azure.com")


class QuestionColumns(Section):
    """Which column holds what; what is not named is found by its usual names."""

    code: str | None = None
    question: str | None = None
    answer: str | None = None


class CodeQaSource(EverySource):
    """Rows of code, question and answer from files, or generated from another source's code.

    `path` is a file or folder of JSON lines, JSON, CSV, Parquet or Arrow. `columns` names columns
    that are not called as usual (code, question, answer). The prompt is the question with the code
    in a fence, marked with the row's language or else with `language`.

    Without a `path`, a model writes them: `code` is a repository source, whose functions, methods
    and classes are sent to the chat endpoint `endpoint` (an OpenAI-compatible base URL such as
    http://localhost:8000/v1) and its `model`, one request for `questions_per_function` pairs.
    `api_key_env` names the environment variable that holds the key. `temperature`, `seed`,
    `max_answer_tokens` and `json_mode` (ask the server for JSON) go into each request.
    At most `max_requests` are sent, retries included, and at most `max_tokens` tokens are used, in
    all runs together; a refresh goes on where the budget of an earlier one ended.
    `openai_outputs` is true by itself where the endpoint is OpenAI's.
    """

    FETCHES: ClassVar[tuple[str, ...]] = (
        "code", "endpoint", "model", "questions_per_function", "temperature", "seed",
        "max_answer_tokens", "json_mode",
    )  # fmt: skip

    type: Literal["code-qa"]
    files: tuple[str, ...] = ()
    columns: QuestionColumns = QuestionColumns()
    language: Annotated[str, Field(pattern=r"^[\w+#.-]*$")] = ""

    code: RepositorySource | None = None
    endpoint: Endpoint | None = None
    model: Annotated[str, Field(min_length=1)] | None = None
    api_key_env: VariableName | None = None
    questions_per_function: Annotated[int, Field(ge=1, le=20)] = 2
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    seed: int | None = 42
    max_answer_tokens: Count = 1024
    json_mode: bool = False
    max_requests: Count = 1000
    max_tokens: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give the inner source an id, and flag what a model of OpenAI will write."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        code = filled.get("code")
        if isinstance(code, dict) and isinstance(filled.get("id"), str):
            filled["code"] = {"id": f"{filled['id'][:90]}-code", **code}
        if filled.get("path") is None and is_openai(filled.get("endpoint")):
            filled.setdefault("openai_outputs", True)
        return filled


def is_openai(endpoint: Any) -> bool:
    """Say whether an endpoint belongs to OpenAI or resells its models."""
    if not isinstance(endpoint, str):
        return False
    try:
        host = urlsplit(endpoint).hostname or ""
    except ValueError:
        return False
    return any(host == name or host.endswith(f".{name}") for name in OPENAI_HOSTS)
