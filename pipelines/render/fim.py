"""Fill-in-the-middle: a text is cut in three at character positions and reordered.

PSM gives `<fim_prefix>` P `<fim_suffix>` S `<fim_middle>` M; SPM (StarCoder's variant) gives
`<fim_prefix><fim_suffix>` S `<fim_middle>` P M. Invariant: `restore_text` gives the text back, and
the draw depends on nothing but the seed, the record id and the fragment's number.
Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (2022).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pipelines.render.pieces import END_OF_TEXT, Piece, content, control

PREFIX, MIDDLE, SUFFIX = "<fim_prefix>", "<fim_middle>", "<fim_suffix>"
SENTINELS = (PREFIX, MIDDLE, SUFFIX)

Order = Literal["none", "psm", "spm"]


class Draw(NamedTuple):
    """The order, and the middle as the character range [start, stop)."""

    order: Order
    start: int
    stop: int


LEFT_TO_RIGHT = Draw("none", 0, 0)


def draw_fim(
    record_id: str, part: int, length: int, *, rate: float, spm_rate: float, seed: int
) -> Draw:
    """Draw whether and how a fragment of `length` characters is permuted.

    Both cut points are uniform over the length + 1 places between characters, so that prefix,
    middle and suffix may be empty.
    """
    digest = hashlib.sha256(f"{seed}\0{record_id}\0{part}".encode()).digest()
    permute, spm, *cuts = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    if permute >= rate * 2**64:
        return LEFT_TO_RIGHT
    start, stop = sorted((cut * (length + 1)) >> 64 for cut in cuts)
    return Draw("spm" if spm < spm_rate * 2**64 else "psm", start, stop)


def render_text(text: str, draw: Draw, *, ends: bool = True) -> list[Piece]:
    """Return the pieces of a code fragment: all of its characters trained, no sentinel.

    `ends` says that the file ends here; a permuted fragment always ends after its middle.
    """
    end = [control(END_OF_TEXT, trained=True)]
    if draw.order == "none":
        return [*content(text, trained=True), *(end if ends else ())]
    prefix = content(text[: draw.start], trained=True)
    middle = content(text[draw.start : draw.stop], trained=True)
    suffix = content(text[draw.stop :], trained=True)
    if draw.order == "psm":
        first = [control(PREFIX), *prefix, control(SUFFIX), *suffix, control(MIDDLE)]
    else:
        first = [control(PREFIX), control(SUFFIX), *suffix, control(MIDDLE), *prefix]
    return [*first, *middle, *end]


def restore_text(pieces: Sequence[Piece]) -> str:
    """Return the text that `render_text` made the pieces of, whatever the order."""
    parts = {"": "", PREFIX: "", SUFFIX: "", MIDDLE: ""}
    current = ""
    for piece in pieces:
        if piece.text is not None:
            parts[current] += piece.text
        elif piece.control in SENTINELS:
            current = piece.control
    # In SPM the part after <fim_prefix> is empty and the prefix heads the part after <fim_middle>.
    return parts[""] + parts[PREFIX] + parts[MIDDLE] + parts[SUFFIX]
