"""What a recipe says of each source: one class per `type`, so that a key of another is an error."""

from typing import Annotated, get_args

from pydantic import Field

from pipelines.settings.sources.code_qa import CodeQaSource
from pipelines.settings.sources.dataset import DatasetSource
from pipelines.settings.sources.every import EverySource
from pipelines.settings.sources.oasst import OasstSource
from pipelines.settings.sources.repository import RepositorySource
from pipelines.settings.sources.stack_exchange import StackExchangeSource

Source = Annotated[
    RepositorySource | StackExchangeSource | OasstSource | DatasetSource | CodeQaSource,
    Field(discriminator="type"),
]

__all__ = [
    "CodeQaSource",
    "DatasetSource",
    "EverySource",
    "OasstSource",
    "RepositorySource",
    "Source",
    "StackExchangeSource",
    "source_types",
]


def source_types() -> dict[str, type[EverySource]]:
    """Return the class of each source type by its name."""
    classes = get_args(get_args(Source)[0])
    return {
        name: each for each in classes for name in get_args(each.model_fields["type"].annotation)
    }
