"""Pieces become token ids and labels; the `tokenize` stage.

Invariant: control tokens come from control pieces only. Text is encoded with the parsing of special
tokens switched off, so that `<|assistant|>` written by a user stays text. Labels equal the ids
where a piece is trained and are IGNORE_INDEX elsewhere.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows
from pipelines.render.drops import Drops
from pipelines.render.pieces import IGNORE_INDEX, Piece, read_pieces
from pipelines.render.truncation import choose_windows, count_turns, window_pieces

DEPENDS = ("tokenizers", "pyarrow")

CHARACTERS_PER_BATCH = 1_000_000

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("fim", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("labels", pa.list_(pa.int32()), nullable=False),
    ]
)

T = TypeVar("T")


class Example(NamedTuple):
    """Token ids and labels of one rendered row, of equal length, not yet shifted."""

    input_ids: list[int]
    labels: list[int]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json` so that content can never become a control token.

    Raises TemplateError where there is no readable one.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TemplateError(
            f"{path}: not a readable tokenizer ({error}); save it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def control_ids(tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, int]:
    """Return {name: id}; TemplateError for one that is missing or that plain text can produce."""
    found = {}
    for name in names:
        index = tokenizer.token_to_id(name)
        if index is None:
            raise TemplateError(
                f"the tokenizer has no control token {name!r}; use the tokenizer stage's folder "
                "of this recipe, or add the token to the tokenizer"
            )
        if index in tokenizer.encode(name, add_special_tokens=False).ids:
            raise TemplateError(
                f"{name!r} is an ordinary token of this tokenizer, so text could forge it; "
                "make it a special token (AddedToken with special=True)"
            )
        found[name] = index
    return found


def encode_rows(tokenizer: Tokenizer, rows: Sequence[Sequence[Piece]]) -> list[Example]:
    """Encode many rows at once, each piece by itself; raises TemplateError as control_ids."""
    assert tokenizer.encode_special_tokens, "load the tokenizer with load_tokenizer"
    names = {piece.control for row in rows for piece in row if piece.control is not None}
    controls = control_ids(tokenizer, sorted(names))
    texts = [piece.text for row in rows for piece in row if piece.text is not None]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    examples = []
    for row in rows:
        example = Example([], [])
        for piece in row:
            ids = [controls[piece.control]] if piece.control is not None else next(encodings).ids
            example.input_ids.extend(ids)
            example.labels.extend(ids if piece.trained else [IGNORE_INDEX] * len(ids))
        examples.append(example)
    return examples


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> Example:
    """Return (input_ids, labels) of one row."""
    return encode_rows(tokenizer, [pieces])[0]


def encode_prompt(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[int]:
    """Return the ids of a prompt: a prefix of the ids of its training row."""
    return encode_pieces(tokenizer, pieces).input_ids


def in_batches(rows: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield lists of rows of about CHARACTERS_PER_BATCH, which bounds the memory of encoding."""
    batch: list[T] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += characters(row)
        if size >= CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def params(recipe: Recipe) -> dict[str, Any]:
    """Return what the token ids depend on beyond the pieces and the tokenizer."""
    settings = recipe.tokenization
    return {"block_size": settings.block_size, "truncation": settings.truncation}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Encode every shard of pieces; rows too long are shortened or dropped, as the recipe says."""
    arguments = {**params(recipe), "tokenizer": str(inputs["tokenizer"].folder)}
    jobs = [Job(shard.file, (path,), shard.split) for shard, path in inputs["format"].paths()]
    shards = work.map(encode_shard, jobs, arguments)
    dropped = sum((report.counts for report in shards), Counts()).dropped
    formatted = {name: inputs["format"].report[name] for name in ("splits", "dropped")}
    report = {"sources": _by_source(shards), "dropped": dropped, "format": formatted}
    return Built(shards, {**report, "shortened": _sum_shortened(shards)})


def encode_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Encode one Parquet shard of pieces into one of examples."""
    tokenizer = load_tokenizer(Path(params["tokenizer"]))
    drops, sources, shortened = Drops(), dict[str, Counter[str]](), Counter[str]()
    counts = Counts()
    with pq.ParquetWriter(
        output, EXAMPLE_SCHEMA, compression="zstd", compression_level=1, write_page_checksum=True
    ) as writer:
        for batch in in_batches(read_rows(inputs[0]), _characters):
            rows = [read_pieces(row["pieces"]) for row in batch]
            kept, used = [], 0
            for row, pieces, example in zip(batch, rows, encode_rows(tokenizer, rows), strict=True):
                fitting = [(pieces, example)]
                if len(example.input_ids) > params["block_size"]:
                    fitting = shorten(tokenizer, row, pieces, params, shortened)
                if not fitting or not _trains(example):
                    drops.add(row["record_id"], *_reason(example, params["block_size"]))
                    continue
                used += 1
                for pair in fitting:
                    _count(sources.setdefault(row["source"], Counter()), *pair)
                    names = ("record_id", "source", "fim")
                    kept.append({**{name: row[name] for name in names}, **pair[1]._asdict()})
            writer.write_table(pa.Table.from_pylist(kept, schema=EXAMPLE_SCHEMA))
            counts += Counts(rows_in=len(batch), rows_out=len(kept), used=used)
    return Outcome(
        counts=replace(counts, dropped=dict(drops.counts)),
        tokens=sum(source["tokens"] for source in sources.values()),
        trained_tokens=sum(source["trained_tokens"] for source in sources.values()),
        rejects=tuple(drops.samples),
        extra={
            "sources": {name: dict(counted) for name, counted in sorted(sources.items())},
            "shortened": dict(shortened),
        },
    )


def _characters(row: Row) -> int:
    return sum(len(piece["text"] or "") for piece in row["pieces"])


def shorten(
    tokenizer: Tokenizer,
    row: Row,
    pieces: Sequence[Piece],
    params: Params,
    shortened: Counter[str],
) -> list[tuple[list[Piece], Example]]:
    """Return the rows that a row too long for a block is trained as; [] to drop it. Counts them."""
    if params["truncation"] == "drop" or not row["parts"]:
        return []
    parts = [pieces[start:stop] for start, stop in pairwise([0, *accumulate(row["parts"])])]
    lengths = [len(example.input_ids) for example in encode_rows(tokenizer, parts)]
    trained = [any(piece.trained for piece in part) for part in parts]
    windows = choose_windows(lengths, trained, params["block_size"], params["truncation"])
    if windows:
        shortened.update(count_turns(windows, trained))
    rows = [window_pieces(parts, window) for window in windows]
    return list(zip(rows, encode_rows(tokenizer, rows), strict=True))


def _trains(example: Example) -> bool:
    # A document's first token is never predicted, so its label alone trains nothing.
    return any(label != IGNORE_INDEX for label in example.labels[1:])


def _reason(example: Example, block_size: int) -> tuple[str, str]:
    """Return why no row is made of an example, and the details."""
    length = len(example.input_ids)
    if length > block_size:
        return "too_long", f"{length} tokens, block_size {block_size}"
    return "nothing_trained", f"none of {length} tokens is predicted"


def _count(source: Counter[str], pieces: Sequence[Piece], example: Example) -> None:
    source["examples"] += 1
    source["tokens"] += len(example.input_ids)
    source["trained_tokens"] += sum(label != IGNORE_INDEX for label in example.labels)
    source["characters"] += sum(len(piece.text) for piece in pieces if piece.text is not None)


def _by_source(shards: Iterable[ShardReport]) -> dict[str, dict[str, dict[str, int]]]:
    """Return {source: {split: sums}} over the shards."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for report in shards:
        for source, counted in report.extra["sources"].items():
            splits = found.setdefault(source, {})
            splits.setdefault(report.shard.split, Counter()).update(counted)
    return {
        source: {split: dict(counted) for split, counted in splits.items()}
        for source, splits in sorted(found.items())
    }


def _sum_shortened(shards: Iterable[ShardReport]) -> dict[str, int]:
    """Return how many dialogues were shortened, to how many rows, and turns kept and dropped."""
    total: Counter[str] = Counter()
    for report in shards:
        total.update(report.extra["shortened"])
    return dict(sorted(total.items()))
