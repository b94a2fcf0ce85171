"""Long texts are cut into fragments that fit a block, at line ends wherever a line fits.

Invariant: the fragments of a text join to the text, and each encodes to at most `room` tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence

from tokenizers import Tokenizer


def split_texts(tokenizer: Tokenizer, texts: Sequence[str], room: int) -> list[list[str]]:
    """Return the fragments of each text; `room` is in tokens, at least those of a character."""
    if not texts:
        return []
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    cut = [
        [text]
        if len(encoding.ids) <= room
        else cut_text(text, [stop for _, stop in encoding.offsets], room)
        for text, encoding in zip(texts, encodings, strict=True)
    ]
    # A fragment is encoded by itself, and may then take more tokens than as part of the whole.
    fragments = [fragment for parts in cut if len(parts) > 1 for fragment in parts]
    again = iter(split_texts(tokenizer, fragments, room))
    return [
        [part for _ in parts for part in next(again)] if len(parts) > 1 else parts for parts in cut
    ]


def cut_text(text: str, stops: Sequence[int], room: int) -> list[str]:
    """Cut after the last line that fits, within a line only where none does.

    `stops` holds the character offset at which each token of the text ends.
    """
    fragments, start, first = [], 0, 0
    while len(stops) - first > room:
        limit = stops[first + room - 1]
        if stops[first + room] == limit:  # the tokens of one character go together
            limit -= 1
        stop = text.rfind("\n", start, limit) + 1 or limit
        assert stop > start, f"a character takes more than {room} tokens"
        fragments.append(text[start:stop])
        start, first = stop, bisect_right(stops, stop)
    return [*fragments, text[start:]]
