"""Pieces become token ids and labels; the `tokenize` stage.

Invariant: control tokens come from control pieces only. Text is encoded with the parsing of special
tokens switched off, so that `<|assistant|>` written by a user stays text. Labels equal the ids
where a piece is trained and are IGNORE_INDEX elsewhere.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from pipelines.engine import Built, Input, Job, Outcome, Params, ShardReport, Work
from pipelines.errors import TemplateError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.records import Row
from pipelines.render.arrow_files import open_writer, read_batches
from pipelines.render.drops import Drops
from pipelines.render.fim import is_permuted
from pipelines.render.piece_columns import Tokens, control_names, encode_column
from pipelines.render.pieces import IGNORE_INDEX, Piece, read_pieces
from pipelines.render.splits import is_extra
from pipelines.render.text_encoder import (
    SAMPLED_ROWS,
    SAMPLED_SHARDS,
    TextEncoder,
    choose_fast,
    open_encoder,
)
from pipelines.render.token_fim import TokenRules, choose_token_rules, permute_rows
from pipelines.render.truncation import choose_windows, count_turns, window_pieces
from pipelines.settings.fim import Fim

DEPENDS = ("tokenizers", "pyarrow")

# The largest vocabulary whose ids fit in uint16.
UINT16_IDS = 65_536

EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("record_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("fim", pa.string(), nullable=False),
        # The further records of an example: files of one repository.
        pa.field("joined", pa.list_(pa.string())),
        pa.field("input_ids", pa.list_(pa.uint16()), nullable=False),
        # Which tokens are labels, too.
        pa.field("trained", pa.list_(pa.bool_()), nullable=False),
    ]
)
WIDE_SCHEMA = EXAMPLE_SCHEMA.set(4, pa.field("input_ids", pa.list_(pa.int32()), nullable=False))

# What an example keeps of its row.
NAMES = ("record_id", "source", "fim", "joined")

Array = np.ndarray[Any, np.dtype[Any]]

_threads = threading.local()


class Example(NamedTuple):
    """Token ids and labels of one rendered row, of equal length, not yet shifted."""

    input_ids: list[int]
    labels: list[int]


@dataclass(slots=True)
class _Shard:
    """One shard in the making, and what is counted on the way."""

    params: Params
    tokenizer: Tokenizer
    encoder: TextEncoder
    token_rules: TokenRules | None
    controls: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    drops: Drops = field(default_factory=Drops)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    shortened: Counter[str] = field(default_factory=Counter)

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of its examples."""
        wide = self.tokenizer.get_vocab_size(with_added_tokens=True) > UINT16_IDS
        return WIDE_SCHEMA if wide else EXAMPLE_SCHEMA


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


def params(recipe: Recipe) -> dict[str, Any]:
    """Return what the token ids depend on beyond the pieces and the tokenizer."""
    settings, fim = recipe.tokenization, recipe.fim
    between_tokens = fim.level == "token" and is_permuted(fim)
    return {
        "block_size": settings.block_size,
        "truncation": settings.truncation,
        "token_fim": fim.model_dump() if between_tokens else None,
    }


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Encode every shard of pieces; rows too long are shortened or dropped, as the recipe says."""
    folder = inputs["tokenizer"].folder
    paths = inputs["format"].paths()
    fast = prove_fast(folder, _sample([path for _, path in paths]))
    arguments = {**params(recipe), "tokenizer": str(folder), "fast": fast}
    jobs = [Job(shard.file, (path,), shard.split) for shard, path in paths]
    shards = work.map(encode_shard, jobs, arguments)
    counts = sum((r.counts for r in shards if not is_extra(r.shard.split)), Counts())
    formatted = {name: inputs["format"].report[name] for name in ("splits", "dropped")}
    report = {"sources": _by_source(shards), "dropped": counts.dropped, "format": formatted}
    return Built(shards, {**report, "shortened": _sum_shortened(shards)}, counts)


def encode_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Encode one Parquet shard of pieces into one of examples."""
    tokenizer, encoder = open_tokenizer(Path(params["tokenizer"]), fast=params["fast"])
    settings = Fim(**params["token_fim"]) if params["token_fim"] else None
    rules = choose_token_rules(tokenizer, settings) if settings else None
    shard = _Shard(params, tokenizer, encoder, rules)
    with open_writer(output, shard.schema) as writer:
        for batch in read_batches(inputs[0]):
            writer.write_table(_encode_batch(batch, shard))
    return Outcome(
        counts=replace(shard.counts, dropped=dict(shard.drops.counts)),
        tokens=sum(source["tokens"] for source in shard.sources.values()),
        trained_tokens=sum(source["trained_tokens"] for source in shard.sources.values()),
        rejects=tuple(shard.drops.samples),
        extra={
            "sources": {name: dict(sums) for name, sums in sorted(shard.sources.items())},
            "shortened": dict(shard.shortened),
        },
    )


class _Opened:
    """A folder's tokenizer with its encoders, each made when it is asked for."""

    def __init__(self, folder: Path, cause: tuple[Any, ...]) -> None:
        self.cause = cause
        self.tokenizer = load_tokenizer(folder)
        self._encoders: dict[bool, TextEncoder] = {}

    def encoder(self, *, fast: bool) -> TextEncoder:
        if fast not in self._encoders:
            self._encoders[fast] = open_encoder(self.tokenizer, fast=fast)
        return self._encoders[fast]


def _open(folder: Path) -> _Opened:
    """Return what this thread had opened last, if that is this folder's tokenizer as it is now.

    Loading takes longer than a small shard, and the fast encoder gets faster with what it has met.
    """
    stat = (folder / "tokenizer.json").stat()
    cause = (str(folder), stat.st_mtime_ns, stat.st_size)
    opened: _Opened | None = getattr(_threads, "opened", None)
    if opened is None or opened.cause != cause:
        opened = _threads.opened = _Opened(folder, cause)
    return opened


def open_tokenizer(folder: Path, *, fast: bool) -> tuple[Tokenizer, TextEncoder]:
    """Return a folder's tokenizer and its encoder, which this thread keeps for the next shard."""
    opened = _open(folder)
    return opened.tokenizer, opened.encoder(fast=fast)


def prove_fast(folder: Path, texts: Iterable[str]) -> bool:
    """Say whether the fast encoder may be used for texts like these; see `choose_fast`."""
    opened = _open(folder)
    return choose_fast(opened.tokenizer, texts, lambda: opened.encoder(fast=True))


def _sample(paths: Sequence[Path]) -> Iterator[str]:
    """Yield texts of at most SAMPLED_SHARDS shards, a few rows of each."""
    for path in paths[:: max(1, len(paths) // SAMPLED_SHARDS)]:
        for batch in islice(read_batches(path), 1):
            for row in batch["pieces"].slice(0, SAMPLED_ROWS).to_pylist():
                yield from (piece["text"] for piece in row if piece["text"])


def _encode_batch(batch: pa.RecordBatch, shard: _Shard) -> pa.Table:
    """Return the examples of a batch of rows; counts what is kept and what is left out."""
    pieces = batch["pieces"]
    new = [name for name in control_names(pieces) if name not in shard.controls]
    shard.controls |= control_ids(shard.tokenizer, new)
    tokens = encode_column(pieces, shard.encoder, shard.controls)
    if batch["cuts"].null_count < batch.num_rows:
        assert shard.token_rules, "only the recipe's own settings cut between tokens"
        orders, cuts = batch["fim"].to_pylist(), batch["cuts"].to_pylist()
        tokens = permute_rows(tokens, orders, cuts, shard.token_rules)
    kept = (tokens.lengths <= shard.params["block_size"]) & (tokens.num_predicted > 0)
    short: list[tuple[int, Row]] = []
    for number in np.flatnonzero(~kept).tolist():
        row = batch.slice(number, 1).to_pylist()[0]
        made = _make_fit(row, int(tokens.lengths[number]), shard)
        short += [(number, example) for example in made]
    _count_batch(batch, tokens, kept, shard.sources)
    columns = [batch[name].filter(pa.array(kept)) for name in NAMES]
    lists = tokens.take(kept, shard.schema.field("input_ids").type.value_type)
    table = pa.Table.from_arrays([*columns, *lists], schema=shard.schema)
    if short:
        rows = pa.Table.from_pylist([row for _, row in short], schema=shard.schema)
        places = [*np.flatnonzero(kept).tolist(), *(number for number, _ in short)]
        table = pa.concat_tables([table, rows]).take(np.argsort(places, kind="stable"))
    used = int(kept.sum()) + len({number for number, _ in short})
    shard.counts += Counts(rows_in=batch.num_rows, rows_out=table.num_rows, used=used)
    return table


def _make_fit(row: Row, length: int, shard: _Shard) -> list[Row]:
    """Return the examples of a row that is too long or trains nothing; counts a dropped one."""
    if length <= shard.params["block_size"]:
        shard.drops.add(
            row["record_id"], "nothing_trained", f"none of {length} tokens is predicted"
        )
        return []
    pieces = read_pieces(row["pieces"])
    made = shorten(shard.tokenizer, row, pieces, shard.params, shard.shortened)
    if not made:
        limit = shard.params["block_size"]
        shard.drops.add(row["record_id"], "too_long", f"{length} tokens, block_size {limit}")
    for pair in made:
        _count(shard.sources.setdefault(row["source"], Counter()), *pair)
    return [
        {
            **{name: row[name] for name in NAMES},
            "input_ids": example.input_ids,
            "trained": [label != IGNORE_INDEX for label in example.labels],
        }
        for _, example in made
    ]


def _count_batch(
    batch: pa.RecordBatch, tokens: Tokens, kept: Array, sources: dict[str, Counter[str]]
) -> None:
    """Add the kept rows of a batch to the sums of their sources."""
    coded = batch["source"].dictionary_encode()
    codes = coded.indices.to_numpy()
    texts = pc.struct_field(batch["pieces"].flatten(), "text")
    characters = np.concatenate([[0], np.cumsum(pc.fill_null(pc.utf8_length(texts), 0))])
    borders = batch["pieces"].offsets.to_numpy()
    columns = {
        "examples": np.ones(batch.num_rows, np.int64),
        "tokens": tokens.lengths,
        "trained_tokens": tokens.num_trained,
        "characters": np.diff(characters[borders - borders[0]]),
    }
    for code, source in enumerate(coded.dictionary.to_pylist()):
        chosen = kept & (codes == code)
        if chosen.any():
            sums = {name: int(values[chosen].sum()) for name, values in columns.items()}
            sources.setdefault(source, Counter()).update(sums)


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
