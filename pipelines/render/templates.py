"""Templates turn a prompt and its answer, or a dialogue, into pieces.

Invariant: what `render_prompt` gives at inference is a prefix of what `render` gives in training.
A template is immutable; ids are looked up by name when pieces are encoded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import TemplateError
from pipelines.render.chat_templates import ChatTemplate
from pipelines.render.dialogues import DialogueRules, Unrenderable
from pipelines.render.jinja_templates import JinjaTemplate, open_jinja_template
from pipelines.render.pieces import END_OF_TEXT
from pipelines.render.prompt_templates import FRAMES, INPUT_HEADER, PromptTemplate
from pipelines.render.turn_formats import (
    ALPACA_ASSISTANT,
    ALPACA_USER,
    CHAT_TOKENS,
    FORMATS,
    STARCHAT_SYSTEMS,
    ChatFormat,
    few_shot_format,
    read_format,
    starchat_format,
)
from pipelines.settings.template import Template as Settings

__all__ = [
    "CHAT_TOKENS",
    "INPUT_HEADER",
    "Template",
    "Unrenderable",
    "answer_end",
    "control_tokens",
    "get_template",
    "read_chat_template",
]

Template = PromptTemplate | ChatTemplate | JinjaTemplate


def get_template(settings: Settings, folder: Path | None = None) -> Template:
    """Return the template of a recipe.

    `folder` is the tokenizer's: a Jinja template takes the special tokens from it, and
    `name: model` the template itself. TemplateError where a key of the recipe can have no effect,
    or the template is none.
    """
    if settings.name in FRAMES:
        return _prompt_template(settings)
    if settings.is_jinja:
        return _jinja_template(settings, folder)
    written, system = _chat_format(settings)
    if system is not None and "system" not in written.turns:
        raise TemplateError(_no_system(settings))
    return ChatTemplate(
        settings.name,
        written,
        _rules(settings, system),
        settings.train_on_prompt,
        settings.train_role_header,
    )


def control_tokens(template: Template) -> tuple[str, ...]:
    """Return the control tokens a template renders, in the order a tokenizer gets them."""
    return template.control_tokens


def added_tokens(settings: Settings) -> tuple[str, ...]:
    """Return the control tokens a tokenizer needs for a template, which may need the tokenizer."""
    return settings.control_tokens if settings.is_jinja else get_template(settings).control_tokens


def exported_template(settings: Settings) -> str | None:
    """Return the Jinja template for the tokenizer; None where that brings its own."""
    if settings.name == "model":
        return None
    if settings.is_jinja:
        return settings.file_text
    return get_template(settings).chat_template


def answer_end(
    settings: Settings, folder: Path, chat_template: str, names: Mapping[str, str]
) -> str:
    """Return the control token that ends an answer.

    A Jinja template says so once it is tried with the tokenizer of `folder`, which need not hold
    the template and its `names` of special tokens yet; TemplateError where it trains no end.
    """
    if not settings.is_jinja:
        return get_template(settings).stop
    return _open_jinja(settings, folder, chat_template, names).stop


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a tokenizer folder, None where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found if isinstance(found, str) else None


def _prompt_template(settings: Settings) -> PromptTemplate:
    if settings.system is not None:
        raise TemplateError(_no_system(settings))
    if settings.train_role_header:
        raise TemplateError(
            f"template.train_role_header: the template {settings.name!r} has no role headers; "
            "remove the key or use a chat template"
        )
    rules = _rules(settings, None)
    return PromptTemplate(settings.name, FRAMES[settings.name], rules, settings.train_on_prompt)


def _no_system(settings: Settings) -> str:
    return (
        f"template.system: the template {settings.name!r} has no system turn; "
        "remove the key or set template.name: starchat"
    )


def _chat_format(settings: Settings) -> tuple[ChatFormat, str | None]:
    """Return the format of the turns, and the system text that goes with it."""
    if settings.name == "few-shot":
        return few_shot_format(settings.file_text or ""), settings.system
    if settings.name == "file":
        return read_format(settings.file_text or "", settings.file or "template"), settings.system
    if settings.name == "starchat" and settings.variant is not None:
        own = settings.system
        system = STARCHAT_SYSTEMS[settings.variant] if own is None else own
        if settings.variant == "alpaca":
            return starchat_format(ALPACA_USER, ALPACA_ASSISTANT), system
        return FORMATS["starchat"], system
    return FORMATS[settings.name], settings.system


def _rules(settings: Settings, system: str | None) -> DialogueRules:
    return DialogueRules(
        system,
        settings.system_override,
        settings.system_dropout,
        settings.seed,
        settings.alternation,
    )


def _jinja_template(settings: Settings, folder: Path | None) -> JinjaTemplate:
    if folder is None:
        raise TemplateError(f"the template {settings.name!r} is read with a tokenizer's folder")
    source = settings.file_text if settings.name == "file" else read_chat_template(folder)
    if source is None:
        raise TemplateError(
            f"{folder}: the tokenizer has no chat template; name one in template.name"
        )
    return _open_jinja(settings, folder, source, read_special_names(folder))


def read_special_names(folder: Path) -> dict[str, str]:
    """Return a tokenizer folder's `bos_token` and `eos_token`, where it has them."""
    config = _read_json(folder / "tokenizer_config.json")
    found = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token")}
    return {key: name for key, name in found.items() if name}


def _open_jinja(
    settings: Settings, folder: Path, source: str, names: Mapping[str, str]
) -> JinjaTemplate:
    return open_jinja_template(
        settings.name,
        source,
        special_tokens=_special_tokens(folder),
        control_tokens=settings.control_tokens,
        rules=_rules(settings, settings.system),
        variables={"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, **names},
    )


def _special_tokens(folder: Path) -> list[str]:
    added = _read_json(folder / "tokenizer.json").get("added_tokens", [])
    return [token["content"] for token in added if token.get("special")]


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
