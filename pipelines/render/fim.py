"""Fill-in-the-middle: a text is cut in three and reordered, in the form the model was taught.

PSM gives `<fim_prefix>` P `<fim_suffix>` S `<fim_middle>` M. SPM has two variants: 2, StarCoder's,
is `<fim_prefix><fim_suffix>` S `<fim_middle>` P M; 1 is `<fim_suffix>` S `<fim_prefix>` P
`<fim_middle>` M. Invariant: `restore_text` gives the text back, and the draw depends on nothing but
the seed, the record id, the fragment's number and the pass.
Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pipelines.render.pieces import END_OF_TEXT, Piece, content, control
from pipelines.render.sentinels import STARCODER, Sentinels
from pipelines.render.syntax_spans import list_spans
from pipelines.settings.fim import Fim

PREFIX, MIDDLE, SUFFIX = STARCODER.prefix, STARCODER.middle, STARCODER.suffix
SENTINELS = (PREFIX, MIDDLE, SUFFIX)

Order = Literal["none", "psm", "spm"]
ORDERS: tuple[Order, ...] = ("none", "psm", "spm")
Tokens = Sequence[int] | np.ndarray[Any, np.dtype[Any]]
# Where a draw's two cuts fall, as shares of the places there are.
Cuts = tuple[float, float]


class Draw(NamedTuple):
    """The order, and the middle as the character range [start, stop).

    Where the cuts fall between tokens, `cuts` says where in [0, 1), and the range is empty.
    """

    order: Order
    start: int
    stop: int
    cuts: Cuts | None = None


LEFT_TO_RIGHT = Draw("none", 0, 0)


@dataclass(frozen=True, slots=True)
class Rules:
    """How code is permuted: the settings of a recipe for one pass over one source."""

    rate: float
    spm_rate: float = 0.5
    seed: int = 42
    number: int = 0
    level: Literal["character", "token"] = "character"
    middle: Literal["any", "syntax"] = "any"
    spm_variant: Literal[1, 2] = 2
    train_sentinels: bool = False
    sentinels: Sentinels = STARCODER


def choose_rules(settings: Fim, source: str, number: int, sentinels: Sentinels) -> Rules:
    """Return the rules for a source in a pass; its own rate goes before the recipe's."""
    return Rules(
        rate=settings.source_rates.get(source, settings.fim_rate),
        spm_rate=settings.fim_spm_rate,
        seed=settings.seed,
        number=number,
        level=settings.level,
        middle=settings.middle,
        spm_variant=settings.spm_variant,
        train_sentinels=settings.train_sentinels,
        sentinels=sentinels,
    )


def draw_order(record_id: str, part: int, rules: Rules) -> Order:
    """Draw whether and in which order a fragment is permuted."""
    permute, spm, *_ = _numbers(record_id, part, rules)
    if permute >= rules.rate * 2**64:
        return "none"
    return "spm" if spm < rules.spm_rate * 2**64 else "psm"


def draw_fim(record_id: str, part: int, text: str, rules: Rules) -> Draw:
    """Draw whether and how a fragment is permuted.

    Both cut points are uniform over the places between its characters (or tokens), the ends among
    them, so that prefix, middle and suffix may be empty. With `middle: syntax` the middle is one of
    the text's statements and expressions, each as likely; any text where it has none.
    """
    order = draw_order(record_id, part, rules)
    if order == "none":
        return LEFT_TO_RIGHT
    _, _, *cuts = _numbers(record_id, part, rules)
    if rules.level == "token":
        first, second = sorted(cut / 2**64 for cut in cuts)
        return Draw(order, 0, 0, (first, second))
    spans = list_spans(text) if rules.middle == "syntax" else []
    if spans:
        return Draw(order, *spans[(cuts[0] * len(spans)) >> 64])
    start, stop = sorted((cut * (len(text) + 1)) >> 64 for cut in cuts)
    return Draw(order, start, stop)


def render_text(
    text: str, draw: Draw, *, ends: bool = True, rules: Rules | None = None
) -> list[Piece]:
    """Return the pieces of a code fragment: all of its characters trained, sentinels if asked.

    `ends` says that the file ends here; a permuted fragment always ends after its middle. One
    permuted between tokens is left whole here; `permute_tokens` cuts it.
    """
    rules = rules or Rules(1.0)
    if draw.order == "none":
        end = [control(END_OF_TEXT, trained=True)] if ends else []
        return [*content(text, trained=True), *end]
    last = control(rules.sentinels.end, trained=True)
    if draw.cuts is not None:
        return [*content(text, trained=True), last]
    prefix = content(text[: draw.start], trained=True)
    middle = content(text[draw.start : draw.stop], trained=True)
    suffix = content(text[draw.stop :], trained=True)
    before, hole, after = (
        control(name, trained=rules.train_sentinels) for name in rules.sentinels[:3]
    )
    if draw.order == "psm":
        first = [before, *prefix, after, *suffix, hole]
    elif rules.spm_variant == 1:
        first = [after, *suffix, before, *prefix, hole]
    else:
        first = [before, after, *suffix, hole, *prefix]
    return [*first, *middle, last]


def permute_tokens(
    tokens: Tokens, draw: Draw, sentinels: tuple[int, int, int], *, spm_variant: int = 2
) -> list[tuple[Tokens | Sequence[int], bool]]:
    """Return runs of ids, and whether each is content, of a text's tokens cut at `draw.cuts`.

    `sentinels` are the ids of prefix, middle and suffix.
    """
    assert draw.cuts is not None
    start, stop = (min(int(cut * (len(tokens) + 1)), len(tokens)) for cut in draw.cuts)
    prefix, middle, suffix = (
        (part, True) for part in (tokens[:start], tokens[start:stop], tokens[stop:])
    )
    before, hole, after = (((index,), False) for index in sentinels)
    if draw.order == "psm":
        return [before, prefix, after, suffix, hole, middle]
    if spm_variant == 1:
        return [after, suffix, before, prefix, hole, middle]
    return [before, after, suffix, hole, prefix, middle]


def restore_text(pieces: Sequence[Piece], sentinels: Sentinels = STARCODER) -> str:
    """Return the text that `render_text` made the pieces of, whatever the order and variant."""
    parts = dict.fromkeys(("", *sentinels[:3]), "")
    current = ""
    for piece in pieces:
        if piece.text is not None:
            parts[current] += piece.text
        elif piece.control in sentinels[:3]:
            current = piece.control or ""
    # In SPM 2 the part after the prefix sentinel is empty, and the prefix heads the middle's part.
    return parts[""] + parts[sentinels.prefix] + parts[sentinels.middle] + parts[sentinels.suffix]


def is_permuted(settings: Fim) -> bool:
    """Return whether any code of a recipe is permuted."""
    return max((settings.fim_rate, *settings.source_rates.values())) > 0


def _numbers(record_id: str, part: int, rules: Rules) -> tuple[int, int, int, int]:
    """Return four numbers below 2**64 that nothing but the arguments decides."""
    later = f"\0{rules.number}" if rules.number else ""
    digest = hashlib.sha256(f"{rules.seed}\0{record_id}\0{part}{later}".encode()).digest()
    first, second, third, fourth = (
        int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8)
    )
    return first, second, third, fourth
