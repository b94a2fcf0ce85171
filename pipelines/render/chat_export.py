"""Templates written as Jinja for a tokenizer's `chat_template`: the same bytes, in transformers.

Texts stand in string literals, so Jinja's rules for white space around blocks change none. Answers
with their end are in `{% generation %}`, which is what `return_assistant_tokens_mask` reports.
"""

import json
from collections.abc import Iterable

from pipelines.render.pieces import END_OF_TEXT, Piece
from pipelines.render.turn_formats import ChatFormat, TurnFormat

REFUSED = "Conversation roles must be [system,] user, assistant, user, assistant, ..."


def literal(text: str | None) -> str:
    """Return a Jinja expression for a text."""
    return "none" if text is None else json.dumps(text, ensure_ascii=False)


def export_chat(
    written: ChatFormat, system: str | None, *, override: bool, train_role_header: bool
) -> str:
    """Return the Jinja template of a chat format; dialogues that do not alternate are refused."""
    own = literal(system) if override else f"messages[0][{_CONTENT}]"
    disordered = (
        "(message['role'] == 'user') != (loop.index0 % 2 == 0) "
        "or message['role'] not in ['user', 'assistant']"
    )
    answer = _export_answer(written.turns["assistant"], train_role_header=train_role_header)
    parts = [
        _emit(_text(written.start)),
        "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}",
        f"{{% set system = {own} %}}{{% else %}}{{% set turns = messages %}}",
        f"{{% set system = {literal(system)} %}}{{% endif %}}",
        _export_system(written.turns.get("system")),
        "{% for message in turns %}",
        f"{{% if {disordered} %}}{{{{ raise_exception({literal(REFUSED)}) }}}}{{% endif %}}",
        f"{{% if message['role'] == 'user' %}}{_export_turn(written.turns['user'])}",
        f"{{% else %}}{answer}{{% endif %}}{{% endfor %}}",
        _export_end(written, train_role_header=train_role_header),
    ]
    return "".join(parts)


def export_pair(
    *,
    start: str,
    before: str,
    before_input: str | None,
    input_header: str,
    behind: str,
    lead: str,
) -> str:
    """Return the Jinja template of a framed prompt and its completion."""
    refuse = f"{{{{ raise_exception({literal('Expected one user message and its answer.')}) }}}}"
    framed = _emit(before)
    if before_input is not None:
        framed = (
            f"{{% if {literal(input_header)} in messages[0]['content'] %}}{_emit(before_input)}"
            f"{{% else %}}{_emit(before)}{{% endif %}}"
        )
    answer = f"{literal(lead)} ~ messages[1]['content'] ~ {literal(END_OF_TEXT)}"
    return "".join(
        [
            "{% if not messages or messages[0]['role'] != 'user' or messages | length > 2 ",
            f"or (messages | length == 2 and messages[1]['role'] != 'assistant') %}}{refuse}",
            f"{{% endif %}}{_emit(start)}{framed}{{{{ messages[0]['content'] }}}}{_emit(behind)}",
            f"{{% if messages | length == 2 %}}{_generated('messages[1]', answer)}{{% endif %}}",
        ]
    )


_CONTENT = "'content'"


def _text(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text or piece.control or "" for piece in pieces)


def _emit(text: str) -> str:
    return f"{{{{ {literal(text)} }}}}" if text else ""


def _export_system(turn: TurnFormat | None) -> str:
    if turn is None:
        refuse = literal("This template has no system turn.")
        return f"{{% if system is not none %}}{{{{ raise_exception({refuse}) }}}}{{% endif %}}"
    return f"{{% if system is not none %}}{_around(turn, 'system')}{{% endif %}}"


def _export_turn(turn: TurnFormat) -> str:
    return _around(turn, f"message[{_CONTENT}]")


def _around(turn: TurnFormat, value: str) -> str:
    before = f"{_text(turn.header)}{turn.lead}"
    behind = _text((*turn.end, *turn.after))
    return f"{{{{ {literal(before)} ~ {value} ~ {literal(behind)} }}}}"


def _export_answer(turn: TurnFormat, *, train_role_header: bool) -> str:
    header, after = _text(turn.header), _text(turn.after)
    answer = f"{literal(turn.lead)} ~ message[{_CONTENT}] ~ {literal(_text(turn.end))}"
    if train_role_header:
        return _generated("message", f"{literal(header)} ~ {answer} ~ {literal(after)}")
    return f"{_emit(header)}{_generated('message', answer)}{_emit(after)}"


def _generated(message: str, expression: str) -> str:
    """Return the expression in a generation block, unless the message says `train: false`."""
    untrained = f"{message}['train'] is defined and {message}['train'] is false"
    return (
        f"{{% if {untrained} %}}{{{{ {expression} }}}}{{% else %}}"
        f"{{% generation %}}{{{{ {expression} }}}}{{% endgeneration %}}{{% endif %}}"
    )


def _export_end(written: ChatFormat, *, train_role_header: bool) -> str:
    header = written.prompt_header(train_role_header=train_role_header)
    finish = literal(_text(written.finish))
    end = (
        f"{{% if turns and turns[-1]['role'] == 'assistant' %}}{_generated('turns[-1]', finish)}"
        f"{{% else %}}{{{{ {finish} }}}}{{% endif %}}"
    )
    without = f"{{% else %}}{end}" if written.finish else ""
    return f"{{% if add_generation_prompt %}}{_emit(_text(header))}{without}{{% endif %}}"
