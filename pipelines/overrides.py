"""Changes to a recipe's raw values before it is validated: overrides, local data, smoke size."""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import RecipeError

# The keys of a source that say where it comes from, rather than how it is read.
WHERE_FROM = frozenset(
    {
        "id", "path", "revision", "distribution", "repository", "dataset",
        "files", "sha256", "expected_rows", "splits", "site", "api_url", "raw_url",
    }
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML with floats as people write them, and every key once.

    YAML 1.1 reads `2e-5` as a string, and PyYAML lets the last of two equal keys win.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"found the key {key.value!r} twice; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    **{key: list(pairs) for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_yaml(text: str) -> Any:
    """Parse YAML without running anything; `2e-5` is a number."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass


def load_mapping(text: str, where: str) -> dict[str, Any]:
    """Parse YAML that holds keys and values; RecipeError naming `where` otherwise."""
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected keys and values, got {type(values).__name__}")
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """Split one `--set key=value`; the value is read as YAML, only the first "=" separates."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {text!r}: expected KEY=VALUE, e.g. training.max_steps=100")
    try:
        return key.strip(), load_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML ({error})") from error


def apply_data(values: dict[str, Any], data: str) -> None:
    """Point the recipe's source at a local path, instead of where it is fetched from.

    A recipe with several sources has to say which one: use the override `sources.N.path`.
    """
    sources = values.get("sources")
    if not isinstance(sources, list) or not sources or not isinstance(sources[0], dict):
        return
    if len(sources) > 1:
        raise RecipeError(
            f"data={data!r}: the recipe has {len(sources)} sources; "
            "set sources.0.path (or 1, ...) instead"
        )
    # Another corpus must not share ids, hence splits and cache, with the recipe's own source.
    name = re.sub(r"[^a-z0-9]+", "-", Path(data).name.lower()).strip("-") or "data"
    kept = {k: v for k, v in sources[0].items() if k not in WHERE_FROM}
    # Your own files need not say under which license you may use them.
    values["sources"] = [{**kept, "id": name, "path": data, "allow_unlicensed": True}]


def resolve_folders(values: dict[str, Any]) -> None:
    """Make local model and tokenizer folders and files absolute: others start elsewhere."""
    for section, key in (("model", "model_name_or_path"), ("tokenizer", "name_or_path")):
        part = values.get(section)
        path = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(path, str) and Path(path).expanduser().is_dir():
            part[key] = str(Path(path).expanduser().resolve())
    curation = values.get("curation")
    lists = curation.get("decontaminate") if isinstance(curation, dict) else None
    if isinstance(lists, dict) and isinstance(lists.get("against"), list):
        lists["against"] = [str(Path(str(p)).expanduser().resolve()) for p in lists["against"]]
    template = values.get("template")
    if isinstance(template, dict) and isinstance(template.get("file"), str):
        template["file"] = str(Path(template["file"]).expanduser().resolve())


SMOKE: dict[str, Any] = {
    "model": {
        "model_name_or_path": None,
        "config": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 1024},
        "dtype": "float32",
    },
    "tokenizer": {"train_vocab_size": 2048},
    "tokenization": {"block_size": 1024},
    "adapter": None,
    "training": {
        "max_steps": 20,
        "learning_rate": 3.0e-3,
        "warmup_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "torch_compile": False,
        "logging_steps": 1,
        "eval_steps": 10,
        "save_steps": 5,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
    },
    "split": {"validation": 0.1, "test": 0.1},
    "evaluation": {"min_improvement": 0.1, "num_samples": 2, "max_new_tokens": 16},
    "hardware": "cpu",
}
SMOKE_RECORDS = 300
SMOKE_PREFERENCE = {"max_steps": 4, "warmup_steps": 0, "gradient_accumulation_steps": 1}


def apply_smoke(values: dict[str, Any]) -> None:
    """Shrink a recipe to a run of seconds: a small random model, 300 records, 20 steps."""
    keep_tokenizer = isinstance(values.get("tokenizer"), dict) and values["tokenizer"].get(
        "name_or_path"
    )
    # A copy, as overrides are written into what this leaves.
    for section, changes in deepcopy(SMOKE).items():
        if section == "tokenizer" and keep_tokenizer:
            continue
        current = values.get(section)
        merge = isinstance(current, dict) and isinstance(changes, dict) and section != "model"
        values[section] = {**current, **changes} if merge else changes  # type: ignore[dict-item]
    if isinstance(values.get("preference"), dict):
        values["preference"] = {**values["preference"], **SMOKE_PREFERENCE}
    sources = values.get("sources")
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict):
            source.setdefault("max_records", SMOKE_RECORDS)


def yield_to_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Take back what smoke set in the place of a model or tokenizer that an override names."""
    model, tokenizer = values.get("model"), values.get("tokenizer")
    named = "model.model_name_or_path" in overrides
    configured = any(key.startswith("model.config") for key in overrides)
    if named and isinstance(model, dict) and not configured:
        model.pop("config", None)
    own = named or "tokenizer.name_or_path" in overrides
    if own and isinstance(tokenizer, dict) and "tokenizer.train_vocab_size" not in overrides:
        tokenizer.pop("train_vocab_size", None)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> str | None:
    """Set a dotted key in nested dicts and lists; return the problem, if any."""
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return f"{key}: {part!r} is not one of the {len(node)} entries, counted from 0"
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            return f"{key}: {part!r} is below {node!r}, which holds no keys"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"{key}: {last!r} is not one of the {len(node)} entries, counted from 0"
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return f"{key}: {last!r} is below {node!r}, which holds no keys"
    return None
