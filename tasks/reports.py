"""The artifacts of a run, under keys that stay: what the UI shows of data, training and result.

Every number comes from manifests and files of the run. Descriptions carry the verdict in one line,
because the lists of the UI show nothing else. An artifact that cannot be published is only logged:
the files it is made of are there anyway.
"""

import base64
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact

from pipelines.evals.push import PushPlan, plan_text
from pipelines.evals.scorecard import verdict
from pipelines.funnel import funnel_text
from pipelines.lineage import build_lineage, trace_text
from pipelines.markdown import table
from pipelines.plan import STAGES, open_store
from pipelines.recipe import Recipe, load_hardware
from pipelines.render.reports import show_audit, show_tokens
from pipelines.runs import PREFERRED, Run
from pipelines.store import StageRef, Store

logger = logging.getLogger("pipelines.flows")

MB = 1e6
Refs = Mapping[str, StageRef]


def show_dataset(recipe: Recipe, refs: Refs) -> None:
    """Publish dataset-funnel, token-report and mask-audit from the stages' manifests."""
    store = open_store(recipe.name)
    manifests = {stage.name: store.manifest(refs[stage.name]) for stage in STAGES}
    collected, kept = refs["collect"].rows, refs["split"].rows
    packed = manifests["pack"]
    trained = sum(shard.trained_tokens for shard in packed.shards)
    _markdown(
        "dataset-funnel",
        funnel_text(manifests, {name: ref.cached for name, ref in refs.items()}),
        f"{recipe.name}: {collected:,} records collected, {kept:,} kept, "
        f"{refs['pack'].rows:,} packed rows",
    )
    _markdown(
        "token-report",
        show_tokens(packed.report["token_report"]),
        f"{recipe.name}: {packed.tokens:,} tokens, {trained:,} of them trained "
        f"({trained / max(1, packed.tokens):.0%})",
    )
    _markdown(
        "mask-audit",
        show_audit(packed.report["mask_audit"]),
        f"{recipe.name}: what enters the loss, in {len(packed.report['mask_audit'])} examples",
    )


def show_loss(run: Run) -> None:
    """Publish the picture loss.png as loss-curve.

    Inside Markdown: an image artifact prints its whole data URL across the page.
    """
    path, result = run.path / "loss.png", run.read("training.json")
    if not path.is_file() or not result:
        return
    picture = base64.b64encode(path.read_bytes()).decode()
    _markdown(
        "loss-curve",
        f"![training and validation loss](data:image/png;base64,{picture})",
        f"training loss {result['train_loss']:.3f} after {result['global_step']} steps, {run.name}",
    )


def show_scorecard(run: Run) -> None:
    """Publish scorecard.md under the gate's verdict."""
    scorecard = run.read("scorecard.json") or {}
    text = (run.path / "scorecard.md").read_text(encoding="utf-8")
    _markdown("scorecard", text, verdict(scorecard).reason)


def show_result(run: Run, refs: Refs, reused: Set[str]) -> None:
    """Publish cost-by-stage, lineage and model-card; `reused` names steps that were not run now."""
    store = open_store()
    costs = step_costs(run, store, refs, reused)
    spent = sum(cost.seconds for cost in costs if not cost.reused)
    saved = sum(cost.seconds for cost in costs if cost.reused)
    _markdown(
        "cost-by-stage",
        cost_table(costs),
        f"{spent:,.0f} s of work, {saved:,.0f} s saved by reuse, {run.name}",
    )
    lineage = build_lineage(run, store)
    records = sum(source["used"]["records"] for source in lineage["sources"].values())
    licenses = {name for s in lineage["sources"].values() for name in s["used"]["licenses"]}
    _markdown(
        "lineage",
        trace_text(lineage),
        f"{records:,} training records under {', '.join(sorted(licenses))}, {run.name}",
    )
    card = (run.path / "card.md").read_text(encoding="utf-8")
    _markdown("model-card", _without_front_matter(card), f"{run.path / 'model'}")


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step took when it was built; `price` where the hardware file names one."""

    step: str
    seconds: float
    cpu_seconds: float
    peak_rss: int
    reused: bool
    gpu_hours: float = 0.0
    price: float | None = None


def step_costs(run: Run, store: Store, refs: Refs, reused: Set[str]) -> list[StepCost]:
    """Return the cost of each data stage, of training and of evaluation."""
    hardware = load_hardware(run.recipe().hardware)
    costs = []
    for stage in STAGES:
        ref, cost = refs[stage.name], store.manifest(refs[stage.name]).cost
        costs.append(
            StepCost(stage.name, cost.seconds, cost.cpu_seconds, cost.peak_rss, ref.cached)
        )
    for step, file in (("train", "training.json"), ("evaluate", "scorecard.json")):
        result = run.read(file) or {}
        seconds = result.get("seconds", 0.0)
        nodes = hardware.num_nodes if step == "train" else 1
        gpus = nodes * hardware.processes_per_node if step == "train" else 1
        hours = seconds / 3600
        costs.append(
            StepCost(
                step,
                seconds,
                result.get("cpu_seconds", 0.0),
                result.get("peak_rss", 0),
                step in reused,
                gpu_hours=hours * gpus if hardware.device == "cuda" else 0.0,
                price=hours * nodes * hardware.price_per_hour if hardware.price_per_hour else None,
            )
        )
    return costs


def cost_table(costs: list[StepCost]) -> str:
    """Return the costs as a table with their total; reused steps cost nothing now."""
    priced = any(cost.price is not None for cost in costs)
    rows = [_cost_row(cost, priced) for cost in costs]
    now = [cost for cost in costs if not cost.reused]
    total = StepCost(
        "total",
        sum(cost.seconds for cost in now),
        sum(cost.cpu_seconds for cost in now),
        max(cost.peak_rss for cost in costs),
        reused=False,
        gpu_hours=sum(cost.gpu_hours for cost in now),
        price=sum(cost.price or 0 for cost in now),
    )
    saved = sum(cost.seconds for cost in costs if cost.reused)
    rows.append([*_cost_row(total, priced)[:2], f"{saved:,.1f}", *_cost_row(total, priced)[3:]])
    header = ["step", "seconds", "saved by reuse", "CPU hours", "GPU hours", "peak memory (MB)"]
    return table([*header, "price"] if priced else header, rows)


def _cost_row(cost: StepCost, priced: bool) -> list[str]:
    spent = 0 if cost.reused else 1
    row = [
        cost.step,
        f"{cost.seconds * spent:,.1f}",
        f"{cost.seconds * (1 - spent):,.1f}",
        f"{cost.cpu_seconds * spent / 3600:,.4f}",
        f"{cost.gpu_hours * spent:,.4f}",
        f"{cost.peak_rss / MB:,.0f}",
    ]
    return [*row, f"{(cost.price or 0) * spent:,.2f}"] if priced else row


def show_preference(run: Run, result: Mapping[str, Any]) -> None:
    """Publish what the preference stage has done, under its verdict."""
    held_out = result["held_out"] or {}
    facts = {
        "pairs trained on": result["pairs"],
        "left out": ", ".join(f"{why}: {n:,}" for why, n in result["dropped"].items()),
        **{name.replace("_", " "): value for name, value in held_out.items()},
        "model": str(run.path / PREFERRED),
    }
    settings = [[name, str(value)] for name, value in result["settings"].items()]
    text = [table(["what", "value"], facts.items()), table(["setting", "value"], settings)]
    _markdown("preference", "\n\n".join(text), result["reason"])


def show_push(plan: PushPlan) -> None:
    """Publish what would be pushed where, with the card."""
    size = f"{len(plan.files)} files, {plan.size / MB:,.1f} MB"
    _markdown("push-plan", plan_text(plan), f"{plan.run} to {plan.repository}: {size}")


def show_upkeep(
    summary: str, damaged: Mapping[str, str], freed: Mapping[str, int], dead: list[str]
) -> None:
    """Publish what the nightly upkeep found and did."""
    rows = [
        *([folder, "damaged, will be built again", problem] for folder, problem in damaged.items()),
        *([folder, "removed", f"{size / MB:.1f} MB"] for folder, size in freed.items()),
        *([name, "ended", "no heartbeat"] for name in dead),
    ]
    text = table(["what", "outcome", "detail"], rows) if rows else "Nothing to mend."
    _markdown("maintenance", text, summary)


def _without_front_matter(text: str) -> str:
    """Return a card without its YAML head, which Markdown viewers show as a broken table."""
    parts = text.split("---\n", 2)
    return parts[2].lstrip() if len(parts) == 3 and not parts[0] else text


def _markdown(key: str, text: str, description: str) -> None:
    try:
        create_markdown_artifact(text, key=key, description=description)
    except httpx.HTTPError as error:
        logger.warning("artifact %s not published: %s", key, type(error).__name__)
