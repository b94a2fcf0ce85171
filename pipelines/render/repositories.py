"""Code in repository order: the files of one repository stand one behind the other in an example.

An example reads `<repo_name>` name `<file_sep>` file `<file_sep>` file ..., in the order of the
paths. Each file is cut and permuted as it is alone; the separator behind a file stands in the place
of the token that ends it, and is trained as that is. Invariant: each fragment is in one example, at
its file's place, and an example fits a block. Files are joined within a shard of a split.
Source of the form: Lozhkov et al., "StarCoder 2 and The Stack v2" (2024).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tokenizers import Tokenizer

from pipelines.errors import TemplateError
from pipelines.records import Row
from pipelines.render.pieces import Piece, content, control

REPOSITORY = "repository"


class Separators(NamedTuple):
    """What stands before a repository's name and before each file."""

    repository: str
    file: str


STARCODER2 = Separators("<repo_name>", "<file_sep>")
FORMS = (STARCODER2, Separators("<|repo_name|>", "<|file_sep|>"))


class Place(NamedTuple):
    """Where a file belongs: copies of a record stand in a series of their own."""

    source: str
    repository: str
    copy: int
    path: str


def find_separators(tokenizer: Tokenizer) -> Separators:
    """Return the separators that the tokenizer has; TemplateError naming what is missing."""
    for form in FORMS:
        if all(tokenizer.token_to_id(name) is not None for name in form):
            return form
    closest = min(FORMS, key=lambda form: sum(tokenizer.token_to_id(n) is None for n in form))
    missing = [repr(name) for name in closest if tokenizer.token_to_id(name) is None]
    raise TemplateError(
        f"the tokenizer has no {', '.join(missing)}, which files of a repository are joined with; "
        "use a tokenizer that has them (StarCoder2's, Qwen2.5-Coder's), add them to it as special "
        "tokens, or set fim.repository_order: false"
    )


def find_place(record: Row) -> Place:
    """Return where a file belongs; one whose repository is not named belongs to its source."""
    meta = json.loads(record["meta"] or "{}")
    name, path = meta.get("repository") or "", meta.get("path") or record["id"]
    return Place(record["source"], str(name), int(meta.get("copy") or 0), str(path))


def cut_series(places: Sequence[Place], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield the numbers of files in order, whole repositories at a time, up to about a size."""
    ordered = sorted(range(len(places)), key=lambda number: (places[number], number))
    chosen: list[int] = []
    for _, series in groupby(ordered, key=lambda number: places[number][:3]):
        chosen += series
        if sum(sizes[number] for number in chosen) >= limit:
            yield chosen
            chosen = []
    if chosen:
        yield chosen


def join_files(
    rows: Sequence[Row],
    places: Sequence[Place],
    separators: Separators,
    block_size: int,
    count_tokens: Callable[[Sequence[Sequence[Piece]]], list[int]],
) -> Iterator[Row]:
    """Yield examples of the fragments of files, which come in order, each with its file's place."""
    heads = {place[:3]: _head(place, separators) for place in places}
    sizes = dict(zip(heads, count_tokens(list(heads.values())), strict=True))
    lengths = count_tokens([row["pieces"] for row in rows])
    joined: list[Row] = []
    room, last, has_head = 0, places[0][:3] if places else ("", "", 0), False
    for row, place, length in zip(rows, places, lengths, strict=True):
        if joined and (place[:3] != last or row["part"] > 0 or length > room):
            yield _join(joined, heads[last] if has_head else [], separators)
            joined = []
        if not joined:
            last = place[:3]
            # What goes on within a file has no head, nor has what leaves none room.
            has_head = row["part"] == 0 and sizes[last] + length <= block_size
            room = block_size - has_head * sizes[last]
        joined.append(row)
        room -= length
    if joined:
        yield _join(joined, heads[last] if has_head else [], separators)


def _head(place: Place, separators: Separators) -> list[Piece]:
    name = [control(separators.repository), *content(place.repository, trained=False)]
    return [*(name if place.repository else []), control(separators.file)]


def _join(rows: Sequence[Row], head: Sequence[Piece], separators: Separators) -> Row:
    pieces = [*head, *rows[0]["pieces"]]
    for row in rows[1:]:
        pieces[-1] = control(separators.file, trained=pieces[-1].trained)
        pieces += row["pieces"]
    ids = list(dict.fromkeys(row["record_id"] for row in rows))
    order = rows[0]["fim"] if len(rows) == 1 else REPOSITORY
    return {**rows[0], "pieces": pieces, "fim": order, "joined": ids[1:] or None}
