"""The model of a recipe, before and after training.

Invariant: `build_model` gives the same weights in every process (recipe.training.seed), so step 0
can be measured again at any time. A trained run's `model/` is always a whole model that
AutoModelForCausalLM loads, also after LoRA (whose adapter lies beside it, in `model/adapter`).
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import CONFIG_NAME

from pipelines.errors import RecipeError, StoreError, TrainingError
from pipelines.recipe import Recipe
from pipelines.settings.model import ScratchConfig
from pipelines.training.adapters import ADAPTER, add_adapter, has_adapter, save_and_merge
from pipelines.training.architectures import scratch_config, set_dropout
from pipelines.training.embeddings import add_rows, find_new_ids, num_ids, padded_size
from pipelines.training.quantization import quantized_loading

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
        stops = [*_stop_ids(tokenizer), *_own_stops(model, recipe)]
        ids = {**_special_ids(tokenizer), "eos_token_id": _one_or_more(stops)}
        model.generation_config = GenerationConfig(**ids)
        _check_positions(model, recipe)
        if recipe.adapter is None:
            return model
        return add_adapter(model, recipe.adapter, new_ids, recipe.model.revision)


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

    An adapter is written to `folder/adapter` first, with the tokenizer, whose rows peft gives the
    base model, and then merged. Raises TrainingError where the adapter was not saved whole.
    """
    if has_adapter(model):
        model = save_and_merge(model, folder, dtype)
        _copy_tokenizer(tokenizer_dir, folder / ADAPTER)
    model.to(getattr(torch, dtype))
    model.config.use_cache = True
    model.save_pretrained(folder)
    _copy_tokenizer(tokenizer_dir, folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod((folder / CONFIG_NAME).stat().st_mode)  # safetensors: for the owner's eyes only


def _copy_tokenizer(origin: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (origin / name).exists():
            shutil.copyfile(origin / name, folder / name)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (all parameters, trainable parameters); tied weights count once.

    Under ZeRO-3 a parameter's own size is that of its shard, and `ds_numel` the true one; in 4 bit
    a byte holds two.
    """
    sizes = [(_size(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _size(parameter: Any) -> int:
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    packed = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
    return size * 2 if packed else size


def _from_scratch(recipe: Recipe, values: ScratchConfig, tokenizer: Any) -> Any:
    config = scratch_config(values, padded_size(num_ids(tokenizer)), _special_ids(tokenizer))
    set_dropout(config, recipe.model.dropout)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=_attention(recipe)
    )


def _attention(recipe: Recipe) -> str:
    """Return the attention to build with: varlen, which needs packed batches, is the trainer's."""
    return "eager" if recipe.model.attn_implementation == "eager" else "sdpa"


def _from_pretrained(recipe: Recipe, tokenizer: Any) -> tuple[Any, list[int]]:
    """Return the base model with rows for every token id, and the ids its own tokenizer lacks."""
    settings = recipe.model
    name, revision = settings.model_name_or_path, settings.revision
    quantized = quantized_loading(settings.quantization_config, settings.dtype)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        set_dropout(config, settings.dropout)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=torch.float32 if recipe.adapter is None else getattr(torch, settings.dtype),
            attn_implementation=_attention(recipe),
            use_safetensors=True,
            **quantized,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(
            f"model.model_name_or_path {name!r} cannot be loaded: {reason} (a folder or hub id "
            "with config.json and safetensors weights is expected; a gated model needs its "
            "license accepted on the Hub and HF_TOKEN)"
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    new_ids = find_new_ids(tokenizer, _base_vocabulary(str(name), revision), rows)
    if new_ids:
        add_rows(model, new_ids, num_ids(tokenizer))
    return model, new_ids


def _base_vocabulary(name: str, revision: str | None) -> dict[str, int] | None:
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(
            name, revision=revision
        ).get_vocab()
    except (OSError, ValueError):
        return None  # a folder of weights alone: every row it has counts as known
    return vocabulary


def _check_positions(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    if recipe.tokenization.block_size > limit:
        raise RecipeError(
            f"tokenization.block_size {recipe.tokenization.block_size} is above the {limit} "
            "positions of the model"
        )


def _stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the end of text, and the template's end of turn."""
    named = [tokenizer.init_kwargs.get(key) for key in ("end_of_text", "end_of_answer")]
    found = [tokenizer.convert_tokens_to_ids(name) for name in named if name is not None]
    return [tokenizer.eos_token_id, *(stop for stop in found if stop is not None)]


def _own_stops(model: Any, recipe: Recipe) -> list[int]:
    """Return the base's own stop ids where its own template is used: they mean the same."""
    own = model.generation_config.eos_token_id if recipe.template.name == "model" else None
    return [own] if isinstance(own, int) else list(own or ())


def _one_or_more(ids: list[int]) -> int | list[int]:
    different = list(dict.fromkeys(ids))
    return different[0] if len(different) == 1 else different


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids that model and generation need; StarCoder begins and ends with one token."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return {
        "bos_token_id": eos if bos is None else bos,
        "eos_token_id": eos,
        "pad_token_id": tokenizer.pad_token_id,
    }
