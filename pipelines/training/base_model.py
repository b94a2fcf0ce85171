"""The base model of a recipe as seen from outside: is it here, may it be had, how large is it.

Nothing is loaded: config.json from a folder or the Hub's cache, or a table of well-known models.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.hub_access import ask_hub
from pipelines.recipe import Recipe
from pipelines.training.shapes import Shape, known_shape, read_shape, scratch_shape

DEFAULT_VOCABULARY = 49_152  # StarCoder's, where a tokenizer's own size is not known
# Models whose files the Hub gives only to those who accepted their license, and such owners.
GATED = (
    "bigcode/starcoder", "bigcode/starcoderbase", "bigcode/starcoderplus",
    "bigcode/starcoderbase-1b", "bigcode/starcoderbase-3b", "bigcode/starcoderbase-7b",
    "meta-llama/",
)  # fmt: skip
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_shape(recipe: Recipe) -> Shape | None:
    """Return the sizes of the recipe's model; None where neither its config nor its name is known.

    Raises nothing: what is wrong with a model is said by `model_problems`.
    """
    name, config = recipe.model.model_name_or_path, recipe.model.config
    if config is not None:
        vocab = recipe.tokenizer.train_vocab_size or _vocabulary(recipe) or DEFAULT_VOCABULARY
        return scratch_shape(config, vocab)
    assert name is not None, "the recipe's validator asks for one of them"
    found = find_config(name, recipe.model.revision)
    return (read_shape(found) if found else None) or known_shape(name)


def find_config(name: str, revision: str | None) -> Mapping[str, Any] | None:
    """Return a model's config.json from its folder or the Hub's cache, None where there is none."""
    path = find_file(name, revision, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def find_file(name: str, revision: str | None, file: str) -> Path | None:
    """Return the path of a model's file in its folder or the Hub's cache, None where it is not."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # a path, and no folder there
        return None
    return Path(found) if isinstance(found, str) else None


def model_problems(recipe: Recipe, *, weights: bool = True) -> list[str]:
    """Say why the base model cannot be had: not a folder of one, not cached, gated, no such model.

    Without `weights` only its tokenizer has to be here, as for the data stages.
    """
    name = recipe.model.model_name_or_path
    if not weights:
        return _tokenizer_access(recipe)
    if name is None:
        return []
    if Path(name).expanduser().is_dir():
        return _folder_problems(Path(name).expanduser()) + foreign_tokenizer(recipe)
    if name.startswith((".", "/", "~")):
        return [f"model.model_name_or_path: no folder {name!r}"]
    local = "or set model.model_name_or_path to a local folder, or try `--smoke`"
    revision = recipe.model.revision
    if not find_file(name, revision, "config.json"):
        return _hub_problems("model", name, revision, local)
    missing = _missing_weights(name, revision)
    if not missing:
        return foreign_tokenizer(recipe)
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return _hub_problems(f"{missing[0]}{more} of model", name, revision, local)


def _missing_weights(name: str, revision: str | None) -> list[str]:
    """Return the files of a model's weights that are not in its folder or the Hub's cache."""
    if find_file(name, revision, WEIGHTS):
        return []
    index = find_file(name, revision, INDEX)
    if index is None:
        return [WEIGHTS]
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [INDEX]
    return sorted(shard for shard in shards if not find_file(name, revision, str(shard)))


def _tokenizer_access(recipe: Recipe) -> list[str]:
    if recipe.tokenizer.train_vocab_size:
        return []
    name = recipe.tokenizer.name_or_path or recipe.model.model_name_or_path
    assert name is not None, "the recipe's validator asks for one of them"
    revision = recipe.model.revision if name == recipe.model.model_name_or_path else None
    if Path(name).expanduser().is_dir() or find_file(name, revision, TOKENIZER_FILE):
        return []  # what is in a folder is read by the tokenizer's own check
    if name.startswith((".", "/", "~")):
        return [f"tokenizer {name!r}: no such folder"]
    local = (
        "of the model the data stages need its tokenizer.json only: `hf download "
        f"{name} {TOKENIZER_FILE}` where there is access brings it, or set tokenizer.name_or_path "
        "to a local folder with it"
    )
    return _hub_problems("tokenizer of", name, revision, local)


def _folder_problems(folder: Path) -> list[str]:
    if not (folder / "config.json").is_file():
        return [f"model folder {folder}: no config.json, so it is not a transformers model"]
    if not list(folder.glob("*.safetensors")):
        return [f"model folder {folder}: no *.safetensors (pickle weights are refused)"]
    if (folder / INDEX).is_file():
        missing = _missing_weights(str(folder), None)
        if missing:
            lacking = f"no {', '.join(missing)}, which {INDEX} names"
            return [f"model folder {folder}: {lacking}; copy or download it again"]
    return []


def login_steps(name: str) -> str:
    """Return the exact steps to the files of a gated model."""
    return (
        f"accept its license on https://huggingface.co/{name} in the browser, then `hf auth login` "
        "(or HF_TOKEN=<a token with read access> in the environment)"
    )


def _hub_problems(what: str, name: str, revision: str | None, local: str) -> list[str]:
    """Ask the Hub whether this machine may download a model's files."""
    refusal = ask_hub(name, revision, "model")
    if refusal is None:
        return []
    subject = f"{what} {name!r}"
    if refusal.kind == "gated":
        return [f"{subject} is gated and {refusal.reason}: {login_steps(name)}; {local}"]
    if refusal.kind in ("unknown", "revision"):
        page = f"https://huggingface.co/{name}"
        login = ", `hf auth login`" * (refusal.kind == "unknown")
        return [f"{subject} {refusal.reason}: see {page}{login}; {local}"]
    gated = name in GATED or f"{name.partition('/')[0]}/" in GATED
    fetch = f": `hf download {name}{f' --revision {revision}' if revision else ''}` brings it"
    steps = f" and is gated: {login_steps(name)}" if gated else f"{fetch} where the hub is reached"
    return [f"{subject} is not in the local cache and {refusal.reason}{steps}; {local}"]


def foreign_tokenizer(recipe: Recipe) -> list[str]:
    """Say that the recipe's tokenizer is not the one its base model was trained with.

    Some tokens more are fine, as `find_new_ids` of training has it. Nothing is said where one of
    both is not here.
    """
    name, given = recipe.model.model_name_or_path, recipe.tokenizer.name_or_path
    base = _token_ids(name, recipe.model.revision) if name else None
    if base is None or given == name:
        return []
    if recipe.tokenizer.train_vocab_size:
        which = "tokenizer.train_vocab_size: the ids of a tokenizer trained on your data"
    else:
        ids = _token_ids(given, None) if given else None
        if ids is None or 2 * sum(base.get(t) != i for t, i in ids.items()) <= len(ids):
            return []
        which = f"tokenizer.name_or_path {given!r}: most of its ids"
    own = "use the model's own tokenizer (leave the section `tokenizer` out)"
    return [f"{which} mean something else to the weights of {name!r}; {own}"]


def _vocabulary(recipe: Recipe) -> int | None:
    """Return the number of ids of a given tokenizer's file, None where it is not here."""
    name = recipe.tokenizer.name_or_path
    ids = _token_ids(name, None) if name else None
    return max(ids.values()) + 1 if ids else None


def _token_ids(name: str, revision: str | None) -> dict[str, int] | None:
    """Return the ids of a tokenizer's file, None where it is not here or of another form."""
    path = find_file(name, revision, TOKENIZER_FILE)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        ids = found["model"]["vocab"] | {t["content"]: t["id"] for t in found["added_tokens"]}
        return {str(token): int(i) for token, i in ids.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
