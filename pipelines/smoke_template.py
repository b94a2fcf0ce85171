"""What becomes of `template: {name: model}` in a smoke run, whose tiny model has no template.

The tokenizer of the model that the recipe names is kept, with the chat template that it brings,
where both are on this machine (a folder, or the Hub's cache): a smoke run fetches no model. Where
they are not, the dialogues are rendered as ChatML, and a line says so.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STAND_IN = "chatml"
TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def keep_own_template(values: dict[str, Any], base: Any) -> None:
    """Give a recipe of smoke size the tokenizer of `base`, its `model` section before.

    Does nothing where its template is another one, or where it names its tokenizer or model.
    """
    template, tokenizer, model = (values.get(key) for key in ("template", "tokenizer", "model"))
    if not (isinstance(template, dict) and template.get("name") == "model"):
        return
    if not (isinstance(base, Mapping) and base.get("model_name_or_path")):
        return
    if isinstance(model, dict) and model.get("model_name_or_path"):
        return
    if isinstance(tokenizer, dict) and tokenizer.get("name_or_path"):
        return
    name, revision = str(base["model_name_or_path"]), base.get("revision")
    folder = find_tokenizer(name, revision)
    if folder is not None:
        logger.info("smoke: the tokenizer and the chat template are those of %s", name)
        values["tokenizer"] = {"name_or_path": str(folder)}
        return
    logger.warning(
        "smoke: template %s in the place of the model's own, which is not on this machine; "
        "`hf download %s %s %s %s%s` brings it",
        STAND_IN, name, TOKENIZER, CONFIG, TEMPLATE, f" --revision {revision}" if revision else "",
    )  # fmt: skip
    kept = {key: value for key, value in template.items() if key != "control_tokens"}
    values["template"] = {**kept, "name": STAND_IN}


def find_tokenizer(name: str, revision: str | None) -> Path | None:
    """Return the folder with a model's tokenizer and chat template; None where one is not here."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = _cached(name, revision)
        if cached is None:
            return None
        folder = cached
    if not (folder / TOKENIZER).is_file():
        return None
    config = folder / CONFIG
    in_config = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return folder if in_config or (folder / TEMPLATE).is_file() else None


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of the Hub's cache that holds a model's tokenizer."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, TOKENIZER, revision=revision)
    except HFValidationError:  # no Hub id: loading the model says so
        return None
    return Path(found).parent if isinstance(found, str) else None
