"""Templates of pairs: a framed prompt, then the completion and the end of text.

Invariant: the prompt's pieces are the first of the training pieces. A dialogue of one question and
one answer is such a pair.
"""

from dataclasses import dataclass

from pipelines.render.chat_export import export_pair
from pipelines.render.dialogues import (
    DialogueRules,
    Record,
    Unrenderable,
    check_turns,
    read_messages,
    record_id,
    repair_turns,
)
from pipelines.render.pieces import END_OF_TEXT, Piece, content, control

# Between the instruction and its input in the prompt of a record with both, as Alpaca prints it.
INPUT_HEADER = "\n\n### Input:\n"

ALPACA = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n"
)
ALPACA_CONTEXT = ", paired with an input that provides further context"
SC2_INSTRUCT = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate "
    "and reliable responses to user instructions.\n\n### Instruction\n"
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a prompt. `lead` is encoded with the completion, as BPE merges it.

    `before_input` stands before prompts that hold an input (INPUT_HEADER); `start` is the name of
    a control token before all, "" for none.
    """

    before: str
    behind: str
    lead: str = ""
    before_input: str | None = None
    start: str = ""

    def wrap(self, prompt: str) -> str:
        """Return the framed prompt."""
        has_input = self.before_input is not None and INPUT_HEADER in prompt
        before = self.before_input if has_input else self.before
        return f"{before}{prompt}{self.behind}"


FRAMES = {
    "plain": Frame("", "\n"),
    "alpaca": Frame(
        ALPACA.format(context=""),
        "\n\n### Response:",
        before_input=ALPACA.format(context=ALPACA_CONTEXT),
    ),
    # The blank before the answer belongs to the answer.
    "question-answer": Frame("Question: ", "\n\nAnswer:", lead=" "),
    "sc2-instruct": Frame(SC2_INSTRUCT, "\n\n### Response\n", start=END_OF_TEXT),
}


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A framed prompt, then the completion (after its lead) and the end of text, both trained."""

    name: str
    frame: Frame
    rules: DialogueRules
    train_on_prompt: bool = False

    control_tokens = (END_OF_TEXT,)
    stop = END_OF_TEXT
    stop_texts: tuple[str, ...] = ()

    @property
    def chat_template(self) -> str:
        """Return the Jinja template that renders the same bytes in transformers."""
        frame = self.frame
        return export_pair(
            start=frame.start,
            before=frame.before,
            before_input=frame.before_input,
            input_header=INPUT_HEADER,
            behind=frame.behind,
            lead=frame.lead,
        )

    def render(self, record: Record) -> list[Piece]:
        """Return the training pieces of a record; raises Unrenderable."""
        return [piece for part in self.render_parts(record) for piece in part]

    def render_parts(self, record: Record) -> list[list[Piece]]:
        """Return the pieces as the one part there is, with nothing at its head."""
        prompt, completion, trained = self._pair(record)
        framed = self._framed(record, prompt)
        if not (completion or "").strip():
            raise Unrenderable(record_id(record), "empty_completion", "the completion is empty")
        end = [
            *content(f"{self.frame.lead}{completion}", trained=trained),
            control(END_OF_TEXT, trained=trained),
        ]
        return [[], [*framed, *end]]

    def render_prompt(self, record: Record) -> list[Piece]:
        """Return the pieces the model continues; `prompt` is enough. Raises Unrenderable."""
        prompt, _, _ = self._pair(record)
        return self._framed(record, prompt)

    def _framed(self, record: Record, prompt: str | None) -> list[Piece]:
        if not (prompt or "").strip():
            raise Unrenderable(record_id(record), "empty_prompt", "the prompt is empty")
        start = [control(self.frame.start)] if self.frame.start else []
        return [*start, *content(self.frame.wrap(prompt or ""), trained=self.train_on_prompt)]

    def _pair(self, record: Record) -> tuple[str | None, str | None, bool]:
        """Return prompt and completion, and whether the completion is trained."""
        if record.get("messages") is None:
            return record.get("prompt"), record.get("completion"), True
        turns = read_messages(record)
        if self.rules.alternation == "repair":
            turns = repair_turns(turns)
        check_turns(record_id(record), turns)
        if turns[0]["role"] == "system" and self.rules.system_override:
            turns = turns[1:]
        if turns[0]["role"] != "user" or len(turns) > 2:
            raise Unrenderable(
                record_id(record),
                "not_a_pair",
                f"{len(turns)} messages, expected one user and one assistant; use a chat template",
            )
        answer = turns[1] if len(turns) == 2 else {}
        return turns[0]["content"], answer.get("content"), answer.get("train") is not False
