"""The model of a recipe, before and after training.

Invariant: `build_model` gives the same weights in every process (recipe.training.seed), so step 0
can be measured again at any time. A trained run's `model/` is always a whole model that
AutoModelForCausalLM loads, also after LoRA (whose adapter lies beside it, in `model/adapter`).
"""

import functools
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTBigCodeConfig,
)

from pipelines.errors import RecipeError, StoreError, TrainingError, did_you_mean
from pipelines.model_settings import ScratchConfig
from pipelines.recipe import Adapter, Recipe

logger = logging.getLogger(__name__)

VOCABULARY_MULTIPLE = 128  # rows of the embedding: keeps the head's matrix product aligned
DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
    "residual_dropout", "embedding_dropout",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def build_model(recipe: Recipe, tokenizer_dir: Path) -> Any:
    """Return the recipe's untrained model on the CPU, with its adapter where it has one.

    Weights that are trained are float32 (the strategy keeps lower precision beside them); a frozen
    base is in model.dtype. Raises RecipeError or TrainingError where it cannot be built.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        new_ids: list[int] = []
        if recipe.model.config is not None:
            model = _from_scratch(recipe, recipe.model.config, tokenizer)
        else:
            model, new_ids = _from_pretrained(recipe, tokenizer)
        for name, value in _special_ids(tokenizer).items():
            setattr(model.config, name, value)
        model.generation_config = GenerationConfig(**_special_ids(tokenizer))
        _check_positions(model, recipe)
        return _add_adapter(model, recipe.adapter, new_ids) if recipe.adapter else model


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer folder; TrainingError where it has no pad token apart from its eos token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise TrainingError(
            f"{folder}: the tokenizer's pad token is {tokenizer.pad_token!r}; it needs one of its "
            "own (StarCoder's is <fim_pad>), or the end of a text is never learned"
        )
    return tokenizer


def load_trained(folder: Path) -> Any:
    """Load a run's `model/` for evaluation or serving: whole weights, safetensors, eval mode.

    Raises StoreError where its files are damaged.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"{folder}: the model cannot be loaded ({str(error).splitlines()[0]}); "
            "train it again with --force"
        ) from error


def save_trained(model: Any, folder: Path, tokenizer_dir: Path, dtype: str) -> None:
    """Write a whole, unsharded model with its tokenizer to a new folder. Changes `model`.

    An adapter is written to `folder/adapter` first and then merged.
    """
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        model = model.merge_and_unload()
    model.to(getattr(torch, dtype))
    model.config.use_cache = True
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).exists():
            shutil.copyfile(tokenizer_dir / name, folder / name)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (all parameters, trainable parameters); tied weights count once.

    Under ZeRO-3 a parameter's own size is that of its shard, and `ds_numel` the true one.
    """
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _from_scratch(recipe: Recipe, values: ScratchConfig, tokenizer: Any) -> Any:
    shape = values.model_dump(exclude={"model_type"})
    config = GPTBigCodeConfig(
        vocab_size=_round_up(_num_ids(tokenizer)), **_special_ids(tokenizer), **shape
    )
    _without_dropout(config)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=recipe.model.attn_implementation
    )


def _from_pretrained(recipe: Recipe, tokenizer: Any) -> tuple[Any, list[int]]:
    """Return the base model with rows for every token id, and the ids its own tokenizer lacks."""
    name, revision = recipe.model.model_name_or_path, recipe.model.revision
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        _without_dropout(config)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=torch.float32 if recipe.adapter is None else getattr(torch, recipe.model.dtype),
            attn_implementation=recipe.model.attn_implementation,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(
            f"model.model_name_or_path {name!r} cannot be loaded: {reason} (a folder or hub id "
            "with config.json and safetensors weights is expected; a gated model needs its "
            "license accepted on the Hub and HF_TOKEN)"
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    new_ids = _new_ids(tokenizer, _base_vocabulary(str(name), revision), rows)
    if new_ids:
        _add_rows(model, new_ids, rows, _num_ids(tokenizer))
    return model, new_ids


def _base_vocabulary(name: str, revision: str | None) -> dict[str, int] | None:
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(
            name, revision=revision
        ).get_vocab()
    except (OSError, ValueError):
        return None  # a folder of weights alone: every row it has counts as known
    return vocabulary


def _new_ids(tokenizer: Any, base: dict[str, int] | None, rows: int) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    if base is None:
        return sorted(i for i in vocabulary.values() if i >= rows)
    new_ids = sorted(i for token, i in vocabulary.items() if base.get(token) != i)
    if len(new_ids) > len(vocabulary) // 2:
        raise RecipeError(
            f"tokenizer: {len(new_ids)} of {len(vocabulary)} tokens differ from those of the base "
            "model; use the model's own tokenizer (leave the section `tokenizer` out)"
        )
    return new_ids


def _add_rows(model: Any, new_ids: list[int], old_rows: int, needed: int) -> None:
    """Give new tokens rows (a multiple of 128), each started at the mean of the known rows."""
    if needed > old_rows:
        model.resize_token_embeddings(_round_up(needed), mean_resizing=False)
    known = torch.ones(old_rows, dtype=torch.bool)
    known[[i for i in new_ids if i < old_rows]] = False
    embeddings = {id(e.weight): e.weight for e in _embeddings(model).values()}
    with torch.no_grad():
        for weight in embeddings.values():
            mean = weight[:old_rows][known].float().mean(0).to(weight.dtype)
            weight[old_rows:] = mean
            weight[new_ids] = mean
    logger.info("%d new tokens, %d embedding rows", len(new_ids), _round_up(needed))


def _embeddings(model: Any) -> dict[str, Any]:
    """Return {attribute name: module} of the input and output embeddings."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if any(module is w for w in wanted)
    }


def _add_adapter(model: Any, adapter: Adapter, new_ids: list[int]) -> Any:
    from peft import LoraConfig, get_peft_model

    check_targets(model, adapter.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=list(adapter.target_modules),
        bias=adapter.bias,
        trainable_token_indices=_trained_rows(model, new_ids) or None,
    )
    model = get_peft_model(model, config)
    # "auto" would write both whole embeddings into every checkpoint after a resize.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _trained_rows(model: Any, new_ids: list[int]) -> dict[str, list[int]]:
    """Return the rows to train per embedding; a tied head follows its input embedding."""
    if not new_ids:
        return {}
    weight = model.get_input_embeddings().weight
    return {
        name: new_ids
        for name, module in _embeddings(model).items()
        if module is model.get_input_embeddings() or module.weight is not weight
    }


def check_targets(model: Any, patterns: Iterable[str]) -> dict[str, int]:
    """Return how many modules each target pattern matches; RecipeError where one matches none.

    PEFT itself is silent about a pattern without a match as long as another one has some.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {p: sum(n == p or n.endswith(f".{p}") for n in names) for p in patterns}
    leaves = sorted({name.rpartition(".")[2] for name in names})
    problems = [
        f"{pattern!r} matches no layer{did_you_mean(pattern, leaves)}"
        for pattern, count in found.items()
        if not count
    ]
    if problems:
        raise RecipeError(
            f"adapter.target_modules: {'; '.join(problems)} "
            f"(this {model.config.model_type} has: {', '.join(leaves)})"
        )
    return found


def _check_positions(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if recipe.tokenization.block_size > limit:
        raise RecipeError(
            f"tokenization.block_size {recipe.tokenization.block_size} is above the {limit} "
            "positions of the model"
        )


def _without_dropout(config: Any) -> None:
    """Fine-tuning wants none, and StarCoder's configs carry 0.1."""
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids that model and generation need; StarCoder begins and ends with one token."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return {
        "bos_token_id": eos if bos is None else bos,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _num_ids(tokenizer: Any) -> int:
    return int(max(tokenizer.get_vocab().values())) + 1


def _round_up(size: int) -> int:
    return math.ceil(size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
