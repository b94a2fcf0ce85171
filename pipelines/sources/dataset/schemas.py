"""Recognizes what the columns of a file hold, from its first rows and what people call columns.

A body is found in this order: dialogue (`messages`), task with instances (the seed tasks of
self-instruct), question with ranked answers, pair (prompt and completion), text. Names are compared
in lower case, without blanks around them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import SourceError, did_you_mean

Shape = Literal["messages", "instances", "answers", "pair", "text"]
Rows = Sequence[Mapping[str, Any]]

DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
# Prompt columns, each with what its answer is called, the most exact pair first.
ANSWERS = ("completion", "response", "output", "answer")
PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("instruction", ANSWERS),
    ("prompt", (*ANSWERS, "chosen")),
    ("question", (*ANSWERS, "response_j", "solution")),
    ("query", ANSWERS),
    ("problem", (*ANSWERS, "solution")),
    ("input", (*ANSWERS, "target")),
)
INPUTS = ("input", "context")
TEXTS = ("content", "text", "code")
EXTRAS: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt", "system_message"),
    "id": ("id", "uuid", "row_id", "_id", "hexsha", "message_id", "task_id", "prompt_id"),
    "group": ("group", "conversation_id", "dialogue_id", "thread_id", "question_id", "qid"),
    "url": ("url", "link", "source_url", "html_url"),
    "author": ("author", "author_name", "owner"),
    "license": ("license", "licence", "content_license", "licenses", "max_stars_repo_licenses"),
    "created": ("created", "created_at", "created_date", "creation_date", "date", "timestamp"),
    "score": ("score", "pm_score", "answer_score"),
    "split": ("split",),
    "path": ("path", "file_path", "filename", "file_name", "max_stars_repo_path"),
    "repository": ("repo_id", "repo_name", "repo", "repository", "max_stars_repo_name"),
    "language": ("lang", "language", "programming_language"),
}
BODY = ("messages", "prompt", "input", "completion", "text")
ROLE_KEYS = ("role", "from")
STRAY = 0.1  # columns that fewer of the first rows fill are those of rows out of place
TREE = ("parent_id", "parent_message_id", "message_tree_id", "replies", "tree_state")


@dataclass(frozen=True, slots=True)
class Schema:
    """The shape of a file's rows and the column of each part of a record."""

    shape: Shape
    columns: dict[str, str]

    @property
    def words(self) -> str:
        """Return the schema as a user reads it: parts with their columns."""
        return f"{self.shape}: " + ", ".join(f"{k} = {v}" for k, v in self.columns.items())


def get_value(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value, None where there is none; a dot reaches into nested columns."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for part in column.split("."):
        if isinstance(value, str) and value[:1] == "{":
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parse_list(value: Any) -> list[Any] | None:
    """Return a list, also one that is written as JSON text; None for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


class _Head:
    """The first rows of a file with their columns by normalized name."""

    def __init__(self, rows: Rows, where: str) -> None:
        self.rows = rows
        self.where = where
        names = dict.fromkeys(name for row in rows for name in row)
        self.names = {name.strip().lower().replace(" ", "_"): name for name in reversed(names)}
        self.shown = ", ".join(map(repr, names)) or "none"

    def find(self, candidates: Iterable[str], *kinds: type) -> list[str]:
        """Return the columns among the candidates whose values, where there are any, fit."""
        return [
            self.names[name]
            for name in candidates
            if name in self.names and self.fits(self.names[name], kinds)
        ]

    def fits(self, column: str, kinds: tuple[type, ...]) -> bool:
        values = self.values(column)
        # One row of another type is that row's fault, not the column's.
        good = sum(isinstance(value, kinds) and not isinstance(value, bool) for value in values)
        return bool(values) and 2 * good >= len(values)

    def values(self, column: str) -> list[Any]:
        found = (get_value(row, column) for row in self.rows)
        return [value for value in found if value is not None]

    def filled(self, column: str) -> float:
        return len(self.values(column)) / len(self.rows)

    def equal(self, columns: Sequence[str]) -> bool:
        return all(len({repr(get_value(row, c)) for c in columns}) == 1 for row in self.rows)

    def is_dialogue(self, column: str) -> bool:
        lists = [parse_list(value) for value in self.values(column)]
        found = [turns for turns in lists if turns]
        return any(isinstance(turns[0], dict) and self._has_role(turns[0]) for turns in found)

    @staticmethod
    def _has_role(turn: Mapping[str, Any]) -> bool:
        return any(key in turn for key in ROLE_KEYS)


def detect(rows: Rows, named: Mapping[str, str], where: str) -> Schema:
    """Return the schema of a file's first rows; `named` are the columns that settings give.

    Raises SourceError where it is unknown, ambiguous or without anything to learn: the columns
    found, what was looked for, and how to name them.
    """
    head = _Head(rows, where)
    for part, column in named.items():
        if not any(get_value(row, column) is not None for row in rows) and column not in {
            name for row in rows for name in row
        }:
            known = {name for row in rows for name in row}
            raise SourceError(
                f"{where}: columns.{part} names {column!r}, which no row has"
                f"{did_you_mean(column, known)} (columns: {head.shown})"
            )
    body = _named_body(head, named) or _find_body(head)
    extras = {part: named[part] for part in named if part not in BODY}
    return Schema(body.shape, {**body.columns, **_find_extras(head, body, extras)})


def _named_body(head: _Head, named: Mapping[str, str]) -> Schema | None:
    body = {part: named[part] for part in BODY if part in named}
    if not body:
        return None
    if "messages" in body:
        return Schema("messages", {"messages": body["messages"]})
    if "text" in body:
        return Schema("text", {"text": body["text"]})
    if "prompt" not in body:
        prompts = [p for p in head.find([p for p, _ in PAIRS], str) if p not in body.values()]
        if not prompts:
            raise _unknown(head, "columns names no prompt, and no column is called like one")
        body["prompt"] = prompts[0]
    if "completion" not in body:
        rest = (*ANSWERS, "chosen", "response_j", "solution", "target")
        found = [name for name in head.find(rest, str) if name not in body.values()]
        body["completion"] = _only(head, found, "completion") if found else ""
        if not found:
            raise _prompt_only(head, body["prompt"])
    return Schema("pair", {part: body[part] for part in BODY if part in body})


def _find_body(head: _Head) -> Schema:
    dialogues = [name for name in head.find(DIALOGUES, list, str) if head.is_dialogue(name)]
    if dialogues:
        return Schema("messages", {"messages": _only(head, dialogues, "messages")})
    tasks = head.find(["instances"], list)
    if tasks and head.find(["instruction"], str):
        columns = {"prompt": head.names["instruction"], "instances": tasks[0]}
        return Schema("instances", columns)
    answers = head.find(["answers"], list)
    questions = head.find(["question", "prompt", "title"], str)
    if answers and questions and not head.find(ANSWERS, str):
        return Schema("answers", {"prompt": questions[0], "answers": answers[0]})
    pair = _find_pair(head)
    if pair is None and any(name in head.names for name in TREE):
        raise SourceError(
            f"{head.where}: these are messages of a tree (columns: {head.shown}), not dialogues; "
            "read them with type: oasst"
        )
    return pair or _find_text(head)


def _list_pairs(head: _Head, share: float) -> list[tuple[str, list[str]]]:
    """Return the prompt columns, each with its answers, that a share of the rows fills."""
    pairs: list[tuple[str, list[str]]] = []
    for prompt, answers in PAIRS:
        prompts, completions = (
            [name for name in head.find(names, str) if head.filled(name) >= share]
            for names in ([prompt], answers)
        )
        if prompts and completions:
            pairs.append((prompts[0], completions))
    return pairs


def _find_pair(head: _Head) -> Schema | None:
    # A stray row of another layout is that row's fault: it makes no file ambiguous.
    pairs = _list_pairs(head, STRAY) or _list_pairs(head, 0)
    if not pairs:
        return None
    prompt, completions = pairs[0]
    for other, others in pairs[1:]:
        if other.strip().lower() != "input" and set(others) - set(completions):
            own = next(name for name in others if name not in completions)
            raise _ambiguous(head, [f"{prompt} + {completions[0]}", f"{other} + {own}"])
    if "code" in head.names and head.names.get("question") == prompt:
        raise SourceError(
            f"{head.where}: question, answer and the code they are about (columns: {head.shown}) "
            "are read with type: code-qa; or name the columns to read: "
            "columns: {prompt: ..., input: ..., completion: ...}"
        )
    columns = {"prompt": prompt, "completion": _only(head, completions, "completion")}
    named = [head.names[name] for name in INPUTS if name in head.names]
    # Often the first rows have no input at all.
    inputs = [name for name in named if not head.values(name) or head.fits(name, (str,))]
    if inputs and inputs[0] != prompt:
        columns = {"prompt": prompt, "input": inputs[0], "completion": columns["completion"]}
    return Schema("pair", columns)


def _find_text(head: _Head) -> Schema:
    prompts = head.find([prompt for prompt, _ in PAIRS], str)
    texts = head.find(TEXTS, str)
    if texts and not prompts:
        return Schema("text", {"text": _only(head, texts, "text")})
    if prompts:
        raise _prompt_only(head, prompts[0])
    raise _unknown(head, "no known schema")


def _find_extras(head: _Head, body: Schema, named: Mapping[str, str]) -> dict[str, str]:
    """Return the columns beside the body: named ones, else those with the usual names."""
    taken = {*body.columns.values(), *named.values()}
    found = dict(named)
    for part, candidates in EXTRAS.items():
        if part in found or (part in ("path", "repository", "language") and body.shape != "text"):
            continue
        if part == "system" and body.shape not in ("pair", "messages"):
            continue
        columns = [name for name in _candidates(head, part, candidates) if name not in taken]
        if part == "id":
            columns = [name for name in columns if _is_key(head, name)]
        if columns:
            found[part] = columns[0]
    if body.shape == "pair" and "response_j" in body.columns.values():
        found.pop("id", None)
    return found


def _candidates(head: _Head, part: str, candidates: Sequence[str]) -> list[str]:
    if part == "score":
        return head.find(candidates, int, float)
    if part == "created":
        return [head.names[name] for name in candidates if name in head.names]
    if part in ("id", "group"):
        return head.find(candidates, str, int)
    if part == "license":
        return head.find(candidates, str, list)
    return head.find(candidates, str)


def _is_key(head: _Head, column: str) -> bool:
    values = [value for value in (get_value(row, column) for row in head.rows) if value is not None]
    return len({str(value) for value in values}) == len(head.rows)


def _only(head: _Head, columns: Sequence[str], part: str) -> str:
    """Return the first of several columns if they say the same; SourceError if they do not."""
    if len(columns) > 1 and not head.equal(columns):
        raise _ambiguous(head, list(columns), part)
    return columns[0]


def _ambiguous(head: _Head, choices: Sequence[str], part: str = "") -> SourceError:
    example = f"{{{part}: {choices[0]}}}" if part else "{prompt: ..., completion: ...}"
    return SourceError(
        f"{head.where}: {' or '.join(map(repr, choices))}? Both are there and differ (columns: "
        f"{head.shown}); say which with columns: {example}"
    )


def _prompt_only(head: _Head, prompt: str) -> SourceError:
    return SourceError(
        f"{head.where}: {prompt!r} is a prompt without a completion, so there is nothing to learn "
        f"(columns: {head.shown}; looked for {', '.join(ANSWERS)}); name the answer with columns: "
        f"{{completion: ...}}, or train on it as text with columns: {{text: {prompt}}}"
    )


def _unknown(head: _Head, cause: str) -> SourceError:
    return SourceError(
        f"{head.where}: {cause} (columns: {head.shown}); looked for a dialogue "
        f"({', '.join(DIALOGUES)}: a list of role and content, or from and value), a pair "
        f"({', '.join(prompt for prompt, _ in PAIRS)} with {', '.join(ANSWERS)}) or "
        f"text ({', '.join(TEXTS)}); name yours with columns: {{prompt: ..., completion: ...}}, "
        "{messages: ...} or {text: ...}, or leave the file out with exclude:"
    )
