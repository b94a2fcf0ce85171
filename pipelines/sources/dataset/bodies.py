"""Makes a record's body of a row: dialogue, pair or text, each string checked on the way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.records import clean_text
from pipelines.sources.dataset.schemas import Schema, get_value, parse_list

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
}
CONTENT_KEYS = ("content", "value", "text", "message")


class BadRow(Exception):
    """A row that cannot become a record, and the short reason it is quarantined under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class UselessRow(BadRow):
    """A row that is well formed but teaches nothing; it is dropped rather than quarantined."""


@dataclass(frozen=True, slots=True)
class Body:
    """A record's body with what the row says beside it; `part` tells bodies of one row apart."""

    fields: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)
    part: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """How bodies are made: what joins prompt and input, and what repeated roles become."""

    separator: str
    roles: Literal["strict", "merge"] = "strict"


def read_bodies(row: Mapping[str, Any], schema: Schema, rules: Rules) -> Iterator[Body]:
    """Yield the bodies of a row, one except for tasks with instances; raises BadRow."""
    if schema.shape == "messages":
        yield _dialogue(row, schema, rules)
    elif schema.shape == "text":
        text = _text(row, schema.columns["text"])
        if not text.strip():
            raise UselessRow("empty_text", f"{schema.columns['text']!r} is empty")
        yield Body({"text": text})
    elif schema.shape == "pair":
        yield _pair(row, schema, rules)
    elif schema.shape == "instances":
        yield from _instances(row, schema, rules)
    else:
        yield _best_answer(row, schema, rules)


def check_text(value: Any, where: str) -> str:
    """Return a string that can be stored, "" for None; raises BadRow."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("not_text", f"{where} is of type {type(value).__name__}, expected text")
    if clean_text(value) is None:
        raise BadRow("unstorable_text", f"{where} has NUL or half of a surrogate pair")
    return value


def _text(row: Mapping[str, Any], column: str) -> str:
    return check_text(get_value(row, column), repr(column))


def _make_pair(prompt: str, context: str, completion: str, rules: Rules) -> Body:
    if not prompt.strip():
        raise UselessRow("empty_prompt", "the prompt is empty")
    if not completion.strip():
        raise UselessRow("empty_completion", "the completion is empty")
    if not context.strip():
        return Body({"prompt": prompt, "completion": completion})
    # Where the instruction ends cannot be told from the prompt if it holds the separator itself.
    meta = {"instruction_chars": len(prompt)}
    return Body({"prompt": f"{prompt}{rules.separator}{context}", "completion": completion}, meta)


def _pair(row: Mapping[str, Any], schema: Schema, rules: Rules) -> Body:
    columns = schema.columns
    context = _text(row, columns["input"]) if "input" in columns else ""
    prompt, completion = _text(row, columns["prompt"]), _text(row, columns["completion"])
    body = _make_pair(prompt, context, completion, rules)
    system = _text(row, columns["system"]) if "system" in columns else ""
    if not system.strip():
        return body
    turns = (("system", system), ("user", body.fields["prompt"]), ("assistant", completion))
    return Body({"messages": [_message(role, text) for role, text in turns]}, body.meta)


def _instances(row: Mapping[str, Any], schema: Schema, rules: Rules) -> Iterator[Body]:
    """Yield a pair for each instance of a task, of which most have one."""
    prompt = _text(row, schema.columns["prompt"])
    instances = parse_list(get_value(row, schema.columns["instances"]))
    if not instances or not all(isinstance(each, Mapping) for each in instances):
        raise BadRow("bad_instances", f"{schema.columns['instances']!r} is no list of objects")
    for number, each in enumerate(instances):
        context, answer = (check_text(each.get(key), repr(key)) for key in ("input", "output"))
        body = _make_pair(prompt, context, answer, rules)
        yield Body(body.fields, body.meta, f"/{number}" if number else "")


def _best_answer(row: Mapping[str, Any], schema: Schema, rules: Rules) -> Body:
    """Return the question with its best answer: highest score, the selected one among equals."""
    answers = parse_list(get_value(row, schema.columns["answers"])) or []
    found = [each for each in answers if isinstance(each, Mapping) and _answer_text(each)]
    if not found:
        raise BadRow("bad_answers", f"{schema.columns['answers']!r} holds no answer with a text")
    best = max(found, key=lambda each: (_score(each), bool(each.get("selected"))))
    prompt = _text(row, schema.columns["prompt"])
    body = _make_pair(prompt, "", check_text(_answer_text(best), "an answer"), rules)
    author = best.get("author")
    extra = {"author": author} if isinstance(author, str) and clean_text(author) else {}
    return Body({**body.fields, **extra, "score": _score(best)})


def _answer_text(answer: Mapping[str, Any]) -> Any:
    return next((answer[key] for key in ("text", "content", "body") if answer.get(key)), None)


def _score(answer: Mapping[str, Any]) -> float:
    score = next((answer[key] for key in ("pm_score", "score") if key in answer), 0)
    return float(score) if isinstance(score, int | float) else 0.0


def _message(role: str, content: str, *, train: bool = True) -> dict[str, Any]:
    return {"role": role, "content": content, "train": train and role == "assistant"}


def _dialogue(row: Mapping[str, Any], schema: Schema, rules: Rules) -> Body:
    column = schema.columns["messages"]
    turns = parse_list(get_value(row, column))
    if turns is None or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("bad_messages", f"{column!r} is no list of messages")
    messages = [_turn(turn, f"message {number}") for number, turn in enumerate(turns)]
    system = _text(row, schema.columns["system"]) if "system" in schema.columns else ""
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, _message("system", system))
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages.pop(0)
    if rules.roles == "merge":
        messages = _merge(messages)
    _check_dialogue(messages)
    return Body({"messages": messages})


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise BadRow("unknown_role", f"{where} has role {named!r} (known: {', '.join(ROLES)})")
    content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
    trained = turn.get("train", turn.get("weight"))
    skipped = trained is False or (isinstance(trained, int | float) and trained == 0)
    return _message(role, check_text(_join_parts(content, where), where), train=not skipped)


def _join_parts(content: Any, where: str) -> Any:
    """Return the text of content that is a list of parts, all of which have to be text."""
    if not isinstance(content, list):
        return content
    found = [part.get("text") for part in content if isinstance(part, Mapping)]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) != len(content):
        raise BadRow("not_text", f"{where} has parts that are no text")
    return "".join(texts)


def _merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            last = merged[-1]
            joined = "\n\n".join(text for text in (last["content"], message["content"]) if text)
            train = last["train"] and message["train"]
            merged[-1] = _message(message["role"], joined, train=train)
        else:
            merged.append(message)
    return merged


def _check_dialogue(messages: list[dict[str, Any]]) -> None:
    """Raise BadRow unless turns read [system,] user, assistant, user, ... with contents."""
    if not any(message["role"] == "assistant" for message in messages):
        raise UselessRow("no_assistant", f"none of {len(messages)} messages is an assistant's")
    if not any(message["train"] for message in messages):
        raise UselessRow("nothing_trained", "every message of the assistant has train: false")
    expected = "user"
    for number, message in enumerate(messages):
        if message["role"] == "system" and number == 0:
            continue
        if message["role"] != expected:
            repeated = number and messages[number - 1]["role"] == message["role"]
            hint = "; roles: merge joins such turns" if repeated else ""
            detail = f"message {number} is the {message['role']}'s, expected the {expected}'s{hint}"
            raise BadRow("bad_alternation", detail)
        if not message["content"].strip():
            raise UselessRow("empty_message", f"message {number} ({message['role']}) is empty")
        expected = "assistant" if expected == "user" else "user"
