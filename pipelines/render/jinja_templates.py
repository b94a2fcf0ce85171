"""Chat templates in Jinja, a model's own or a user's, as templates that give pieces.

The text is rendered with marks in the place of each content, so that it is known which characters
are content: only what the template itself writes can become a control token. What is rendered with
the contents themselves must be the same text, else the record is refused.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from pipelines.errors import TemplateError
from pipelines.render.dialogues import (
    ROLES,
    DialogueRules,
    Record,
    Turn,
    Unrenderable,
    is_trained,
    record_id,
)
from pipelines.render.pieces import Piece

# Characters of a private use area: they stand around marks, never in what is returned.
OPEN, CLOSE = "\ue000", "\ue001"
GENERATION, END_GENERATION = f"{OPEN}+{CLOSE}", f"{OPEN}-{CLOSE}"

QUESTION: Turn = {"role": "user", "content": "question"}
ANSWER: Turn = {"role": "assistant", "content": "answer"}
GENERATION_HINT = (
    "put each answer and its end token between {% generation %} and {% endgeneration %}"
)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`: marks what it holds as written by the model."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{GENERATION}{caller()}{END_GENERATION}"


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """Return the compiled template, sandboxed and with white space handled as transformers does.

    Raises TemplateError where it is no Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", "?")
        raise TemplateError(f"the chat template, line {line}: {error}") from error


class Mark(NamedTuple):
    """A piece, the number of the message it is the content of, and of its generation block.

    Both are -1 for none.
    """

    piece: Piece
    message: int
    block: int


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A Jinja chat template for dialogues of known special tokens.

    `end` are the pieces that end an answer, known from a dialogue of two turns; it is empty where
    the template says by generation blocks what is trained. Use `open_jinja_template`.
    """

    name: str
    chat_template: str
    special_tokens: tuple[str, ...]
    control_tokens: tuple[str, ...]
    rules: DialogueRules
    variables: Mapping[str, str] = field(default_factory=dict)
    end: tuple[Piece, ...] = ()
    stop: str = ""
    stop_texts: tuple[str, ...] = ()

    def render(self, record: Record) -> list[Piece]:
        """Return the training pieces of a dialogue; raises Unrenderable."""
        return self._pieces(record_id(record), self.rules.training_turns(record))

    def render_parts(self, record: Record) -> list[list[Piece]]:
        """Return what heads the dialogue, then each question with its answer, as `render`.

        One part only where the last of them by itself would not be written the same.
        """
        turns, name = self.rules.training_turns(record), record_id(record)
        first = int(turns[0]["role"] == "system")
        starts = range(first, len(turns), 2)
        pieces = self._pieces(name, turns)
        if len(starts) == 1:
            return [[], pieces]
        ends = [*(self._pieces(name, turns[:start]) for start in starts[1:]), pieces]
        last = pieces[len(ends[-2]) :]
        alone = self._pieces(name, [*turns[:first], *turns[starts[-1] :]])
        head = alone[: max(0, len(alone) - len(last))]
        if alone != [*head, *last] or any(pieces[: len(end)] != end for end in (head, *ends)):
            return [[], pieces]
        borders = [0, len(head), *map(len, ends)]
        return [pieces[start:stop] for start, stop in pairwise(borders)]

    def render_prompt(self, record: Record) -> list[Piece]:
        """Return the pieces up to the next answer; raises Unrenderable."""
        turns = self.rules.prompt_turns(record)
        marks = self.mark_pieces(record_id(record), turns, prompt=True)
        return [mark.piece._replace(trained=False) for mark in marks]

    def _pieces(self, name: str, turns: Sequence[Turn]) -> list[Piece]:
        return [mark.piece for mark in self._train(name, turns)]

    def _train(self, name: str, turns: Sequence[Turn]) -> list[Mark]:
        marks = self.mark_pieces(name, turns, prompt=False)
        if any(mark.block >= 0 for mark in marks):
            silent = {m.block for m in marks if m.message >= 0 and not is_trained(turns[m.message])}
            return [_trained(m, trained=m.block >= 0 and m.block not in silent) for m in marks]
        return self._train_by_end(name, turns, marks)

    def _train_by_end(self, name: str, turns: Sequence[Turn], marks: list[Mark]) -> list[Mark]:
        """Train each answer and its end."""
        found = list(marks)
        for at, mark in enumerate(marks):
            if mark.message < 0 or turns[mark.message]["role"] != "assistant":
                continue
            stop = at + 1 + len(self.end)
            behind = tuple(each.piece for each in marks[at + 1 : stop])
            if behind != self.end:
                detail = f"message {mark.message} does not end as the last answer does"
                raise Unrenderable(name, "no_end_of_turn", f"{detail}; {GENERATION_HINT}")
            for i in range(at, stop):
                found[i] = _trained(marks[i], trained=is_trained(turns[mark.message]))
        return found

    def mark_pieces(self, name: str, turns: Sequence[Turn], *, prompt: bool) -> list[Mark]:
        """Return the pieces of turns, untrained, each with what made it; raises Unrenderable."""
        contents = [str(turn["content"]) for turn in turns]
        digest = hashlib.sha256("\0".join(contents).encode()).hexdigest()[:16]
        names = [f"{OPEN}{digest}{number}{CLOSE}" for number in range(len(turns))]
        marked = self._text(name, turns, names, prompt=prompt)
        whole = self._text(name, turns, contents, prompt=prompt)
        for variant in _variants(turns, contents):
            if _fill(marked, dict(zip(names, variant, strict=True))) == whole:
                return list(_split(marked, names, variant, self.special_tokens))
        detail = "the chat template changes what the messages say"
        raise Unrenderable(name, "content_changed", f"{detail}; use a template that does not")

    def _text(
        self, name: str, turns: Sequence[Turn], contents: Sequence[str], *, prompt: bool
    ) -> str:
        messages = [
            {"role": turn["role"], "content": content}
            for turn, content in zip(turns, contents, strict=True)
        ]
        try:
            return compile_template(self.chat_template).render(
                messages=messages, add_generation_prompt=prompt, tools=None, **self.variables
            )
        except jinja2.TemplateError as error:
            raise Unrenderable(name, "refused", f"the chat template: {error}") from error
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            detail = f"the chat template fails ({type(error).__name__}: {error})"
            raise Unrenderable(name, "refused", detail) from error


def open_jinja_template(
    name: str,
    source: str,
    *,
    special_tokens: Sequence[str],
    control_tokens: Sequence[str],
    rules: DialogueRules,
    variables: Mapping[str, str],
) -> JinjaTemplate:
    """Return the template after trying it on small dialogues.

    Raises TemplateError where it trains no end of an answer, or where its prompt is not what its
    dialogues begin with.
    """
    known = tuple(dict.fromkeys((*special_tokens, *control_tokens)))
    template = JinjaTemplate(
        name, source, known, tuple(control_tokens), replace(rules, system=None), variables
    )
    template = replace(template, **_find_end(template))
    for turns in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER]):
        record = {"id": "a dialogue to try the template", "messages": turns}
        prompt, whole = template.render_prompt(record), template.render(record)
        untrained = [piece._replace(trained=False) for piece in whole[: len(prompt)]]
        behind = whole[len(prompt) :]
        if prompt != untrained or not (behind and behind[0].trained):
            raise TemplateError(
                f"template {name!r}: with add_generation_prompt it gives {_show(prompt)!r}, a "
                f"whole dialogue is {_show(whole)!r}; all before the answer must be the same"
            )
    return replace(template, rules=rules)


def _find_end(template: JinjaTemplate) -> dict[str, Any]:
    """Return what ends an answer, from what follows the last one."""
    marks = template.mark_pieces("a dialogue to try the template", [QUESTION, ANSWER], prompt=False)
    answers = [at for at, mark in enumerate(marks) if mark.message == 1]
    behind = marks[answers[-1] + 1 :] if answers else []
    stops = [at for at, mark in enumerate(behind) if mark.piece.control]
    if not stops:
        raise TemplateError(
            f"template {template.name!r}: no control token ends an answer, so a model would never "
            "stop; end the assistant's turns with one, and name it in template.control_tokens"
        )
    end = behind[: stops[0] + 1]
    has_blocks = any(mark.block >= 0 for mark in marks)
    if has_blocks and end[-1].block < 0:
        raise TemplateError(
            f"template {template.name!r}: {end[-1].piece.control!r} ends an answer, outside of "
            f"its generation block; {GENERATION_HINT}"
        )
    return {"end": tuple(mark.piece for mark in end), "stop": end[-1].piece.control}


def _split(
    marked: str, names: Sequence[str], contents: Sequence[str], special_tokens: Sequence[str]
) -> Iterator[Mark]:
    """Yield the pieces of a text with marks; blanks right before a content go with it."""
    numbers = {name: number for number, name in enumerate(names)}
    longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
    wanted = (GENERATION, END_GENERATION, *names, *longest_first)
    block, is_open, lead = -1, False, ""
    for part in re.split(f"({'|'.join(map(re.escape, wanted))})", marked):
        inside = block if is_open else -1
        if part in numbers:
            number = numbers[part]
            yield Mark(Piece(lead + contents[number]), number, inside)
            lead = ""
            continue
        if lead:
            yield Mark(Piece(lead), -1, inside)
            lead = ""
        if part in (GENERATION, END_GENERATION):
            is_open = part == GENERATION
            block += is_open
        elif part in longest_first:
            yield Mark(Piece(None, part), -1, inside)
        elif part:
            text = part.rstrip(" ")
            lead = part[len(text) :]
            if text:
                yield Mark(Piece(text), -1, inside)
    if lead:
        yield Mark(Piece(lead), -1, block if is_open else -1)


def _variants(turns: Sequence[Turn], contents: Sequence[str]) -> Iterator[list[str]]:
    """Yield the contents as they are, then stripped for some of the roles, as templates do."""
    for number in range(len(ROLES) + 1):
        for stripped in combinations(ROLES, number):
            yield [
                text.strip() if turn["role"] in stripped else text
                for turn, text in zip(turns, contents, strict=True)
            ]


def _fill(marked: str, contents: Mapping[str, str]) -> str:
    pattern = "|".join(map(re.escape, contents))
    return re.sub(pattern, lambda match: contents[match.group()], marked)


def _trained(mark: Mark, *, trained: bool) -> Mark:
    return mark._replace(piece=mark.piece._replace(trained=trained))


def _show(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text or piece.control or "" for piece in pieces)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON as transformers' own filter writes it, unescaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
