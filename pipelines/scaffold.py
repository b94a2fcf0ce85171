"""Writes a recipe for a user's own data, and its deployment: what `starloom new` does.

With a GPU here the recipe fine-tunes StarCoderBase-1B; without one it trains a small model from
scratch, so that what is written runs where it was written. Both are ordinary files to go on from.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.errors import RecipeError
from pipelines.recipe import Recipe, load_recipe
from pipelines.store import write_atomic

Body = Literal["messages", "prompt", "text", "code"]

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
STEPS = "  # The steps of finetune by themselves"

# The seeds' templates; code is read left to right and with its middle filled in.
RENDERING = {
    "messages": 'template: {name: starchat, system: ""}',
    "prompt": "template: {name: question-answer}",
    "text": "template: {name: plain, train_on_prompt: true}",
    "code": "template: {name: plain, train_on_prompt: true}\n"
    "fim: {fim_rate: 0.5, fim_spm_rate: 0.5}",
}

DATA = """\
# Data
sources:
  - {source}

# Curation
curation:
  languages: [en]                 # [] keeps every language
  dedup: {{ngram: 5, threshold: 0.7}}
split: {{validation: 0.05, test: 0.05}}

# Rendering
{rendering}
"""

SMALL = """\
# Model: random weights, 3.9 million parameters, which 2 CPU cores train in minutes. With a GPU,
# start from a pretrained one instead: model: {{model_name_or_path: bigcode/starcoderbase-1b}},
# no tokenizer, learning_rate 2.0e-5, hardware: gpu.
model:
  config: {{model_type: gpt_bigcode, n_layer: 4, n_head: 4, n_embd: 256, n_positions: 512}}
  dtype: float32
tokenizer: {{train_vocab_size: 4096}}

{data}tokenization: {{block_size: 512}}

# Training: 2 processes x 2 rows x 512 tokens = 2,048 tokens a step
training:
  learning_rate: 1.5e-3
  warmup_steps: 48
  weight_decay: 0.1
  adam_beta2: 0.95
  max_steps: 240
  per_device_train_batch_size: 2
  eval_steps: 40
  save_steps: 40
  seed: 42

# The gate: held-out loss at least half a nat a token below step 0
evaluation: {{min_improvement: 0.5, num_samples: 6, max_new_tokens: 64}}

hardware: cpu
"""

LARGE = """\
# Model: accept its license on the hub and run `hf auth login`, or give a local folder
model:
  model_name_or_path: bigcode/starcoderbase-1b
  revision: main                  # pin a commit before publishing numbers
  dtype: bfloat16

{data}tokenization: {{block_size: 2048}}

# Training: all weights, 16 rows a step
training:
  learning_rate: 2.0e-5
  warmup_steps: 0.03              # below 1: a share of all steps
  num_train_epochs: 3
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  gradient_checkpointing: true
  eval_steps: 50
  save_steps: 50
  seed: 42

evaluation: {{min_improvement: 0.01, num_samples: 10, max_new_tokens: 256}}

hardware: gpu
"""

DEPLOYMENT = """\
  - name: {name}
    flow_name: finetune
    entrypoint: flows/finetune.py:finetune
    description: {description}
    tags: [finetune]
    parameters: {{recipe: {name}}}
    concurrency_limit: *one
    work_pool: *cpu
"""


def check_name(name: str, recipes: Path) -> None:
    """Raise RecipeError for a name that no recipe can have, or that one has already."""
    if not NAME.fullmatch(name):
        raise RecipeError(
            f"recipe name {name!r}: expected small letters, digits and hyphens, e.g. my-code"
        )
    if (recipes / f"{name}.yaml").exists():
        raise RecipeError(
            f"recipe {name!r} exists ({recipes / name}.yaml): edit it, or choose another name"
        )


def recipe_text(name: str, source: Mapping[str, Any], body: Body, *, gpu: bool) -> str:
    """Return a recipe that trains on one source, as a commented YAML file."""
    settings = LARGE if gpu else SMALL
    found = source.get("path") or source.get("repository") or source.get("dataset")
    head = (
        f"# Made by `starloom new {name}`; edit it as you like.\n"
        f"# Run    prefect deployment run finetune/{name}        or        starloom run {name}\n"
        f"name: {name}\n"
        f"description: {_flow(f'{_MODELS[gpu]} on {found}')}\n\n"
    )
    data = DATA.format(source=_flow(dict(source)), rendering=RENDERING[body])
    return head + settings.format(data=data)


_MODELS = {True: "StarCoderBase-1B", False: "Small model from scratch"}


def write_recipe(name: str, text: str, recipes: Path) -> Recipe:
    """Write a recipe into the folder of recipes and return it; an invalid one is not kept."""
    check_name(name, recipes)
    path = recipes / f"{name}.yaml"
    write_atomic(path, text)
    try:
        return load_recipe(str(path))
    except RecipeError:
        path.unlink()
        raise


def add_deployment(project: Path, recipe: Recipe) -> None:
    """Add finetune/NAME to prefect.yaml, after the others of its kind and set like them."""
    text = project.read_text(encoding="utf-8")
    entry = DEPLOYMENT.format(name=recipe.name, description=_flow(recipe.description))
    before, steps, after = text.partition(STEPS)
    if steps:
        write_atomic(project, f"{before.rstrip()}\n{entry}\n{steps}{after}")
    else:
        write_atomic(project, f"{text.rstrip()}\n{entry}")


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()
