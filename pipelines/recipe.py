"""Recipes: what to train, on what, how. One flat YAML each; every problem is reported at once.

Leaf keys carry the upstream names (transformers.TrainingArguments, peft.LoraConfig). Unknown keys
are errors with a suggestion. Hardware is a second small file, chosen by the recipe's `hardware`.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import RecipeError, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ScratchConfig(Section):
    """A model built from random weights: the GPTBigCodeConfig fields that matter."""

    model_type: Literal["gpt_bigcode"] = "gpt_bigcode"
    n_layer: Count = 4
    n_head: Count = 4
    n_embd: Count = 256
    n_positions: Count = 512


class Model(Section):
    """The base model: a hub id or folder with its revision, or `config` for random weights."""

    model_name_or_path: str | None = None
    revision: str | None = None
    config: ScratchConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("give either model_name_or_path or config")
        return self


class Tokenizer(Section):
    """The model's own tokenizer, another one by path, or a byte-level BPE trained on the corpus."""

    name_or_path: str | None = None
    train_vocab_size: Annotated[int, Field(ge=300, le=65_536)] | None = None


class Source(Section):
    """Where raw rows come from. Which of the keys a source needs is said by its `type`."""

    type: Literal["repository", "oasst", "code-alpaca", "gpteacher", "stack-exchange"]
    id: str
    path: str | None = None
    distribution: str | None = None
    repository: str | None = None
    dataset: str | None = None
    site: str | None = None
    revision: str | None = None
    license: str | None = None
    exclude: tuple[str, ...] = ()
    max_records: Count | None = None


class Dedup(Section):
    """Near-duplicates: word n-gram shingles, MinHash candidates, verified Jaccard >= threshold."""

    ngram: Count = 5
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    seed: int = 42


class Curation(Section):
    """What is kept. `languages` are ISO 639-1 codes of the prose; empty keeps every language."""

    languages: tuple[str, ...] = ("en",)
    language_threshold: Fraction = 0.5
    max_file_bytes: Count = 1_000_000
    max_line_length: Count = 1000
    max_mean_line_length: Count = 100
    min_alphanumeric: Fraction = 0.25
    min_completion_chars: Annotated[int, Field(ge=0)] = 20
    dedup: Dedup = Dedup()


class Split(Section):
    """Held-out shares by group hash: validation for the curve, test for the gate."""

    validation: Fraction = 0.05
    test: Fraction = 0.05
    seed: int = 42


class Template(Section):
    """How a record becomes text. `train_on_prompt` puts the prompt's tokens into the loss too."""

    name: Literal["plain", "starchat", "alpaca", "question-answer"] = "plain"
    train_on_prompt: bool = False
    system: str | None = None


class Fim(Section):
    """Fill-in-the-middle on `text` records: share permuted, and share of those in SPM order."""

    fim_rate: Fraction = 0.0
    fim_spm_rate: Fraction = 0.5
    seed: int = 42


class Tokenization(Section):
    """Rows of at most `block_size` tokens; whole examples are packed into them."""

    block_size: Annotated[int, Field(ge=32)] = 1024
    rows_per_shard: Count = 2048


class Adapter(Section):
    """LoRA, with the field names of peft.LoraConfig."""

    r: Count = 8
    lora_alpha: Count = 32
    lora_dropout: Fraction = 0.0
    target_modules: tuple[str, ...]
    bias: Literal["none"] = "none"


class Training(Section):
    """The subset of transformers.TrainingArguments that recipes set, with the same meaning."""

    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: int = -1
    per_device_train_batch_size: Count = 1
    per_device_eval_batch_size: Count = 4
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    logging_steps: Count = 5
    eval_steps: Count = 50
    save_steps: Count = 50
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    seed: int = 42


class Evaluation(Section):
    """The gate: held-out loss must fall by `min_improvement` nats per token below step 0."""

    min_improvement: Annotated[float, Field(ge=0)] = 0.01
    num_samples: Annotated[int, Field(ge=0)] = 6
    max_new_tokens: Count = 64


class Hardware(Section):
    """What the training runs on; a file of `recipes/hardware`."""

    device: Literal["cpu", "cuda"]
    num_nodes: Count = 1
    processes_per_node: Count = 1
    threads_per_process: Count = 1
    strategy: Literal["ddp", "zero2", "zero3"] = "zero2"
    price_per_hour: Annotated[float, Field(gt=0)] | None = None


class Recipe(Section):
    """Everything that decides what a run does."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    curation: Curation = Curation()
    split: Split = Split()
    template: Template = Template()
    fim: Fim = Fim()
    tokenization: Tokenization = Tokenization()
    adapter: Adapter | None = None
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    hardware: str = "cpu"

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        config, tokenizer = self.model.config, self.tokenizer
        if config and not (tokenizer.name_or_path or tokenizer.train_vocab_size):
            raise ValueError(
                "a model from `config` has no tokenizer: set tokenizer.train_vocab_size or "
                "tokenizer.name_or_path"
            )
        if config and self.tokenization.block_size > config.n_positions:
            raise ValueError(
                f"tokenization.block_size {self.tokenization.block_size} is above "
                f"model.config.n_positions {config.n_positions}"
            )
        if self.split.validation + self.split.test >= 1:
            raise ValueError("split.validation + split.test leave nothing to train on")
        return self


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return _yaml_names("pipelines.recipes")


def hardware_names() -> list[str]:
    """Return the names of the shipped hardware files."""
    return [n.removeprefix("hardware/") for n in _yaml_names("pipelines.recipes", "hardware")]


def _yaml_names(package: str, folder: str = "") -> list[str]:
    root = resources.files(package).joinpath(folder)
    return sorted(p.name.removesuffix(".yaml") for p in root.iterdir() if p.name.endswith(".yaml"))


def load_recipe(
    name: str,
    *,
    data: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    smoke: bool = False,
) -> Recipe:
    """Load a recipe by shipped name or path, apply smoke, data and overrides, and validate it.

    `overrides` maps dotted keys to values (`training.max_steps: 10`, `sources.0.path: DIR`).
    Raises RecipeError listing every problem.
    """
    path, values = _read_recipe(name)
    problems: list[str] = []
    if smoke:
        _apply_smoke(values)
    if data is not None:
        _apply_data(values, data)
    for key, value in (overrides or {}).items():
        problem = _set_dotted(values, key, value)
        if problem:
            problems.append(problem)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems.extend(_explain(error))
        recipe = None
    if recipe is not None and recipe.hardware not in hardware_names():
        known = hardware_names()
        problems.append(
            f"hardware: {recipe.hardware!r} is not one of {known}"
            + did_you_mean(recipe.hardware, known)
        )
    if problems or recipe is None:
        raise RecipeError(f"{path}: " + "; ".join(problems))
    return recipe


def load_hardware(name: str) -> Hardware:
    """Load a hardware file by name."""
    text = resources.files("pipelines.recipes").joinpath(f"hardware/{name}.yaml").read_text()
    return Hardware.model_validate(yaml.safe_load(text))


def parse_override(text: str) -> tuple[str, Any]:
    """Split one `--set key=value`; the value is read as YAML, only the first "=" separates."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {text!r}: expected KEY=VALUE, e.g. training.max_steps=100")
    try:
        return key.strip(), _yaml_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: the value is not valid YAML ({error})") from error


class _Loader(yaml.SafeLoader):
    """YAML with floats as people write them: YAML 1.1 reads `2e-5` as a string."""


_Loader.yaml_implicit_resolvers = {
    **{key: list(pairs) for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _yaml_load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass


def _read_recipe(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        where, text = str(path), path.read_text(encoding="utf-8")
    elif name in recipe_names():
        where = f"recipe {name}"
        text = resources.files("pipelines.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    else:
        known = recipe_names()
        raise RecipeError(
            f"unknown recipe {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)}; "
            "or give the path of a .yaml file)"
        )
    try:
        values = _yaml_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected keys and values, got {type(values).__name__}")
    return where, values


def _apply_data(values: dict[str, Any], data: str) -> None:
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
    kept = {k: v for k, v in sources[0].items() if k in ("type", "license", "exclude")}
    # Another corpus must not share ids, hence splits and cache, with the recipe's own source.
    name = re.sub(r"[^a-z0-9]+", "-", Path(data).name.lower()).strip("-") or "data"
    values["sources"] = [{**kept, "id": name, "path": data}]


SMOKE: dict[str, Any] = {
    "model": {
        "model_name_or_path": None,
        "config": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 256},
        "dtype": "float32",
    },
    "tokenizer": {"train_vocab_size": 512},
    "tokenization": {"block_size": 256},
    "adapter": None,
    "training": {
        "max_steps": 20,
        "learning_rate": 3.0e-3,
        "warmup_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_steps": 10,
        "save_steps": 5,
    },
    "split": {"validation": 0.1, "test": 0.1},
    "evaluation": {"num_samples": 2, "max_new_tokens": 16},
    "hardware": "cpu",
}
SMOKE_RECORDS = 300


def _apply_smoke(values: dict[str, Any]) -> None:
    """Shrink a recipe to a run of seconds: a small random model, 300 records, 20 steps."""
    keep_tokenizer = isinstance(values.get("tokenizer"), dict) and values["tokenizer"].get(
        "name_or_path"
    )
    for section, changes in SMOKE.items():
        if section == "tokenizer" and keep_tokenizer:
            continue
        current = values.get(section)
        merge = isinstance(current, dict) and isinstance(changes, dict) and section != "model"
        values[section] = {**current, **changes} if merge else changes  # type: ignore[dict-item]
    for source in values.get("sources") or ():
        if isinstance(source, dict):
            source.setdefault("max_records", SMOKE_RECORDS)


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> str | None:
    """Set a dotted key in nested dicts and lists; return the problem, if any."""
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                return (
                    f"{key}: {part!r} is not one of the {len(node)} entries (0 to {len(node) - 1})"
                )
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            return f"{key}: {part!r} is below {node!r}, which holds no keys"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"{key}: {last!r} is not one of the {len(node)} entries (0 to {len(node) - 1})"
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        return f"{key}: {last!r} is below {node!r}, which holds no keys"
    return None


def _explain(error: ValidationError) -> Iterator[str]:
    """Yield one line for each problem: the dotted key, what is wrong, and what may be meant."""
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(Recipe, location[:-1])
            hint = did_you_mean(location[-1], known) or f" (known: {', '.join(known)})"
            yield f"{key}: unknown key{hint}"
        elif problem["type"] == "missing":
            yield f"{key}: required, but not set"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            yield f"{key}: {message}{value}" if key else message


def _known_keys(section: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys that exist at a place in the recipe."""
    for part in location:
        if part.isdigit():
            continue
        field = section.model_fields.get(part)
        inner = _section_of(field.annotation) if field else None
        if inner is None:
            return []
        section = inner
    return sorted(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
