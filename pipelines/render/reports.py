"""The token report and the mask audit: what a person checks before paying for a training run.

Both are plain data, the same for the same dataset; the `show_` functions turn them into Markdown.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipelines.render.pieces import IGNORE_INDEX

NUM_AUDITED = 5
# Longer examples are audited only where there is no shorter one.
READABLE_TOKENS = 256
BAR = 40
FENCE = "~~~~~~"

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]


def report_tokens(
    tokenized: Mapping[str, Any],
    lengths: Mapping[str, Sequence[int] | Array],
    rows: Mapping[str, int],
    block_size: int,
) -> Json:
    """Return the token report from the tokenize stage's report, example lengths and row counts.

    {"block_size", "splits": {split: sums, shares, "rows", "fill", "lengths": [[at most, count]]},
    "sources": {source: {split: sums, shares}}, "dropped": {reason: records}, "shortened": {of
    dialogues, rows, turns: number}, "files": {split: how files were cut and permuted}}; `fill` is
    the share of the rows' tokens that are not empty.
    """
    splits = {}
    for split, counted in lengths.items():
        sums: Counter[str] = Counter()
        for source in tokenized["sources"].values():
            sums.update(source.get(split, {}))
        splits[split] = {
            **_with_shares(sums),
            "rows": rows[split],
            "fill": _ratio(int(np.sum(counted)), rows[split] * block_size),
            "lengths": _histogram(counted),
        }
    dropped = Counter(tokenized["format"]["dropped"]) + Counter(tokenized["dropped"])
    return {
        "block_size": block_size,
        "splits": splits,
        "sources": {
            name: {split: _with_shares(sums) for split, sums in found.items()}
            for name, found in tokenized["sources"].items()
        },
        "dropped": dict(sorted(dropped.items())),
        "shortened": dict(tokenized.get("shortened", {})),
        "files": tokenized["format"]["splits"],
    }


def choose_audited(
    record_ids: Sequence[str],
    sources: Sequence[str],
    orders: Sequence[str],
    lengths: Sequence[int],
) -> list[int]:
    """Return at most NUM_AUDITED example numbers: one of each source and order, then others.

    Short ones come first; among these the choice is a hash of the record id.
    """
    digests = [hashlib.sha256(record_id.encode()).digest() for record_id in record_ids]
    ranks = [
        (length > READABLE_TOKENS, digest) for length, digest in zip(lengths, digests, strict=True)
    ]
    of_kind: dict[tuple[str, str], list[int]] = {}
    for i, kind in enumerate(zip(sources, orders, strict=True)):
        of_kind.setdefault(kind, []).append(i)
    chosen = [min(of_kind[kind], key=ranks.__getitem__) for kind in sorted(of_kind)][:NUM_AUDITED]
    first = heapq.nsmallest(2 * NUM_AUDITED, range(len(lengths)), key=ranks.__getitem__)
    others = [i for i in first if i not in chosen]
    return [*chosen, *others[: NUM_AUDITED - len(chosen)]]


def audit_mask(
    tokenizer: Tokenizer, record_id: str, input_ids: Sequence[int], labels: Sequence[int]
) -> Json:
    """Return {"record_id", "segments": [{"text", "trained"}]}: decoded runs of equal mask."""
    segments = []
    start = 0
    for trained, run in groupby(label != IGNORE_INDEX for label in labels):
        stop = start + sum(1 for _ in run)
        text = tokenizer.decode(list(input_ids[start:stop]), skip_special_tokens=False)
        segments.append({"text": text, "trained": trained})
        start = stop
    return {"record_id": record_id, "segments": segments}


def show_audit(audit: Sequence[Json]) -> str:
    """Return the audited examples as Markdown: lines with "+" are trained on, others only read."""
    parts = []
    for example in audit:
        lines = []
        for segment in example["segments"]:
            mark = "+" if segment["trained"] else " "
            text = segment["text"].removesuffix("\n")
            lines += [f"{mark} {line}" for line in text.split("\n")]
        body = "\n".join(lines)
        parts.append(f"`{example['record_id']}`\n\n{FENCE}diff\n{body}\n{FENCE}\n")
    return "\n".join(parts)


def show_tokens(report: Mapping[str, Any]) -> str:
    """Return the token report as Markdown."""
    head = ("split", "examples", "tokens", "trained", "characters/token", "rows", "fill")
    lines = [_line(head), _line(["---"] * len(head))]
    for split, sums in report["splits"].items():
        lines.append(_line([split, *_cells(sums), f"{sums['rows']:,}", f"{sums['fill']:.2%}"]))
    lines += ["", _line(["source", *head[:5]]), _line(["---"] * 6)]
    for source, found in report["sources"].items():
        lines += [_line([source, split, *_cells(sums)]) for split, sums in found.items()]
    lengths = report["splits"]["train"]["lengths"]
    most = max((count for _, count in lengths), default=1)
    lines += ["", "Tokens of a training example:", "", FENCE]
    for limit, count in lengths:
        lines.append(f"<= {limit:>6,} {'#' * round(BAR * count / most):<{BAR}} {count:,}")
    lines += [FENCE, "", f"Dropped: {_counts(report['dropped'])}."]
    if found := report["shortened"]:
        lines.append(
            f"\nShortened: {found['dialogues']:,} dialogues to {found['rows']:,} rows, "
            f"{found['turns_kept']:,} answers kept, {found['turns_dropped']:,} left out."
        )
    for split, files in report["files"].items():
        if files["fragments"]:
            lines.append(
                f"\nCode in {split}: {files['cut_files']:,} files cut, {files['fragments']:,} "
                f"fragments, {_counts(files['fim'])}."
            )
    return "\n".join(lines) + "\n"


def _with_shares(sums: Mapping[str, int]) -> Json:
    names = ("examples", "tokens", "trained_tokens", "characters")
    total = {name: sums.get(name, 0) for name in names}
    return {
        **total,
        "trained_share": _ratio(total["trained_tokens"], total["tokens"]),
        "characters_per_token": _ratio(total["characters"], total["tokens"]),
    }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _histogram(lengths: Sequence[int] | Array) -> list[list[int]]:
    """Return [at most this many tokens, examples], the limits doubling."""
    limits = 1 << np.arange(40)
    counts = np.bincount(np.searchsorted(limits, lengths), minlength=len(limits))
    return [[int(limits[i]), int(counts[i])] for i in np.flatnonzero(counts)]


def _cells(sums: Mapping[str, Any]) -> list[str]:
    return [
        f"{sums['examples']:,}",
        f"{sums['tokens']:,}",
        f"{sums['trained_share']:.1%}",
        f"{sums['characters_per_token']:.2f}",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
