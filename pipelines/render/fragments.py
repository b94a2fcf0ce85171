"""Code files become rows that fit a block: cut at line ends, each fragment with its own FIM draw.

Invariant: the fragments of a file join to the file, and each, rendered, is at most `block_size`
tokens long; a line is cut only where it alone is longer than a block.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from pipelines.render.fim import LEFT_TO_RIGHT, Draw, Rules, draw_fim, draw_order, render_text
from pipelines.render.pieces import Piece
from pipelines.render.text_encoder import TextEncoder, join_texts
from pipelines.render.token_ends import find_ends, token_sizes

Array = np.ndarray[Any, np.dtype[Any]]

NUM_SENTINELS = 3
# A cut inside a word or a run of blanks costs a few tokens more than the whole text has.
FIM_MARGIN = 8
# By how much fragments get smaller where one, encoded by itself, takes more than inside its file.
STEP = 8


class File(NamedTuple):
    """A file of code: the name its draws depend on, its text, and how it is permuted."""

    name: str
    text: str
    rules: Rules


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of a file; `ends` says that the file ends with it.

    `was_too_long` marks a fragment that is left to right because it did not fit permuted.
    """

    text: str
    draw: Draw
    ends: bool
    rules: Rules
    was_too_long: bool = False

    @property
    def pieces(self) -> list[Piece]:
        """Return the fragment as it is trained on, or as `permute_tokens` gets it."""
        return render_text(self.text, self.draw, ends=self.ends, rules=self.rules)

    @property
    def num_added(self) -> int:
        """Return how many tokens are added to it after its pieces are encoded."""
        return NUM_SENTINELS * (self.draw.cuts is not None)


class Splitter:
    """Cuts files into fragments with one tokenizer and one block size."""

    def __init__(self, tokenizer: Tokenizer, encoder: TextEncoder, block_size: int) -> None:
        """Keep what tokens are counted with."""
        self._tokenizer = tokenizer
        self._encoder = encoder
        self.block_size = block_size

    def split(self, files: Sequence[File]) -> list[list[Fragment]]:
        """Return the fragments of each file; none for one that cannot be cut to fit."""
        if not files:
            return []
        ends = self._token_ends([file.text for file in files])
        done: list[list[Fragment]] = [[] for _ in files]
        todo = list(range(len(files)))
        for spare in range(0, self.block_size // 2, STEP):
            groups = [_split(files[i], ends[i], self.block_size - spare) for i in todo]
            whole = [
                len(group) == 1 and group[0].draw.order == "none" and not spare for group in groups
            ]
            fitting = iter(
                self._fit([f for g, fits in zip(groups, whole, strict=True) if not fits for f in g])
            )
            for i, group, fits in zip(todo, groups, whole, strict=True):
                found = group if fits else [next(fitting) for _ in group]
                done[i] = [fragment for fragment in found if fragment is not None]
                if len(done[i]) < len(group):
                    done[i] = []
            todo = [i for i, group in zip(todo, groups, strict=True) if group and not done[i]]
            if not todo:
                break
        return done

    def count_tokens(self, rows: Sequence[Sequence[Piece]]) -> list[int]:
        """Return the number of tokens of each row of pieces."""
        texts = [piece.text for row in rows for piece in row if piece.text is not None]
        _, counts = self._encoder.encode_spans(*join_texts(texts))
        sizes = iter(counts.tolist())
        return [sum(1 if piece.text is None else next(sizes) for piece in row) for row in rows]

    def _fit(self, fragments: Sequence[Fragment]) -> list[Fragment | None]:
        """Return the fragments; one too long as drawn is left to right, None if still too long."""
        counts = self.count_tokens([fragment.pieces for fragment in fragments])
        fitting: list[Fragment | None] = list(fragments)
        for i, (fragment, count) in enumerate(zip(fragments, counts, strict=True)):
            if count + fragment.num_added > self.block_size:
                straight = replace(fragment, draw=LEFT_TO_RIGHT, was_too_long=True)
                (again,) = self.count_tokens([straight.pieces])
                fitting[i] = straight if again <= self.block_size else None
        return fitting

    def _token_ends(self, texts: Sequence[str]) -> list[Array]:
        """Return for each text the character offset at which each of its tokens ends."""
        data, offsets = join_texts(texts)
        ids, counts = self._encoder.encode_spans(data, offsets)
        found = find_ends(data, offsets, ids, counts, token_sizes(self._tokenizer))
        if found is not None:
            return found
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array([stop for _, stop in e.offsets], np.int64) for e in encodings]


def cut_text(text: str, stops: Sequence[int] | Array, room: Callable[[int], int]) -> list[str]:
    """Cut after the last line that fits, within a line only where none does.

    `stops` holds the character offset at which each token of the text ends; `room(part)` is the
    number of tokens the next fragment may have, at least those of a character.
    """
    fragments: list[str] = []
    start = first = 0
    while len(stops) - first > (tokens := room(len(fragments))):
        limit = int(stops[first + tokens - 1])
        if stops[first + tokens] == limit:  # the tokens of one character go together
            limit -= 1
        stop = text.rfind("\n", start, limit) + 1 or limit
        assert stop > start, f"a character takes more than {tokens} tokens"
        fragments.append(text[start:stop])
        start, first = stop, bisect_right(stops, stop)
    return [*fragments, text[start:]]


def _split(file: File, ends: Array, size: int) -> list[Fragment]:
    """Cut one file into fragments of about `size` tokens once rendered."""

    def room(part: int) -> int:
        permuted = draw_order(file.name, part, file.rules) != "none"
        return size - 1 - permuted * (NUM_SENTINELS + FIM_MARGIN)

    texts = cut_text(file.text, ends, room)
    return [
        Fragment(
            part,
            draw_fim(file.name, number, part, file.rules),
            ends=number == len(texts) - 1,
            rules=file.rules,
        )
        for number, part in enumerate(texts)
    ]
