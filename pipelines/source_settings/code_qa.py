"""Questions and answers about code."""

from typing import Literal

from pipelines.source_settings.every import EverySource


class CodeQaSource(EverySource):
    """Rows of code, question and answer from a file, or generated from another source's code."""

    type: Literal["code-qa"]
