"""Dialogues as templates take them: roles checked, the system turn chosen, repaired on request.

Invariant: turns read [system,] user, assistant, user, ... and none but the system turn is empty.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.errors import TemplateError, did_you_mean

Record = Mapping[str, Any]
Turn = Mapping[str, Any]

ROLES = ("system", "assistant", "user")
# Between messages of one role that are joined.
JOINT = "\n\n"


class Unrenderable(TemplateError):
    """A record that this template cannot render; `why` is the short reason it is counted under."""

    def __init__(self, record_id: str, why: str, detail: str) -> None:
        super().__init__(f"record {record_id!r}: {detail}")
        self.why = why


@dataclass(frozen=True, slots=True)
class DialogueRules:
    """Which turns of a dialogue are rendered.

    `system` is the system turn of dialogues that bring none: None leaves it out, "" keeps an empty
    one. `system_override` puts it in the place of the dialogue's own (None: removes that).
    `system_dropout` is the share of dialogues trained without any system turn, drawn from the seed
    and the record id. `alternation: repair` leaves out empty messages and answers to nothing, and
    joins neighbours of one role; such a message is trained only if all of its parts are.
    """

    system: str | None = None
    system_override: bool = False
    system_dropout: float = 0.0
    seed: int = 42
    alternation: Literal["strict", "repair"] = "strict"

    def training_turns(self, record: Record) -> list[Turn]:
        """Return the turns to train on; raises Unrenderable."""
        turns = self.turns(record)
        if turns[0]["role"] == "system" and self._drops_system(record_id(record)):
            return turns[1:]
        return turns

    def prompt_turns(self, record: Record) -> list[Turn]:
        """Return the turns that a next answer follows, hence without a last one."""
        turns = self.turns(record)
        return turns[:-1] if turns[-1]["role"] == "assistant" else turns

    def turns(self, record: Record) -> list[Turn]:
        """Return the turns, the system turn included; raises Unrenderable."""
        turns: list[Turn] = read_messages(record)
        if self.alternation == "repair":
            turns = repair_turns(turns)
        check_turns(record_id(record), turns)
        if turns[0]["role"] == "system" and self.system_override:
            turns = turns[1:]
        if turns[0]["role"] != "system" and self.system is not None:
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns

    def _drops_system(self, name: str) -> bool:
        digest = hashlib.sha256(f"system\0{self.seed}\0{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.system_dropout * 2**64


def record_id(record: Record) -> str:
    """Return the id of a record, "" where it has none yet."""
    return str(record.get("id") or "")


def read_messages(record: Record) -> list[Turn]:
    """Return the turns of a dialogue; a prompt with its completion is a dialogue of two."""
    if record.get("messages") is not None:
        return list(record["messages"])
    turns = (("user", record.get("prompt")), ("assistant", record.get("completion")))
    return [{"role": role, "content": text} for role, text in turns if text is not None]


def is_trained(turn: Turn) -> bool:
    """Return whether the turn is an answer that is not marked with `train: false`."""
    return turn["role"] == "assistant" and turn.get("train") is not False


def repair_turns(turns: list[Turn]) -> list[Turn]:
    """Return turns that alternate: none empty, no answer to nothing, neighbours of a role joined.

    Unknown roles and system turns behind the first question stay, for the check to refuse.
    """
    repaired: list[dict[str, Any]] = []
    for turn in turns:
        text, role = turn["content"] or "", turn["role"]
        if not text.strip() or (role == "assistant" and not _asked(repaired)):
            continue
        if repaired and repaired[-1]["role"] == role:
            last = repaired[-1]
            last["content"] = f"{last['content']}{JOINT}{text}"
            if turn.get("train") is False:
                last["train"] = False
        else:
            repaired.append(dict(turn))
    return [*repaired]


def check_turns(name: str, turns: list[Turn]) -> None:
    """Raise Unrenderable unless turns read [system,] user, assistant, user, ... with contents."""
    if not turns:
        raise Unrenderable(name, "no_messages", "no message to render")
    expected = "user"
    for number, turn in enumerate(turns):
        role, where = turn["role"], f"message {number}"
        if role not in ROLES:
            hint = did_you_mean(str(role), ROLES)
            detail = f"{where} has role {role!r}{hint} (known: {', '.join(ROLES)})"
            raise Unrenderable(name, "unknown_role", detail)
        if role == "system" and number == 0:
            continue
        if role != expected:
            detail = (
                f"{where} has role {role!r}, expected {expected!r}; "
                "template.alternation: repair mends what it can"
            )
            raise Unrenderable(name, "bad_alternation", detail)
        if not (turn["content"] or "").strip():
            raise Unrenderable(name, "empty_message", f"{where} ({role}) is empty")
        expected = "assistant" if role == "user" else "user"
    if turns[-1]["role"] == "system":
        raise Unrenderable(name, "no_messages", "a system turn and nothing else")


def _asked(turns: list[dict[str, Any]]) -> bool:
    return any(turn["role"] != "system" for turn in turns)
