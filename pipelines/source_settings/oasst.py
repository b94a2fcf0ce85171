"""OpenAssistant message trees."""

from typing import Literal

from pipelines.source_settings.every import EverySource


class OasstSource(EverySource):
    """Dialogues out of message trees, from files or a hub dataset."""

    type: Literal["oasst"]
    dataset: str | None = None
