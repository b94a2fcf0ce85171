"""Recipes: what to train, on what, how. One flat YAML each; every problem is reported at once.

Leaf keys carry the upstream names (transformers.TrainingArguments, peft.LoraConfig). Unknown keys
are errors with a suggestion. Hardware is a second small file, chosen by the recipe's `hardware`.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines.errors import RecipeError, did_you_mean
from pipelines.hardware_files import is_hardware_path, locate_hardware, read_hardware
from pipelines.language_codes import language_label
from pipelines.overrides import (
    apply_data,
    apply_smoke,
    load_mapping,
    resolve_folders,
    set_dotted,
    yield_to_overrides,
)
from pipelines.recipe_problems import explain
from pipelines.settings.fim import Fim
from pipelines.settings.hardware import Hardware
from pipelines.settings.model import Model
from pipelines.settings.preference import Preference
from pipelines.settings.section import Count, Fraction, Section
from pipelines.settings.sources import Source
from pipelines.settings.template import Template
from pipelines.settings.training import Adapter, Training
from pipelines.smoke_template import keep_own_template


class Tokenizer(Section):
    """The model's own tokenizer, another one by path, or a byte-level BPE trained on the corpus."""

    name_or_path: str | None = None
    train_vocab_size: Annotated[int, Field(ge=300, le=65_536)] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Tokenizer":
        if self.name_or_path and self.train_vocab_size:
            raise ValueError("give either name_or_path or train_vocab_size, not both")
        return self


class Dedup(Section):
    """Near-duplicates: word n-gram shingles, MinHash candidates, verified Jaccard >= threshold.

    `memory_gb` bounds what the stage holds in memory at a time, whatever the size of the data.
    `incremental` keeps the signatures of shards, so that a refresh signs new ones only. Neither
    changes the result.
    """

    ngram: Count = 5
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    seed: int = 42
    memory_gb: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] = 2.0
    incremental: bool = True


class Decontamination(Section):
    """Records that hold a benchmark's texts go. `against` lists files, or folders of them.

    A .jsonl (.jsonl.gz), .json, .parquet, .csv or .tsv file has one problem per row, a .txt file
    one text per line, any other file is one text. A text is found where a record has `coverage` of
    its n-grams of `ngram` words; one of fewer words is found as a whole; numbers alone and what has
    fewer than `min_words` words are not looked for.
    """

    against: tuple[str, ...] = ()
    ngram: Annotated[int, Field(ge=2, le=64)] = 13
    coverage: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_words: Annotated[int, Field(ge=2)] = 8


class Curation(Section):
    """What is kept. `languages` are codes of the prose (en, uk, zh-CN); empty keeps every language.

    A guess counts from `language_threshold` on, and `language_margin` above the next language; a
    text with fewer than `language_min_letters` letters is judged by its script, and by a guess only
    where that is sure. Answers are completions that are no functions, and trained turns:
    `min_answer_words`, `max_answer_words`, `min_score` (of the site), `drop_phrases` and
    `drop_phrase_lists` are off unless they are set.
    """

    languages: tuple[str, ...] = ("en",)
    language_threshold: Fraction = 0.5
    language_margin: Fraction = 0.0
    language_min_letters: Count = 20
    max_file_bytes: Count = 1_000_000
    max_line_length: Count = 1000
    max_mean_line_length: Count = 100
    min_alphanumeric: Fraction = 0.25
    max_encoded_chars: Count = 1024
    max_encoded_share: Fraction = 0.5
    min_completion_chars: Annotated[int, Field(ge=0)] = 20
    min_answer_words: Annotated[int, Field(ge=0)] = 0
    max_answer_words: Count | None = None
    min_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    drop_phrases: tuple[Annotated[str, Field(pattern=r"\w")], ...] = ()
    drop_phrase_lists: tuple[Literal["refusal", "self-reference"], ...] = ()
    dedup: Dedup = Dedup()
    decontaminate: Decontamination = Decontamination()

    @field_validator("languages")
    @classmethod
    def _known_languages(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(language_label, codes)))


RedactedKind = Literal[
    "email", "ipv4", "ipv6", "aws", "gcp", "azure", "github", "gitlab", "huggingface", "openai",
    "anthropic", "slack", "stripe", "npm", "pypi", "jwt", "pem", "url_credentials", "password",
    "secret",
]  # fmt: skip


class Redaction(Section):
    """Secrets and personal data that <EMAIL>, <IP_ADDRESS>, <KEY> and <PASSWORD> replace."""

    enabled: bool = True
    kinds: tuple[RedactedKind, ...] = get_args(RedactedKind)


class Split(Section):
    """Held-out shares by group hash: validation for the curve, test for the gate.

    `keep_predefined` leaves rows in the train, validation or test split that their data brings.
    """

    validation: Fraction = 0.05
    test: Fraction = 0.05
    seed: int = 42
    keep_predefined: bool = True


class Tokenization(Section):
    """Rows of at most `block_size` tokens; whole examples are packed into them.

    Of a dialogue that is longer, `truncation: keep-last-turns` trains the last turns that fit, and
    `split-windows` all turns, in windows; `drop` leaves it out, as it does with pairs.
    `packing: constant-length-mixing` is the seed systems' chunking instead: a stream cut at every
    block, in which examples are cut and attend to each other.
    """

    block_size: Annotated[int, Field(ge=32)] = 1024
    truncation: Literal["drop", "keep-last-turns", "split-windows"] = "drop"
    packing: Literal["best-fit", "constant-length-mixing"] = "best-fit"
    rows_per_shard: Count = 2048


class Evaluation(Section):
    """The gate: held-out loss must fall by `min_improvement` nats per token below step 0."""

    min_improvement: Annotated[float, Field(ge=0)] = 0.01
    num_samples: Annotated[int, Field(ge=0)] = 6
    max_new_tokens: Count = 64


class Recipe(Section):
    """Everything that decides what a run does.

    `auto_train` lets a refresh that finds new data start a training by itself.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    curation: Curation = Curation()
    redaction: Redaction = Redaction()
    split: Split = Split()
    template: Template = Template()
    fim: Fim = Fim()
    tokenization: Tokenization = Tokenization()
    adapter: Adapter | None = None
    training: Training = Training()
    preference: Preference | None = None
    evaluation: Evaluation = Evaluation()
    hardware: str = "cpu"
    auto_train: bool = False

    @field_validator("hardware")
    @classmethod
    def _known_hardware(cls, name: str) -> str:
        return locate_hardware(name)

    @model_validator(mode="after")
    def _preference_has_pairs(self) -> "Recipe":
        if self.preference and not any(getattr(each, "pairs", False) for each in self.sources):
            raise ValueError(
                "preference: no source makes pairs; set `pairs: true` in one of type oasst or "
                "stack-exchange, or remove the section"
            )
        return self

    @model_validator(mode="after")
    def _rates_of_known_sources(self) -> "Recipe":
        known = [source.id for source in self.sources]
        for name in self.fim.source_rates:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"fim.source_rates: no source {name!r} in this recipe{hint}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        config, tokenizer = self.model.config, self.tokenizer
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("sources: give every source a weight, or none")
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
        if config and config.n_embd % config.n_head:
            raise ValueError(
                f"model.config.n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
            )
        if config and config.model_type != "gpt_bigcode" and config.n_embd // config.n_head % 2:
            raise ValueError(
                f"model.config: n_embd / n_head is {config.n_embd // config.n_head}, but the "
                f"rotary positions of {config.model_type} need an even number"
            )
        if self.model.quantization_config and self.adapter is None:
            raise ValueError(
                "model.quantization_config: quantized weights cannot be trained; add a section "
                "`adapter`, or leave it out"
            )
        if not (self.split.validation and self.split.test):
            raise ValueError("split.validation and split.test must both be above 0")
        if self.training.max_steps < 1 and self.training.max_steps != -1:
            raise ValueError("training.max_steps must be at least 1, or -1 for num_train_epochs")
        if self.split.validation + self.split.test >= 1:
            raise ValueError("split.validation + split.test leave nothing to train on")
        return self


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return _yaml_names("pipelines.recipes")


def _yaml_names(package: str) -> list[str]:
    root = resources.files(package)
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
    base = values.get("model")
    if data is not None:
        apply_data(values, data)
    if smoke:
        apply_smoke(values)
    for key, value in (overrides or {}).items():
        problem = set_dotted(values, key, value)
        if problem:
            problems.append(problem)
    if smoke:
        yield_to_overrides(values, overrides or {})
        keep_own_template(values, base)
    resolve_folders(values)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems.extend(explain(Recipe, error))
        recipe = None
    problems += _hardware_problems(values.get("hardware"))
    if problems or recipe is None:
        raise RecipeError(f"{path}: " + "; ".join(problems))
    return recipe


def _hardware_problems(name: Any) -> list[str]:
    """Read a hardware file of the user's own with the recipe, to say its problems with it."""
    if not (isinstance(name, str) and is_hardware_path(name)):
        return []
    try:
        read_hardware(name)
    except RecipeError as error:
        return [str(error)]
    return []


def is_recipe_name(name: str) -> bool:
    """Say whether a name or path means a recipe, rather than data."""
    return Path(name).suffix in (".yaml", ".yml") or name in recipe_names()


def load_hardware(name: str) -> Hardware:
    """Load a hardware file by shipped name or path; RecipeError listing every problem."""
    return read_hardware(name)


def _read_recipe(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        try:
            where, text = str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    elif name in recipe_names():
        where = f"recipe {name}"
        text = resources.files("pipelines.recipes").joinpath(f"{name}.yaml").read_text("utf-8")
    else:
        known = recipe_names()
        raise RecipeError(
            f"unknown recipe {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)}; "
            "or give the path of a .yaml file)"
        )
    return where, load_mapping(text, where)
