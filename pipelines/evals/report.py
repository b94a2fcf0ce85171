"""The pages a person reads after a run: scorecard.md, and report.md on one page.

Every number is taken from the lineage, the training result or the scorecard; nothing is computed
anew but sums and shares.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.evals.scorecard import verdict
from pipelines.lineage import Lineage, license_rows, reasons_text
from pipelines.markdown import cell, fence, table
from pipelines.recipe import Recipe, load_hardware
from pipelines.settings.hardware import Hardware

MAX_SAMPLE_CHARS = 600
GB = 10**9

Data = Mapping[str, Any]


def scorecard_text(scorecard: Data) -> str:
    """Return scorecard.md: the verdict, the losses and the reload check."""
    cost = (
        f"{scorecard['cpu_seconds']:.1f} CPU seconds, {scorecard['peak_rss'] / GB:.2f} GB of memory"
    )
    return "\n\n".join(
        [
            f"# Scorecard of {scorecard['run']}",
            f"**{_sentence(verdict(dict(scorecard)).reason)}**",
            loss_table(scorecard),
            reload_text(scorecard["reload_check"]),
            *twins_text(scorecard.get("fim") or {}),
            f"Evaluated on {scorecard['device']} in {scorecard['seconds']:.1f} s ({cost}).\n",
        ]
    )


def report_text(
    recipe: Recipe, lineage: Lineage, training: Data, scorecard: Data, samples: Iterable[Data]
) -> str:
    """Return report.md: what was trained on what, how it went, and what came of it."""
    return (
        "\n\n".join(
            [
                f"# {lineage['run']}",
                recipe.description or f"Recipe {recipe.name}.",
                f"**{_sentence(verdict(dict(scorecard)).reason)}**",
                "![Training and validation loss over steps](loss.png)",
                "## Data",
                source_table(lineage),
                license_table(lineage),
                "## Rows kept and left out",
                funnel_table(lineage),
                "## Tokens",
                token_table(lineage),
                "## Training",
                table(["what", "value"], training_rows(recipe, lineage, training)),
                "## Held-out loss",
                loss_table(scorecard),
                reload_text(scorecard["reload_check"]),
                *twins_text(scorecard.get("fim") or {}),
                "## Samples",
                samples_text(samples),
            ]
        ).rstrip()
        + "\n"
    )


def twins_text(losses: Mapping[str, float]) -> list[str]:
    """Return the losses on the same held-out code in each order, apart from the curve's."""
    if not losses:
        return []
    names = {"none": "left to right", "psm": "PSM", "spm": "SPM"}
    shown = ", ".join(f"{names[order]} {loss:.3f}" for order, loss in losses.items())
    return [f"The same held-out code in each order, nats per token: {shown}."]


def source_table(lineage: Lineage) -> str:
    """Return what was collected from each source, and how much of it is in the training set."""
    rows = [
        [
            name,
            source.get("revision") or "-",
            source.get("files", "-"),
            source.get("records", "-"),
            source["used"]["records"],
            source["used"]["urls"],
            source["used"]["authors"],
        ]
        for name, source in lineage["sources"].items()
    ]
    head = ["source", "revision", "files", "records", "in training set", "urls", "authors"]
    return table(head, rows)


def license_table(lineage: Lineage) -> str:
    """Return how many records of the training set carry which license, by source."""
    rows = [
        (name, license_, count)
        for name, source in lineage["sources"].items()
        for license_, count in license_rows(source["used"]["licenses"])
    ]
    return table(["source", "license", "records in training set"], rows)


def funnel_table(lineage: Lineage) -> str:
    """Return rows in and out of every stage, and why the others left."""
    rows = [
        [s["stage"], s["rows_in"], s["used"], s["rows_out"], reasons_text(s), s["digest"][:12]]
        for s in lineage["stages"]
    ]
    return table(["stage", "rows in", "used", "rows out", "left out", "digest"], rows)


def token_table(lineage: Lineage) -> str:
    """Return the packed rows and tokens of each split."""
    splits: dict[str, list[int]] = {}
    for shard in packed_shards(lineage):
        sums = splits.setdefault(shard["split"], [0, 0, 0])
        for i, key in enumerate(("rows", "tokens", "trained_tokens")):
            sums[i] += shard[key]
    return table(
        ["split", "rows", "tokens", "trained tokens"],
        [[name, *sums] for name, sums in splits.items()],
    )


def packed_shards(lineage: Lineage) -> list[Data]:
    """Return the shards of the dataset that training and evaluation read."""
    shards: list[Data] = next(s for s in lineage["stages"] if s["stage"] == "pack")["shards"]
    return shards


def training_rows(recipe: Recipe, lineage: Lineage, training: Data) -> list[list[object]]:
    """Return what the training did and took, as rows of name and value."""
    hardware = load_hardware(recipe.hardware)
    seconds, seen = training["seconds"], training["tokens_seen"]
    held = sum(shard["tokens"] for shard in packed_shards(lineage) if shard["split"] == "train")
    rows: list[list[object]] = [
        ["base model", base_text(recipe)],
        ["parameters", training["parameters"]],
        ["of these trained", training["trainable_parameters"]],
        ["steps", training["global_step"]],
        ["tokens seen", seen],
        ["passes over the training set", round(seen / held, 3)],
        ["tokens a second", round(seen / seconds) if seconds else "-"],
        ["training loss", training["train_loss"]],
        ["processes", training["world_size"]],
        ["hardware", hardware_text(recipe.hardware, hardware)],
        ["seconds", f"{seconds:,.1f}"],
        ["CPU seconds", f"{training['cpu_seconds']:,.1f}"],
        ["peak memory of all processes", f"{training['peak_rss'] / GB:.2f} GB"],
    ]
    if hardware.price_per_hour:
        price = seconds / 3600 * hardware.num_nodes * hardware.price_per_hour
        rows.append(["price", f"{price:.2f} at {hardware.price_per_hour:g} an hour and node"])
    return rows


def base_text(recipe: Recipe) -> str:
    """Return what the model was before training, in a few words."""
    model = recipe.model
    if model.config is not None:
        config = model.config
        return (
            f"random weights, {config.model_type}, {config.n_layer} layers, {config.n_head} heads, "
            f"width {config.n_embd}, context {config.n_positions}"
        )
    return f"{model.model_name_or_path} (revision {model.revision or 'not pinned'})"


def hardware_text(name: str, hardware: Hardware) -> str:
    """Return the hardware in a few words."""
    return (
        f"{name}: {hardware.num_nodes} node(s), {hardware.processes_per_node} {hardware.device} "
        f"process(es) each, {hardware.strategy}"
    )


def loss_table(scorecard: Data) -> str:
    """Return loss and perplexity at step 0 and after training, and the fall with its interval."""
    rows = [
        [label, _number(scorecard[key]["loss"]), _number(scorecard[key]["perplexity"])]
        for label, key in (("step 0", "step0"), ("trained", "trained"))
    ]
    text = table(["model", "loss (nats per token)", "perplexity"], rows)
    text += (
        f"\n\nTest split: {scorecard['tokens']:,} predicted tokens in {scorecard['rows']:,} rows."
    )
    interval = scorecard["improvement"]
    if interval:
        text += (
            f" The loss fell by {interval['nats']:.3f} nats per token, "
            f"{interval['confidence']:.0%} interval {interval['low']:.3f} to "
            f"{interval['high']:.3f} (paired bootstrap over rows, {interval['resamples']:,} "
            f"resamples, seed {interval['seed']})."
        )
    return text


def reload_text(check: Data) -> str:
    """Return the outcome of comparing the reloaded model with the end of training."""
    if check["status"] != "equal":
        return f"Reload check: not made, {check['reason']}."
    return (
        f"Reload check: the saved model, loaded in a fresh process, has validation loss "
        f"{check['reloaded']:.4f}; training ended with {check['in_training']:.4f} at step "
        f"{check['step']} (tolerance {check['tolerance']:g})."
    )


def samples_text(samples: Iterable[Data]) -> str:
    """Return each sample: prompt, the model's completion, and the reference beside it."""
    parts = []
    for number, sample in enumerate(samples, 1):
        origin = cell(sample["url"] or sample["record_id"])
        license_ = cell(sample["license"] or "no license stated")
        how = "ended by itself" if sample["stopped"] else "cut at the token limit"
        parts += [
            f"### {number}. {origin} ({license_})",
            "Prompt",
            fence(shorten(sample["prompt"], tail=True)),
            f"Completion (greedy, {how})",
            fence(shorten(sample["completion"])),
            "Reference",
            fence(shorten(sample["reference"])),
        ]
    return "\n\n".join(parts) or "No held-out record has a prompt that fits the context."


def shorten(text: str, *, tail: bool = False) -> str:
    """Return the text for a page: long runs of empty lines named, its beginning or end alone."""
    text = re.sub(r"\n{5,}", lambda run: f"\n[{len(run[0]) - 1} empty lines]\n", text)
    left = len(text) - MAX_SAMPLE_CHARS
    if left <= 0:
        return text
    if tail:
        return f"[{left:,} characters before]\n{text[left:]}"
    return f"{text[:MAX_SAMPLE_CHARS]}\n[{left:,} characters more]"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4f}"
