"""OpenAssistant message trees."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.settings.section import Count, Fraction, Section
from pipelines.settings.sources.every import EverySource


class MaxLabels(Section):
    """The greatest value (0 to 1, the mean of the reviewers) a message's label may have.

    A label that nobody gave is no objection. Violence is a topic, not a fault, hence 1.
    """

    spam: Fraction = 0.5
    lang_mismatch: Fraction = 0.5
    pii: Fraction = 0.5
    not_appropriate: Fraction = 0.5
    hate_speech: Fraction = 0.5
    sexual_content: Fraction = 0.5
    toxicity: Fraction = 0.5
    violence: Fraction = 1.0


class OasstSource(EverySource):
    """Dialogues out of message trees, from files or a hub dataset.

    `path` is a file or folder of .jsonl, .json (both also .gz) or .parquet: trees, nested or flat
    messages, told apart by themselves. `dataset` is the hub id that is fetched where there is no
    `path`, at `revision`; `files` are globs of what is read, by default the hub's trees that are
    ready.

    `mode` says which answers become dialogues: `all_paths`, the best of each turn (`top1`) or the
    `top_k` best (`topk`), by rank. An unranked answer counts only where it has no sibling.
    `keep_user_leaf` makes a row for every last turn that nobody answered, as in the data StarChat
    was trained on; without it such turns are cut. With `pairs` the `meta` of a dialogue has, for
    each of its trained answers, those that were ranked below it, whatever `mode` keeps: for the
    recipe's section `preference`.

    Left out with all that follows them: messages of a tree in none of `tree_states` (empty: any),
    deleted ones, those of models unless `allow_synthetic`, those that failed their review unless
    `allow_failed_review`, those with a label above `max_labels` or a quality below `min_quality`,
    and those whose `lang` is none of `languages` (empty: any). What data does not tell, is no
    objection.
    """

    FETCHES: ClassVar[tuple[str, ...]] = ("dataset", "revision", "files")

    type: Literal["oasst"]
    dataset: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    files: tuple[str, ...] = ()
    mode: Literal["all_paths", "top1", "topk"] = "all_paths"
    top_k: Count | None = None
    keep_user_leaf: bool = False
    pairs: bool = False
    tree_states: tuple[str, ...] = ("ready_for_export",)
    allow_synthetic: bool = False
    allow_failed_review: bool = False
    max_labels: MaxLabels = MaxLabels()
    min_quality: Fraction = 0.25
    languages: tuple[str, ...] = ("en",)

    @model_validator(mode="after")
    def _top_k_goes_with_topk(self) -> "OasstSource":
        if (self.mode == "topk") != (self.top_k is not None):
            raise ValueError("mode: topk needs a number top_k, and top_k needs mode: topk")
        return self
