"""Fill-in-the-middle between tokens: a fragment's own tokens, cut and reordered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipelines.render.fim import Draw, permute_tokens
from pipelines.render.piece_columns import Tokens
from pipelines.render.sentinels import find_sentinels
from pipelines.settings.fim import Fim


@dataclass(frozen=True, slots=True)
class TokenRules:
    """The ids of the sentinels for prefix, middle and suffix, and how they are placed."""

    sentinels: tuple[int, int, int]
    spm_variant: int
    train_sentinels: bool


def choose_token_rules(tokenizer: Tokenizer, settings: Fim) -> TokenRules:
    """Return the rules of a recipe; TemplateError where the tokenizer has no sentinels."""
    prefix, middle, suffix, _ = find_sentinels(tokenizer, settings.sentinels)
    ids = {name: int(tokenizer.token_to_id(name) or 0) for name in (prefix, middle, suffix)}
    return TokenRules(
        (ids[prefix], ids[middle], ids[suffix]), settings.spm_variant, settings.train_sentinels
    )


def permute_rows(
    tokens: Tokens,
    orders: Sequence[str],
    cuts: Sequence[Sequence[float] | None],
    rules: TokenRules,
) -> Tokens:
    """Return the rows, those with cuts permuted: all but their last token, which ends them."""
    ids: list[Any] = []
    trained: list[Any] = []
    lengths = []
    for number, cut in enumerate(cuts):
        span = slice(tokens.rows[number], tokens.rows[number + 1])
        row, mask = tokens.input_ids[span], tokens.is_trained[span]
        if cut is None:
            ids.append(row)
            trained.append(mask)
        else:
            draw = Draw(orders[number], 0, 0, (cut[0], cut[1]))  # type: ignore[arg-type]
            runs = permute_tokens(row[:-1], draw, rules.sentinels, spm_variant=rules.spm_variant)
            for run, is_content in (*runs, (row[-1:], True)):
                ids.append(run)
                trained.append(np.full(len(run), is_content or rules.train_sentinels))
        lengths.append(len(row) + 3 * (cut is not None))
    none = np.empty(0, np.int32)
    return Tokens(
        np.concatenate([none, *ids]).astype(np.int32),
        np.concatenate([np.empty(0, bool), *trained]),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    )
