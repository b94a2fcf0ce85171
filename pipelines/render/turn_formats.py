r"""How the turns of a dialogue are written: the formats that have a name, and a user's own.

A turn is written as a line such as `<|user|>\n{content}<|end|>\n`. What stands before the content
is its header. Behind it, all up to the first control token ends the turn (all of it where there is
none): that is trained in answers, the rest never is. Blanks right before the content are encoded
with it, as byte-level BPE merges them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pipelines.errors import TemplateError, did_you_mean
from pipelines.render.pieces import END_OF_TEXT, Piece, content, control

CONTENT = "{content}"

SYSTEM, ASSISTANT, USER, END = "<|system|>", "<|assistant|>", "<|user|>", "<|end|>"
# The order in which the blog post of StarChat adds them, hence the order of their ids.
CHAT_TOKENS = (SYSTEM, ASSISTANT, USER, END)
IM_START, IM_END = "<|im_start|>", "<|im_end|>"

Role = Literal["system", "user", "assistant"]
Pieces = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """The untrained pieces around a turn's content, `lead` blanks that go with it, and its end."""

    header: Pieces
    lead: str
    end: Pieces
    after: Pieces


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The turns by role, what stands before the first and behind the last, and the tokens.

    `control_tokens` are in the order in which a tokenizer that lacks them gets them. `stop_texts`
    end an answer where no control token does.
    """

    control_tokens: tuple[str, ...]
    turns: Mapping[str, TurnFormat]
    start: Pieces = ()
    finish: Pieces = ()
    stop_texts: tuple[str, ...] = ()

    @property
    def stop(self) -> str:
        """Return the control token that ends an answer."""
        ends = (*self.turns["assistant"].end, *self.finish)
        return next((piece.control for piece in ends if piece.control), END_OF_TEXT)

    def prompt_header(self, *, train_role_header: bool) -> Pieces:
        """Return the header that ends a prompt: without its newline where that is trained."""
        header = self.turns["assistant"].header
        if train_role_header and header and header[-1].text == "\n":
            return header[:-1]
        return header


def split_controls(text: str, control_tokens: Sequence[str]) -> list[Piece]:
    """Return the untrained pieces of a stretch of markup: control tokens, and text between."""
    longest_first = sorted(filter(None, control_tokens), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
    pieces = []
    for part in re.split(f"({pattern})", text):
        pieces += [control(part)] if part in longest_first else content(part, trained=False)
    return pieces


def parse_turn(line: str, control_tokens: Sequence[str]) -> TurnFormat:
    """Return the format of a turn written as `HEADER{content}END`; raises ValueError."""
    if line.count(CONTENT) != 1:
        raise ValueError(f"{line!r} holds {CONTENT} {line.count(CONTENT)} times, expected once")
    before, behind = line.split(CONTENT)
    header = before.rstrip(" ")
    pieces = split_controls(behind, control_tokens)
    controls = [number for number, piece in enumerate(pieces) if piece.control]
    if controls:
        stop = controls[0] + 1
        end, after = pieces[:stop], pieces[stop:]
    else:
        end, after = content(behind, trained=False), []
    return TurnFormat(
        _split_header(header, control_tokens),
        before[len(header) :],
        tuple(end),
        tuple(after),
    )


def _split_header(header: str, control_tokens: Sequence[str]) -> Pieces:
    """Return a header's pieces; a newline that ends it is one, as prompts may end before it."""
    line = header.removesuffix("\n")
    newline = content(header[len(line) :], trained=False)
    return (*split_controls(line, control_tokens), *newline)


def chat_format(
    turns: Mapping[str, str],
    control_tokens: Sequence[str] = (),
    *,
    start: str = "",
    finish: str = "",
    stop_texts: Sequence[str] = (),
) -> ChatFormat:
    """Return the format whose turns, start and finish are written as text; raises ValueError."""
    known = (*control_tokens, END_OF_TEXT)
    used = [END_OF_TEXT] if END_OF_TEXT in "".join((*turns.values(), start, finish)) else []
    return ChatFormat(
        tuple(dict.fromkeys((*control_tokens, *used))),
        {role: parse_turn(line, known) for role, line in turns.items()},
        tuple(split_controls(start, known)),
        tuple(split_controls(finish, known)),
        tuple(stop_texts),
    )


def starchat_format(user: str = USER, assistant: str = ASSISTANT) -> ChatFormat:
    """Return StarChat's format; its `alpaca` variant has other tokens for user and assistant."""
    headers = {"system": SYSTEM, "user": user, "assistant": assistant}
    turns = {role: f"{token}\n{CONTENT}{END}\n" for role, token in headers.items()}
    return chat_format(turns, (SYSTEM, assistant, user, END))


def few_shot_format(text: str) -> ChatFormat:
    """Return the dialogue prompt of a file: its text, then the question in the form it shows."""
    return chat_format(
        {
            "user": f"Human: {CONTENT}\n\n",
            "assistant": f"Assistant: {CONTENT}\n\n",
        },
        start=f"{text.rstrip()}\n\n",
        finish=END_OF_TEXT,
        stop_texts=("\n\nHuman:", "\n-----"),
    )


# Zephyr's and OASST's texts end with the tokenizer's end of text; their role markers are control
# tokens here, so that no content can forge one.
FORMATS = {
    "starchat": starchat_format(),
    "chatml": chat_format(
        {
            role: f"{IM_START}{role}\n{CONTENT}{IM_END}\n"
            for role in ("system", "user", "assistant")
        },
        (IM_START, IM_END),
    ),
    "zephyr": chat_format(
        {role: f"<|{role}|>\n{CONTENT}{END_OF_TEXT}\n" for role in ("system", "user", "assistant")},
        (SYSTEM, ASSISTANT, USER),
    ),
    "oasst": chat_format(
        {
            "system": f"{SYSTEM}{CONTENT}{END_OF_TEXT}",
            "user": f"<|prompter|>{CONTENT}{END_OF_TEXT}",
            "assistant": f"{ASSISTANT}{CONTENT}{END_OF_TEXT}",
        },
        (SYSTEM, ASSISTANT, "<|prompter|>"),
    ),
    "human-assistant": chat_format(
        {
            "system": f"{CONTENT}\n\n",
            "user": f"Human: {CONTENT}\n",
            "assistant": f"Assistant: {CONTENT}\n",
        },
        finish=END_OF_TEXT,
        stop_texts=("\nHuman:",),
    ),
}

# The system texts and tokens of the templates in the StarChat repository, by their names there.
STARCHAT_SYSTEMS = {
    "default": "Below is a dialogue between a human user and an AI assistant. The assistant is "
    "happy to help with almost anything, and will do its best to understand exactly what is "
    "needed.",
    "no_system": "",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.",
}
ALPACA_USER, ALPACA_ASSISTANT = "### Instruction:", "### Response:"

FILE_KEYS = ("control_tokens", "start", "system", "user", "assistant", "finish", "stop_texts")


def read_format(text: str, name: str) -> ChatFormat:
    """Return the format that a user's YAML file writes down; raises TemplateError.

    Its keys: `user` and `assistant` (required) and `system`, each a turn around `{content}`;
    `control_tokens`, `start`, `finish` and `stop_texts`.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TemplateError(f"{name}: not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise TemplateError(f"{name}: expected the keys {', '.join(FILE_KEYS)}")
    for key in values:
        if key not in FILE_KEYS:
            hint = did_you_mean(str(key), FILE_KEYS) or f" (known: {', '.join(FILE_KEYS)})"
            raise TemplateError(f"{name}: {key}: unknown key{hint}")
    for key in ("user", "assistant"):
        if key not in values:
            raise TemplateError(f"{name}: {key}: required, a turn such as '<|{key}|>{CONTENT}'")
    _check_kinds(values, name)
    turns = {role: values[role] for role in ("system", "user", "assistant") if role in values}
    try:
        return chat_format(
            turns,
            values.get("control_tokens", ()),
            start=values.get("start", ""),
            finish=values.get("finish", ""),
            stop_texts=values.get("stop_texts", ()),
        )
    except ValueError as error:
        raise TemplateError(f"{name}: {error}") from error


def _check_kinds(values: Mapping[str, Any], name: str) -> None:
    for key, value in values.items():
        is_list = key in ("control_tokens", "stop_texts")
        texts = value if is_list and isinstance(value, list) else [value]
        if (is_list and not isinstance(value, list)) or not all(
            isinstance(text, str) and (text or not is_list) for text in texts
        ):
            expected = "a list of texts" if is_list else "a text"
            raise TemplateError(f"{name}: {key}: expected {expected}, got {value!r}")
