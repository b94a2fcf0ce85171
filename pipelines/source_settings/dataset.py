"""Instruction, dialogue and text rows from files or a hub dataset."""

from typing import Literal

from pipelines.source_settings.every import EverySource


class DatasetSource(EverySource):
    """Rows of JSON, JSON lines, CSV, Parquet or Arrow; their schema is detected."""

    type: Literal["dataset", "code-alpaca", "gpteacher"]
    dataset: str | None = None
    repository: str | None = None
