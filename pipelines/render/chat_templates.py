"""Templates of dialogues, whatever their format: turns become pieces, answers are trained.

Invariant: the prompt's pieces are the first of the training pieces; of a turn that is trained, the
content and its end are, and with `train_role_header` also all that stands around them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.render.chat_export import export_chat
from pipelines.render.dialogues import DialogueRules, Record, Turn, Unrenderable, record_id
from pipelines.render.pieces import Piece, content
from pipelines.render.turn_formats import ChatFormat, Pieces


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A format, and which of its turns are written and trained.

    `train_role_header` is the form that StarChat's blog post trains: the header of an answer and
    the newline after its end are in the loss, and a prompt ends before the header's newline.
    """

    name: str
    format: ChatFormat
    rules: DialogueRules
    train_on_prompt: bool = False
    train_role_header: bool = False

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Return the control tokens it writes, in the order in which a tokenizer gets them."""
        return self.format.control_tokens

    @property
    def stop(self) -> str:
        """Return the control token that ends an answer."""
        return self.format.stop

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts that end an answer too."""
        return self.format.stop_texts

    @property
    def chat_template(self) -> str:
        """Return the Jinja template that renders the same bytes in transformers."""
        return export_chat(
            self.format,
            self.rules.system,
            override=self.rules.system_override,
            train_role_header=self.train_role_header,
        )

    def render(self, record: Record) -> list[Piece]:
        """Return the training pieces of a dialogue; raises Unrenderable."""
        return [piece for part in self.render_parts(record) for piece in part]

    def render_parts(self, record: Record) -> list[list[Piece]]:
        """Return what heads the dialogue, then each question with its answer; as `render`."""
        turns = self.rules.training_turns(record)
        parts = [[*self.format.start]]
        for turn in turns:
            if turn["role"] != "system" and (turn["role"] == "user" or len(parts) == 1):
                parts.append([])
            parts[-1] += self._turn(turn, record)
        parts[-1] += _marked(self.format.finish, trained=self._is_trained(turns[-1]))
        return parts

    def render_prompt(self, record: Record) -> list[Piece]:
        """Return the pieces up to the next answer's header; raises Unrenderable."""
        pieces = [*self.format.start]
        for turn in self.rules.prompt_turns(record):
            pieces += self._turn(turn, record)
        header = self.format.prompt_header(train_role_header=self.train_role_header)
        return [*pieces, *header]

    def _turn(self, turn: Turn, record: Record) -> Iterable[Piece]:
        written = self.format.turns.get(turn["role"])
        if written is None:
            detail = (
                f"the template {self.name!r} has no {turn['role']} turn; "
                "template.system_override: true leaves it out"
            )
            raise Unrenderable(record_id(record), "no_system_turn", detail)
        trained = self._is_trained(turn)
        around = self.train_role_header and trained and turn["role"] == "assistant"
        return [
            *_marked(written.header, trained=around),
            *content(f"{written.lead}{turn['content']}", trained=trained),
            *_marked(written.end, trained=trained),
            *_marked(written.after, trained=around),
        ]

    def _is_trained(self, turn: Turn) -> bool:
        wanted = turn["role"] == "assistant" or self.train_on_prompt
        return wanted and turn.get("train") is not False


def _marked(pieces: Pieces, *, trained: bool) -> Pieces:
    return tuple(piece._replace(trained=trained) for piece in pieces)
