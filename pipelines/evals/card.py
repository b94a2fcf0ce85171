"""The model card: what the model is, what it has seen under which licenses, how good it is.

Every number comes from the run's manifests, training result and scorecard. A record without a
license stops the card: nothing may be published that nobody may use.
"""

from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import StarloomError
from pipelines.evals.report import (
    Data,
    funnel_table,
    license_table,
    loss_table,
    reload_text,
    source_table,
    token_table,
    training_rows,
)
from pipelines.evals.scorecard import verdict
from pipelines.lineage import Lineage, build_lineage
from pipelines.markdown import cell, fence, table
from pipelines.recipe import Recipe
from pipelines.records import new_record
from pipelines.render.templates import get_template
from pipelines.runs import Run
from pipelines.store import Store, write_atomic

CARD = "card.md"

# The identifiers that the Hub knows (its list is lower case SPDX), as far as sources carry them.
HUB_LICENSES = frozenset(
    {
        "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-2.5", "cc-by-sa-3.0",
        "cc-by-sa-4.0", "cc0-1.0", "gpl-2.0", "gpl-3.0", "isc", "lgpl-3.0", "mit", "mpl-2.0",
        "unlicense",
    }
)  # fmt: skip
# A model made from one of these stays under its license, whatever the data.
BASE_LICENSES = {"bigcode/": "bigcode-openrail-m"}
OPENRAIL = """\
- The base model is under BigCode OpenRAIL-M v1, and so is this one: the use restrictions of its
  Attachment A hold for this model and for what is made from it, and must be passed on
  (https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement)."""
LIMITATIONS = """\
- The loss above is measured on held-out records of the same sources and says little about other
  code. Nothing here measures whether generated code runs or is safe.
- The model can repeat passages of its training data word for word. Whoever uses its output must
  respect the licenses listed above, attribution included.
- It was not trained to refuse anything, and it states falsehoods as easily as facts."""

EXAMPLE_PROMPT = "Return the sum of two numbers."
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder that holds model.safetensors
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer({prompt!r}, return_tensors="pt")
output = model.generate(
    inputs.input_ids,
    attention_mask=inputs.attention_mask,
    eos_token_id=tokenizer.convert_tokens_to_ids({stop!r}),
    max_new_tokens=64,
    do_sample=False,
)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))"""


def write_card(run: Run, store: Store) -> Path:
    """Write the run's model card and return its path.

    Raises StarloomError where the run is not evaluated or a training record has no license.
    """
    training, scorecard = run.read("training.json"), run.read("scorecard.json")
    if not training or not scorecard:
        raise StarloomError(
            f"run {run.name} is not evaluated yet: `starloom run {run.info()['recipe']}` does it"
        )
    lineage = build_lineage(run, store)
    check_licenses(lineage)
    path = run.path / CARD
    write_atomic(path, card_text(run.recipe(), lineage, training, scorecard, run.model))
    return path


def check_licenses(lineage: Lineage) -> None:
    """Raise StarloomError naming every source of training records that state no license."""
    missing = [
        f"{name} ({source['used']['licenses']['']:,} records)"
        for name, source in lineage["sources"].items()
        if source["used"]["licenses"].get("")
    ]
    if missing:
        raise StarloomError(
            f"run {lineage['run']}: no license is known for {', '.join(missing)}; set `license` of "
            "that source in the recipe, or leave those records out"
        )


def card_text(
    recipe: Recipe,
    lineage: Lineage,
    training: Data,
    scorecard: Data,
    folder: Path | None = None,
) -> str:
    """Return the card as Markdown with the front matter that the Hub reads.

    `folder` holds the tokenizer, which a template in Jinja needs.
    """
    about = recipe.description or "A fine-tuned model"
    parts = [
        front_matter(recipe, lineage),
        f"# {recipe.name}",
        f"{about}. Made by starloom, run {lineage['run']}.",
        f"> {verdict(dict(scorecard)).reason}",
        "## How to load",
        fence(load_snippet(recipe, folder), "python"),
        "## Training data",
        source_table(lineage),
        license_table(lineage),
        _examples(lineage),
        "Rows by stage, with the digest of each result:",
        funnel_table(lineage),
        token_table(lineage),
        "## Rendering",
        table(["what", "value"], _rendering_rows(recipe)),
        "## Training",
        table(["what", "value"], training_rows(recipe, lineage, training)),
        table(["parameter", "value"], _parameter_rows(recipe)),
        "## Evaluation",
        loss_table(scorecard),
        reload_text(scorecard["reload_check"]),
        "## Limitations",
        _limitations(recipe, lineage),
    ]
    return "\n\n".join(parts) + "\n"


def load_snippet(recipe: Recipe, folder: Path | None = None) -> str:
    """Return Python that loads the model and completes a prompt in the form it was trained on."""
    template = get_template(recipe.template, folder)
    pieces = template.render_prompt(new_record(id="example", prompt=EXAMPLE_PROMPT))
    prompt = "".join(piece.text or piece.control or "" for piece in pieces)
    return SNIPPET.format(prompt=prompt, stop=template.stop)


def front_matter(recipe: Recipe, lineage: Lineage) -> str:
    """Return the YAML head of the card."""
    base = recipe.model.model_name_or_path
    fields: dict[str, Any] = {
        **license_fields(recipe, lineage),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["starloom"],
    }
    if base and not Path(base).is_absolute():  # a folder of this machine is nobody else's base
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def license_fields(recipe: Recipe, lineage: Lineage) -> dict[str, str]:
    """Return the license of the model: the base model's, or the one that all records share."""
    base = recipe.model.model_name_or_path
    if base:
        for prefix, name in BASE_LICENSES.items():
            if base.startswith(prefix):
                return {"license": name}
        return {"license": "other", "license_name": "license-of-the-base-model"}
    licenses = {
        name for source in lineage["sources"].values() for name in source["used"]["licenses"]
    }
    if len(licenses) == 1:
        only = licenses.pop()
        if only.lower() in HUB_LICENSES:
            return {"license": only.lower()}
        return {"license": "other", "license_name": cell(only)}
    return {"license": "other", "license_name": "licenses-of-the-training-data"}


def _examples(lineage: Lineage) -> str:
    lines = [
        f"- {cell(name)}: {cell(url)}"
        for name, source in lineage["sources"].items()
        for url in source["used"]["examples"]
    ]
    listed = "\n".join(lines) or "None of the records has a url."
    command = f"starloom trace {lineage['run']} --records"
    return f"Examples of records in the training set (`{command}` lists all):\n\n{listed}"


def _rendering_rows(recipe: Recipe) -> list[list[object]]:
    tokenizer = recipe.tokenizer
    origin = tokenizer.name_or_path or recipe.model.model_name_or_path
    return [
        ["template", recipe.template.name],
        ["prompt in the loss", "yes" if recipe.template.train_on_prompt else "no"],
        [
            "tokenizer",
            f"byte-level BPE trained on the corpus, {tokenizer.train_vocab_size} tokens"
            if tokenizer.train_vocab_size
            else f"that of {origin}",
        ],
        ["fill-in-the-middle rate", f"{recipe.fim.fim_rate:g} of code files"],
        ["of these in SPM order", f"{recipe.fim.fim_spm_rate:g}"],
        ["row length", f"{recipe.tokenization.block_size} tokens, whole examples packed"],
    ]


def _parameter_rows(recipe: Recipe) -> list[list[object]]:
    sections = {"training": recipe.training, "adapter": recipe.adapter}
    rows: list[list[object]] = [
        [f"{name}.{key}", f"{value}"]
        for name, section in sections.items()
        if section is not None
        for key, value in section.model_dump(mode="json").items()
    ]
    return [["model.dtype", recipe.model.dtype], *rows]


def _limitations(recipe: Recipe, lineage: Lineage) -> str:
    lines = [LIMITATIONS]
    if (recipe.model.model_name_or_path or "").startswith("bigcode/"):
        lines.insert(0, OPENRAIL)
    if recipe.model.config is not None:
        records = sum(source["used"]["records"] for source in lineage["sources"].values())
        lines.append(
            f"- It was trained from random weights on no more than {records:,} records: expect the "
            "form of code, not its meaning."
        )
    return "\n".join(lines)
