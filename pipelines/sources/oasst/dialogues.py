"""Turns trees into dialogues: one for each answer that no surviving answer follows.

Shared turns stand in several dialogues but are trained in one, so every surviving answer is
trained exactly once. Whatever order the messages came in, the result is the same.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import Outcome, Params
from pipelines.manifest import canonical
from pipelines.records import Row, new_record, write_rows
from pipelines.sources.oasst.messages import Message
from pipelines.sources.oasst.rules import code_sign, code_words, find_fault, summarize_labels
from pipelines.sources.oasst.trees import Left

UNRANKED = 2**31


@dataclass(slots=True)
class Tree:
    """One tree: `alive` are the messages that survive, `words` those of code in each.

    `ranked` are all answers to a turn that no rule objects to, best first.
    """

    root: str
    messages: dict[str, Message]
    replies: dict[str, list[str]] = field(default_factory=dict)
    ranked: dict[str, list[str]] = field(default_factory=dict)
    alive: list[str] = field(default_factory=list)  # parents before their replies
    words: dict[str, set[str]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Return the tree's id: what the data calls it, else its root's."""
        return str(self.messages[self.root]["tree"] or self.root)


def write_dialogues(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the dialogues of the trees a part file lists; rows_in counts messages.

    `inputs` are the part and all files of scanned messages. `params` holds the source's settings,
    id, origin, openai_outputs, the license of all, and limit (records at most, or None).
    """
    left = Left(params["id"])
    rows: list[Row] = []
    used = 0
    for root, messages in sorted(_load_trees(inputs[0], inputs[1:]).items()):
        room = None if params["limit"] is None else params["limit"] - len(rows)
        tree = Tree(root, messages)
        prune(tree, params, left)
        paths = list(find_paths(tree, keep_user_leaf=params["keep_user_leaf"]))
        kept = paths if room is None else paths[: max(room, 0)]
        rows.extend(_make_records(tree, kept, params))
        used += _count_used(tree, paths, kept, left)
    write_rows(output, rows)
    licenses = Counter(row["license"] for row in rows)
    about_code = sum(json.loads(row["meta"])["code"] is not None for row in rows)
    extra = {"licenses": dict(sorted(licenses.items())), "about_code": about_code}
    return Outcome(left.counts(used, len(rows)), rejects=tuple(left.rejects), extra=extra)


def _load_trees(part: Path, scanned: Sequence[Path]) -> dict[str, dict[str, Message]]:
    """Return {root: {id: message}} of a part, reading one row group at a time."""
    table = pq.read_table(part)
    wanted: dict[int, dict[int, str]] = {}
    for file, row, root in zip(*(column.to_pylist() for column in table.columns), strict=True):
        wanted.setdefault(file, {})[row] = root
    trees: dict[str, dict[str, Message]] = {}
    for number, roots in sorted(wanted.items()):
        with pq.ParquetFile(scanned[number]) as file:
            start = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                here = [row for row in range(start, start + size) if row in roots]
                if here:
                    chosen = file.read_row_group(group).take(pa.array([r - start for r in here]))
                    for row, message in zip(here, chosen.to_pylist(), strict=True):
                        trees.setdefault(roots[row], {})[message["id"]] = message
                start += size
    return trees


def prune(tree: Tree, params: Params, left: Left) -> None:
    """Fill `replies` and `alive` with what the rules let live; the rest goes to `left`."""
    replies: dict[str, list[str]] = {}
    for message in tree.messages.values():
        if message["id"] != tree.root:
            replies.setdefault(message["parent"], []).append(message["id"])
    expected = {tree.root: "user"}
    todo = _survivors(tree, [tree.root], expected, params, left)
    gone = set(tree.messages)
    while todo:
        current = todo.pop()
        tree.alive.append(current)
        gone.discard(current)
        role = tree.messages[current]["role"]
        below = sorted(replies.get(current, ()), key=lambda name: _order(tree.messages[name]))
        expected = dict.fromkeys(below, "assistant" if role == "user" else "user")
        living = _survivors(tree, below, expected, params, left)
        if role == "user":
            tree.ranked[current] = living
            living = _best(tree, living, len(below), params, left)
        tree.replies[current] = living
        todo.extend(reversed(living))
        gone.difference_update(set(below) - set(living))
    if tree.root not in tree.alive:
        gone.discard(tree.root)
    for name in sorted(gone):
        left.drop(name, "cut_off", "follows a message that was left out")


def _order(message: Message) -> tuple[int, str, str]:
    rank = UNRANKED if message["rank"] is None else message["rank"]
    return rank, message["created"] or "", message["id"]


def _survivors(
    tree: Tree, names: Sequence[str], expected: Mapping[str, str], params: Params, left: Left
) -> list[str]:
    """Return the messages that speak in turn and that no rule objects to."""
    living = []
    for name in names:
        message = tree.messages[name]
        fault = find_fault(message, params)
        if message["role"] != expected[name]:
            detail = f"the {message['role']} speaks where it is the {expected[name]}'s turn"
            left.quarantine(name, "not_alternating", detail)
        elif fault is not None:
            left.drop(name, *fault)
        else:
            living.append(name)
    return living


def _best(tree: Tree, living: list[str], siblings: int, params: Params, left: Left) -> list[str]:
    """Return the answers that `mode` asks for: the k best-ranked, or an only one unranked."""
    if params["mode"] == "all_paths":
        return living
    most = 1 if params["mode"] == "top1" else params["top_k"]
    kept: list[str] = []
    for name in living:
        if tree.messages[name]["rank"] is None and siblings > 1:
            left.drop(name, "unranked", f"one of {siblings} answers, without a rank")
        elif len(kept) == most:
            left.drop(name, "beyond_top_k", f"rank {tree.messages[name]['rank']}")
        else:
            kept.append(name)
    return kept


def find_paths(tree: Tree, *, keep_user_leaf: bool) -> Iterator[list[str]]:
    """Yield the ids of each dialogue, root first, depth first.

    A dialogue ends with an answer that no other follows or, with `keep_user_leaf`, also with a
    turn that nobody answered; one without any answer is none.
    """
    if tree.root not in tree.alive:
        return
    answered = _answered(tree)
    todo = [(tree.root, 0)]
    path: list[str] = []
    while todo:
        current, depth = todo.pop()
        del path[depth:]
        path.append(current)
        below = tree.replies[current]
        is_answer = tree.messages[current]["role"] == "assistant"
        if not keep_user_leaf:
            below = [name for name in below if name in answered]
        if not below and len(path) > 1 and (is_answer or keep_user_leaf):
            yield list(path)
        # Unanswered turns first, or their dialogues would have nothing left to train.
        below = sorted(below, key=lambda name: name in answered)
        todo.extend((name, depth + 1) for name in reversed(below))


def _answered(tree: Tree) -> set[str]:
    """Return the messages that are an answer or are followed by one."""
    answered: set[str] = set()
    for name in reversed(tree.alive):
        below = tree.replies[name]
        if tree.messages[name]["role"] == "assistant" or any(n in answered for n in below):
            answered.add(name)
    return answered


def _count_used(
    tree: Tree, paths: Sequence[Sequence[str]], kept: Sequence[Sequence[str]], left: Left
) -> int:
    """Return how many messages are in a dialogue that is kept; the others go to `left`."""
    used = {name for path in kept for name in path}
    beyond = {name for path in paths for name in path} - used
    for name in sorted(set(tree.alive) - used):
        if name in beyond:
            left.drop(name, "max_records", "the source has its number of records")
        elif tree.messages[name]["parent"] is None:
            left.drop(name, "unanswered", "no answer to it survives")
        else:
            left.drop(name, "user_leaf", "the last turn, and nobody answered it")
    return len(used)


def _make_records(tree: Tree, paths: Sequence[Sequence[str]], params: Params) -> Iterator[Row]:
    trained: set[str] = set()
    for name in {name for path in paths for name in path}:
        tree.words[name] = code_words(tree.messages[name]["text"])
    source, origin = params["id"], params["origin"]
    for path in paths:
        messages = [tree.messages[name] for name in path]
        turns = [
            {
                "role": message["role"],
                "content": message["text"],
                "train": message["role"] == "assistant" and message["id"] not in trained,
            }
            for message in messages
        ]
        trained.update(path)
        quality = summarize_labels(messages[-1:]).get("quality")
        yield new_record(
            id=f"{source}:{path[-1]}",
            group=f"{source}:{tree.id}",
            source=source,
            revision=origin["revision"],
            url=origin["url"],
            author=", ".join(dict.fromkeys(m["author"] for m in messages if m["author"])) or None,
            license=params["license"],
            created=messages[-1]["created"],
            score=quality[0] if quality else None,
            messages=turns,
            meta=canonical(_describe(tree, messages, turns, params)),
        )


def _find_worse(
    tree: Tree, messages: Sequence[Message], turns: Sequence[Row]
) -> list[dict[str, Any]]:
    """Return the answers ranked below each trained one, with the number of its turn."""
    found = []
    for number, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        if not turn["train"] or message["rank"] is None:
            continue
        for name in tree.ranked[message["parent"]]:
            other = tree.messages[name]
            if other["rank"] is not None and other["rank"] > message["rank"]:
                about = {"turn": number, "id": name, "rank": other["rank"], "text": other["text"]}
                found.append({**about, **({"author": other["author"]} if other["author"] else {})})
    return found


def _describe(
    tree: Tree, messages: Sequence[Message], turns: Sequence[Row], params: Params
) -> dict[str, Any]:
    """Return what the record's meta holds: where each turn comes from and what is known of it."""
    worse = _find_worse(tree, messages, turns) if params["pairs"] else []
    models = sorted({message["model"] for message in messages if message["model"]})
    return {
        "tree_id": tree.id,
        "leaf_id": messages[-1]["id"],
        "message_ids": [message["id"] for message in messages],
        "ranks": [message["rank"] for message in messages],
        "langs": [message["lang"] for message in messages],
        "labels": summarize_labels(messages),
        "code": code_sign(tree.words[message["id"]] for message in messages),
        **({"rejected": worse} if worse else {}),
        **({"models": models} if models else {}),
        **({"openai_outputs": True} if params["openai_outputs"] else {}),
    }
