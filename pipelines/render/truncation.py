"""Dialogues longer than a block are shortened at the borders of questions, or not trained at all.

Invariant: what is kept begins with the dialogue's head (its system turn), holds whole questions
with their answers only, fits the block and trains something; an end token is never cut.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pipelines.render.pieces import Piece

Policy = Literal["drop", "keep-last-turns", "split-windows"]


class Window(NamedTuple):
    """The parts in a row: the head (0), and from `first` to before `stop`.

    The first `context` of them are read only: another row trains them.
    """

    first: int
    stop: int
    context: int = 0


def choose_windows(
    lengths: Sequence[int], trained: Sequence[bool], block_size: int, policy: Policy
) -> list[Window]:
    """Return the windows of a dialogue too long for a block; [] where it has to be dropped.

    `lengths` are the tokens of its parts, the head first; `trained` says which parts train any.
    """
    room = block_size - lengths[0]
    stop = len(lengths)
    while stop > 1 and not trained[stop - 1]:
        stop -= 1  # nothing behind the last trained answer is of use
    if policy == "drop" or stop == 1:
        return []
    if policy == "keep-last-turns":
        first = _first_fitting(lengths, stop, room)
        return [Window(first, stop)] if first < stop else []
    return _split(lengths, trained, stop, room)


def window_pieces(parts: Sequence[Sequence[Piece]], window: Window) -> list[Piece]:
    """Return the row of a window: head, what is read only, what is trained."""
    own = window.first + window.context
    context = (piece for part in parts[window.first : own] for piece in part)
    return [
        *parts[0],
        *(piece._replace(trained=False) for piece in context),
        *(piece for part in parts[own : window.stop] for piece in part),
    ]


def count_turns(windows: Sequence[Window], trained: Sequence[bool]) -> dict[str, int]:
    """Return how many rows there are, and how many trained parts they hold and leave out."""
    kept = {n for w in windows for n in range(w.first + w.context, w.stop)}
    wanted = [number for number in range(1, len(trained)) if trained[number]]
    found = sum(number in kept for number in wanted)
    return {
        "dialogues": 1,
        "rows": len(windows),
        "turns_kept": found,
        "turns_dropped": len(wanted) - found,
    }


def _first_fitting(lengths: Sequence[int], stop: int, room: int) -> int:
    """Return the first of the last parts before `stop` that fit together; `stop` if none does."""
    first = stop
    while first > 1 and lengths[first - 1] <= room:
        first -= 1
        room -= lengths[first]
    return first


def _split(lengths: Sequence[int], trained: Sequence[bool], stop: int, room: int) -> list[Window]:
    """Return windows that train every part once, except those that alone do not fit.

    The part before a window is repeated in it, to be read only, where it leaves room for the next.
    """
    windows = []
    first = 1
    while first < stop:
        if lengths[first] > room:
            first += 1
            continue
        context = int(first > 1 and lengths[first - 1] + lengths[first] <= room)
        end, left = first, room - context * lengths[first - 1]
        while end < stop and lengths[end] <= left:
            left -= lengths[end]
            end += 1
        if any(trained[first:end]):
            windows.append(Window(first - context, end, context))
        first = end
    return windows
