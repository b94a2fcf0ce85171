"""The recipe's section `fim`: which code is trained as fill-in-the-middle, and in which form."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.settings.section import Count, Fraction, Section


class Fim(Section):
    """Fill-in-the-middle on `text` records: share permuted, and share of those in SPM order.

    `source_rates` replaces `fim_rate` for sources by id. `level` is where cuts fall; `middle:
    syntax` cuts out a statement or expression where Python code parses. `spm_variant` 2 is
    StarCoder's. `sentinels` is a model family's form, or auto: the one the tokenizer has.
    `fim_passes` permutations are rendered, and epoch e trains pass e mod fim_passes.
    `repository_order` joins the files of a repository, by path, with the tokenizer's separators.
    """

    fim_rate: Fraction = 0.0
    fim_spm_rate: Fraction = 0.5
    source_rates: dict[str, Fraction] = Field(default_factory=dict)
    fim_passes: Count = 1
    level: Literal["character", "token"] = "character"
    middle: Literal["any", "syntax"] = "any"
    spm_variant: Literal[1, 2] = 2
    sentinels: Literal["auto", "starcoder", "santacoder", "codellama", "deepseek", "qwen"] = "auto"
    train_sentinels: bool = False
    repository_order: bool = False
    seed: int = 42

    @model_validator(mode="after")
    def _fits_together(self) -> "Fim":
        if self.repository_order and self.level == "token":
            raise ValueError(
                "repository_order joins files before they are tokens; set level: character"
            )
        return self
