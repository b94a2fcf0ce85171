"""Rows for control tokens that the base model does not know.

A base model may have spare rows (StarCoder2, Qwen2) or none (StarCoder): either way a new token's
row starts at the mean of the known ones, and the vocabulary grows in multiples of 128, which keeps
the head's matrix product aligned.
"""

import logging
import math
from typing import Any

from pipelines.errors import RecipeError

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 128


def find_new_ids(tokenizer: Any, base: dict[str, int] | None, rows: int) -> list[int]:
    """Return the ids of `tokenizer` that mean something else, or nothing, in the base's vocabulary.

    Without a base vocabulary every id below the base model's `rows` counts as known. Raises
    RecipeError where it is another tokenizer altogether.
    """
    vocabulary = tokenizer.get_vocab()
    if base is None:
        return sorted(i for i in vocabulary.values() if i >= rows)
    new_ids = sorted(i for token, i in vocabulary.items() if base.get(token) != i)
    if len(new_ids) > len(vocabulary) // 2:
        raise RecipeError(
            f"tokenizer: {len(new_ids)} of {len(vocabulary)} tokens differ from those of the base "
            "model; use the model's own tokenizer (leave the section `tokenizer` out)"
        )
    return new_ids


def add_rows(model: Any, new_ids: list[int], needed: int) -> None:
    """Give new ids rows (`needed` in all, padded), each started at the mean of the known rows."""
    import torch

    old_rows = model.get_input_embeddings().num_embeddings
    if needed > old_rows:
        model.resize_token_embeddings(padded_size(needed), mean_resizing=False)
    known = torch.ones(old_rows, dtype=torch.bool)
    known[[i for i in new_ids if i < old_rows]] = False
    weights = {id(e.weight): e.weight for e in embeddings_of(model).values()}
    with torch.no_grad():
        for weight in weights.values():
            mean = weight[:old_rows][known.to(weight.device)].float().mean(0).to(weight.dtype)
            weight[old_rows:] = mean
            weight[new_ids] = mean
    rows = model.get_input_embeddings().num_embeddings
    logger.info("%d new tokens, %d embedding rows", len(new_ids), rows)


def embeddings_of(model: Any) -> dict[str, Any]:
    """Return {attribute name: module} of the input and output embeddings."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if any(module is w for w in wanted)
    }


def trained_rows(model: Any, new_ids: list[int]) -> dict[str, list[int]]:
    """Return the rows to train per embedding; a tied head follows its input embedding."""
    if not new_ids:
        return {}
    weight = model.get_input_embeddings().weight
    return {
        name: new_ids
        for name, module in embeddings_of(model).items()
        if module is model.get_input_embeddings() or module.weight is not weight
    }


def num_ids(tokenizer: Any) -> int:
    """Return the number of rows that a tokenizer's ids need."""
    return int(max(tokenizer.get_vocab().values())) + 1


def padded_size(size: int) -> int:
    """Return a vocabulary's size, rounded up to the multiple."""
    return math.ceil(size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
