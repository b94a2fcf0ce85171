"""Code files become rows that fit a block: cut at line ends, each fragment with its own FIM draw.

Invariant: the fragments of a file join to the file, and each, rendered, is at most `block_size`
tokens long; a line is cut only where it alone is longer than a block.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from pipelines.recipe import Fim
from pipelines.render.encode import encode_rows
from pipelines.render.fim import LEFT_TO_RIGHT, SENTINELS, Draw, draw_fim, render_text
from pipelines.render.pieces import Piece

# A cut inside a word or a run of blanks costs a few tokens more than the whole text has.
FIM_MARGIN = 8
# By how much fragments get smaller where one, encoded by itself, takes more than inside its file.
STEP = 8


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of a file; `ends` says that the file ends with it.

    `was_too_long` marks a fragment that is left to right because it did not fit permuted.
    """

    text: str
    draw: Draw
    ends: bool
    was_too_long: bool = False

    @property
    def pieces(self) -> list[Piece]:
        """Return the fragment as it is trained on."""
        return render_text(self.text, self.draw, ends=self.ends)


File = tuple[str, str]  # record id, text


def split_files(
    tokenizer: Tokenizer, files: Sequence[File], block_size: int, fim: Fim
) -> list[list[Fragment]]:
    """Return the fragments of each file; none for one that cannot be cut to fit."""
    encodings = tokenizer.encode_batch([text for _, text in files], add_special_tokens=False)
    stops = [[stop for _, stop in encoding.offsets] for encoding in encodings]
    done: list[list[Fragment]] = [[] for _ in files]
    todo = list(range(len(files)))
    for spare in range(0, block_size // 2, STEP):
        groups = [_split(files[i], stops[i], block_size - spare, fim) for i in todo]
        fitting = iter(_fit(tokenizer, [f for group in groups for f in group], block_size))
        for i, group in zip(todo, groups, strict=True):
            done[i] = [fragment for _ in group if (fragment := next(fitting)) is not None]
            if len(done[i]) < len(group):
                done[i] = []
        todo = [i for i, group in zip(todo, groups, strict=True) if group and not done[i]]
    return done


def cut_text(text: str, stops: Sequence[int], room: Callable[[int], int]) -> list[str]:
    """Cut after the last line that fits, within a line only where none does.

    `stops` holds the character offset at which each token of the text ends; `room(part)` is the
    number of tokens the next fragment may have, at least those of a character.
    """
    fragments: list[str] = []
    start = first = 0
    while len(stops) - first > (tokens := room(len(fragments))):
        limit = stops[first + tokens - 1]
        if stops[first + tokens] == limit:  # the tokens of one character go together
            limit -= 1
        stop = text.rfind("\n", start, limit) + 1 or limit
        assert stop > start, f"a character takes more than {tokens} tokens"
        fragments.append(text[start:stop])
        start, first = stop, bisect_right(stops, stop)
    return [*fragments, text[start:]]


def _split(file: File, stops: Sequence[int], size: int, fim: Fim) -> list[Fragment]:
    """Cut one file into fragments of about `size` tokens once rendered."""
    record_id, text = file

    def draw(part: int, length: int) -> Draw:
        return draw_fim(
            record_id, part, length, rate=fim.fim_rate, spm_rate=fim.fim_spm_rate, seed=fim.seed
        )

    def room(part: int) -> int:
        permuted = draw(part, 0).order != "none"
        return size - 1 - permuted * (len(SENTINELS) + FIM_MARGIN)

    texts = cut_text(text, stops, room)
    return [
        Fragment(part, draw(number, len(part)), ends=number == len(texts) - 1)
        for number, part in enumerate(texts)
    ]


def _fit(
    tokenizer: Tokenizer, fragments: Sequence[Fragment], block_size: int
) -> list[Fragment | None]:
    """Return the fragments; one too long as drawn is left to right, and None if still too long."""
    rows = encode_rows(tokenizer, [fragment.pieces for fragment in fragments])
    fitting: list[Fragment | None] = list(fragments)
    for i, row in enumerate(rows):
        if len(row.input_ids) > block_size:
            straight = replace(fragments[i], draw=LEFT_TO_RIGHT, was_too_long=True)
            (again,) = encode_rows(tokenizer, [straight.pieces])
            fitting[i] = straight if len(again.input_ids) <= block_size else None
    return fitting
