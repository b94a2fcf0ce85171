"""Records of code become rows: fragments that fit a block, some of them permuted."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.records import Row
from pipelines.render.drops import Drops
from pipelines.render.fim import LEFT_TO_RIGHT, ORDERS, Order, Rules, choose_rules
from pipelines.render.fragments import File, Fragment, Splitter
from pipelines.render.pieces import Piece
from pipelines.render.repositories import Place, Separators, join_files
from pipelines.render.sentinels import Sentinels
from pipelines.settings.fim import Fim


@dataclass(slots=True)
class CodeFormatter:
    """Renders code for one pass over the train split, or as a twin of one order.

    A twin holds every fragment in the one order, so that losses of orders can be compared; what is
    held out otherwise is left to right.
    """

    splitter: Splitter
    settings: Fim
    sentinels: Sentinels
    number: int = 0
    twin: Order | None = None
    orders: Counter[str] = field(default_factory=Counter)
    tally: Counter[str] = field(default_factory=Counter)

    def format(self, records: Sequence[Row], drops: Drops) -> list[list[Row]]:
        """Return the rows of each record of code, one for every fragment; none if dropped."""
        files = [File(_drawn_as(record), record["text"], self._rules(record)) for record in records]
        groups = self.splitter.split(files)
        return [
            self._format_file(record, fragments, drops)
            for record, fragments in zip(records, groups, strict=True)
        ]

    def join(
        self, rows: Sequence[Row], places: Sequence[Place], separators: Separators
    ) -> Iterator[Row]:
        """Yield the rows with files of one repository joined; see `join_files`."""
        splitter = self.splitter
        yield from join_files(rows, places, separators, splitter.block_size, splitter.count_tokens)

    def report(self) -> dict[str, Any]:
        """Return how files were cut and permuted."""
        return {
            "cut_files": self.tally["cut_files"],
            "fragments": self.tally["fragments"],
            "fim": {order: self.orders[order] for order in ORDERS},
            "fim_did_not_fit": self.tally["fim_did_not_fit"],
        }

    def _rules(self, record: Row) -> Rules:
        rules = choose_rules(self.settings, record["source"], self.number, self.sentinels)
        if self.twin is None:
            return rules
        return replace(rules, rate=1.0, spm_rate=float(self.twin == "spm"))

    def _format_file(self, record: Row, fragments: Sequence[Fragment], drops: Drops) -> list[Row]:
        if not record["text"].strip():
            drops.add(record["id"], "empty_text", "no code but blanks")
            return []
        if not fragments:
            drops.add(record["id"], "uncuttable", "no cut makes its parts fit a block")
        if self.twin == "none":
            fragments = [replace(f, draw=LEFT_TO_RIGHT, was_too_long=False) for f in fragments]
        self.tally["cut_files"] += len(fragments) > 1
        self.tally["fragments"] += len(fragments)
        for fragment in fragments:
            self.orders[fragment.draw.order] += 1
            self.tally["fim_did_not_fit"] += fragment.was_too_long
        return [
            make_row(record, part, fragment.draw.order, fragment.pieces, fragment.draw.cuts)
            for part, fragment in enumerate(fragments)
        ]


def make_row(
    record: Row,
    part: int,
    order: str,
    pieces: Sequence[Piece],
    cuts: tuple[float, float] | None = None,
) -> Row:
    """Return a row of pieces; `cuts` is for one permuted between tokens, once it has them."""
    return {
        "record_id": record["id"],
        "source": record["source"],
        "part": part,
        "fim": order,
        "pieces": pieces,
        "parts": None,
        "cuts": cuts,
        "joined": None,
    }


def _drawn_as(record: Row) -> str:
    """Return the name that decides how code is permuted: a copy of a record is drawn anew."""
    if '"copy":' not in (record["meta"] or ""):
        return str(record["id"])
    return f"{record['id']}#{json.loads(record['meta']).get('copy', 0)}"
