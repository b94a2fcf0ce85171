"""A piece is a stretch of content or one control token, with its place in the loss.

Rendering ends here and encoding starts here. A piece is encoded by itself, so what is trained is
decided before any token exists, and text can never turn into a control token.
"""

from typing import Any, NamedTuple

import pyarrow as pa

END_OF_TEXT = "<|endoftext|>"
PAD = "<fim_pad>"
# The label of a token that is read and not trained.
IGNORE_INDEX = -100

PIECE = pa.struct([("text", pa.string()), ("control", pa.string()), ("trained", pa.bool_())])


class Piece(NamedTuple):
    """Either `text` (content, never empty) or `control` (the name of one token), not both."""

    text: str | None = None
    control: str | None = None
    trained: bool = False


def content(text: str, *, trained: bool) -> list[Piece]:
    """Return the piece for a text; none for an empty one."""
    return [Piece(text, None, trained)] if text else []


def control(name: str, *, trained: bool = False) -> Piece:
    """Return the piece for a control token."""
    return Piece(None, name, trained)


def read_pieces(rows: list[dict[str, Any]]) -> list[Piece]:
    """Return pieces as they were before they were written to a shard."""
    return [Piece(row["text"], row["control"], row["trained"]) for row in rows]
