"""Templates turn a prompt and its answer, or a dialogue, into pieces.

Invariant: what `render_prompt` gives at inference is a prefix of what `render` gives in training.
A template is immutable and knows no tokenizer; ids are looked up by name when pieces are encoded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.errors import TemplateError, did_you_mean
from pipelines.recipe import Template as Settings
from pipelines.render.pieces import END_OF_TEXT, Piece, content, control

Record = Mapping[str, Any]

SYSTEM, ASSISTANT, USER, END = "<|system|>", "<|assistant|>", "<|user|>", "<|end|>"
# The order in which the blog post of StarChat adds them, hence the order of their ids.
CHAT_TOKENS = (SYSTEM, ASSISTANT, USER, END)
ROLES = {"system": SYSTEM, "assistant": ASSISTANT, "user": USER}

# Between the instruction and its input in the prompt of a record with both, as Alpaca prints it.
INPUT_HEADER = "\n\n### Input:\n"


class Unrenderable(TemplateError):
    """A record that this template cannot render; `why` is the short reason it is counted under."""

    def __init__(self, record_id: str, why: str, detail: str) -> None:
        super().__init__(f"record {record_id!r}: {detail}")
        self.why = why


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A framed prompt, then the completion (after `lead`) and the end of text, both trained."""

    name: str
    frame: Callable[[str], str]
    lead: str
    train_on_prompt: bool

    stop = END_OF_TEXT

    def render(self, record: Record) -> list[Piece]:
        """Return the training pieces of a record; raises Unrenderable."""
        prompt = self.render_prompt(record)
        _, completion = _pair(record)
        if not (completion or "").strip():
            raise Unrenderable(_id(record), "empty_completion", "the completion is empty")
        return [
            *prompt,
            *content(f"{self.lead}{completion}", trained=True),
            control(END_OF_TEXT, trained=True),
        ]

    def render_prompt(self, record: Record) -> list[Piece]:
        """Return the pieces the model continues; `prompt` is enough. Raises Unrenderable."""
        prompt, _ = _pair(record)
        if not (prompt or "").strip():
            raise Unrenderable(_id(record), "empty_prompt", "the prompt is empty")
        return content(self.frame(prompt or ""), trained=self.train_on_prompt)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """StarChat: `<|role|>` newline content `<|end|>` newline for each turn, answers trained.

    `system` is the system turn of dialogues that bring none: None leaves it out, "" keeps an
    empty one (the `no_system` template of the StarChat repository).
    """

    name: str
    system: str | None
    train_on_prompt: bool

    stop = END

    def render(self, record: Record) -> list[Piece]:
        """Return the training pieces of a dialogue; raises Unrenderable."""
        return [piece for turn in self._turns(record) for piece in self._turn(turn)]

    def render_prompt(self, record: Record) -> list[Piece]:
        """Return the pieces up to the last answer's header; raises Unrenderable."""
        turns = self._turns(record)
        if turns[-1]["role"] == "assistant":
            turns.pop()
        return [*(piece for turn in turns for piece in self._turn(turn)), *_header("assistant")]

    def _turn(self, turn: Record) -> list[Piece]:
        wanted = turn["role"] == "assistant" or self.train_on_prompt
        trained = wanted and turn.get("train") is not False
        return [
            *_header(turn["role"]),
            *content(turn["content"], trained=trained),
            control(END, trained=trained),
            *content("\n", trained=False),
        ]

    def _turns(self, record: Record) -> list[Record]:
        turns = _messages(record)
        _check_turns(_id(record), turns)
        if turns[0]["role"] != "system" and self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        return turns


Template = PromptTemplate | ChatTemplate


def _header(role: str) -> list[Piece]:
    return [control(ROLES[role]), *content("\n", trained=False)]


def _plain(prompt: str) -> str:
    return f"{prompt}\n"


def _question_answer(prompt: str) -> str:
    # The blank before the answer belongs to the answer, as byte-level BPE merges it.
    return f"Question: {prompt}\n\nAnswer:"


def _alpaca(prompt: str) -> str:
    context = ", paired with an input that provides further context" * (INPUT_HEADER in prompt)
    return (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{prompt}\n\n### Response:"
    )


FRAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "plain": (_plain, ""),
    "alpaca": (_alpaca, ""),
    "question-answer": (_question_answer, " "),
}


def get_template(settings: Settings) -> Template:
    """Return the template of a recipe; TemplateError where `system` cannot have an effect."""
    if settings.name == "starchat":
        return ChatTemplate(settings.name, settings.system, settings.train_on_prompt)
    if settings.system is not None:
        raise TemplateError(
            f"template.system: the template {settings.name!r} has no system turn; "
            "remove the key or set template.name: starchat"
        )
    frame, lead = FRAMES[settings.name]
    return PromptTemplate(settings.name, frame, lead, settings.train_on_prompt)


def control_tokens(template: Template) -> tuple[str, ...]:
    """Return the control tokens a template renders, in the order a tokenizer gets them."""
    return CHAT_TOKENS if isinstance(template, ChatTemplate) else (END_OF_TEXT,)


def _id(record: Record) -> str:
    return str(record.get("id", ""))


def _pair(record: Record) -> tuple[str | None, str | None]:
    """Return prompt and completion; a dialogue of one question and one answer is such a pair."""
    messages = record.get("messages")
    if messages is None:
        return record.get("prompt"), record.get("completion")
    turns = list(messages)
    _check_turns(_id(record), turns)
    if turns[0]["role"] != "user" or len(turns) > 2:
        raise Unrenderable(
            _id(record),
            "not_a_pair",
            f"{len(turns)} messages, expected one user and one assistant; use a chat template",
        )
    return turns[0]["content"], turns[1]["content"] if len(turns) == 2 else None


def _messages(record: Record) -> list[Record]:
    """Return the turns of a dialogue; a prompt with its completion is a dialogue of two."""
    if record.get("messages") is not None:
        return list(record["messages"])
    turns = (("user", record.get("prompt")), ("assistant", record.get("completion")))
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def _check_turns(record_id: str, turns: list[Record]) -> None:
    """Raise Unrenderable unless turns read [system,] user, assistant, user, ... with contents."""
    if not turns:
        raise Unrenderable(record_id, "no_messages", "no message to render")
    expected = "user"
    for number, turn in enumerate(turns):
        role, where = turn["role"], f"message {number}"
        if role not in ROLES:
            hint = did_you_mean(str(role), ROLES)
            detail = f"{where} has role {role!r}{hint} (known: {', '.join(ROLES)})"
            raise Unrenderable(record_id, "unknown_role", detail)
        if role == "system" and number == 0:
            continue
        if role != expected:
            detail = f"{where} has role {role!r}, expected {expected!r}"
            raise Unrenderable(record_id, "bad_alternation", detail)
        if not (turn["content"] or "").strip():
            raise Unrenderable(record_id, "empty_message", f"{where} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"
    if turns[-1]["role"] == "system":
        raise Unrenderable(record_id, "no_messages", "a system turn and nothing else")
