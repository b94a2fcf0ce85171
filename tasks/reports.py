"""The artifacts of a run, under keys that stay: what the UI shows of data, training and result.

Every number comes from manifests and files of the run. Descriptions carry the verdict in one line,
because the lists of the UI show nothing else. An artifact that cannot be published is only logged:
the files it is made of are there anyway.
"""

import base64
import logging
from collections.abc import Mapping
from typing import Any

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from pipelines.evals.scorecard import verdict
from pipelines.lineage import build_lineage, reasons_text, trace_text
from pipelines.manifest import Manifest
from pipelines.markdown import table
from pipelines.plan import STAGES, open_store
from pipelines.recipe import Hardware, Recipe, load_hardware
from pipelines.render.reports import show_audit, show_tokens
from pipelines.runs import Run
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
        funnel_table(manifests, refs),
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


def funnel_table(manifests: Mapping[str, Manifest], refs: Refs) -> str:
    """Return rows in and out of each stage, and why the others left."""
    rows = [
        [
            name,
            manifest.counts.rows_in,
            manifest.counts.used,
            manifest.counts.rows_out,
            reasons_text(
                {"dropped": manifest.counts.dropped, "quarantined": manifest.counts.quarantined}
            ),
            f"reused, {manifest.cost.seconds:.1f} s"
            if refs[name].cached
            else f"built, {manifest.cost.seconds:.1f} s",
        ]
        for name, manifest in manifests.items()
    ]
    return table(["stage", "rows in", "used", "rows out", "left out", "work"], rows)


def show_loss(run: Run) -> None:
    """Publish the picture loss.png as loss-curve."""
    path = run.path / "loss.png"
    if not path.is_file():
        return
    result = run.read("training.json") or {}
    steps, loss = result.get("global_step", 0), result.get("train_loss", 0.0)
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with _Guard("loss-curve"):
        create_image_artifact(
            url,
            key="loss-curve",
            description=f"{run.name}: training loss {loss:.3f} after {steps} steps",
        )


def show_scorecard(run: Run) -> None:
    """Publish scorecard.md under the gate's verdict."""
    scorecard = run.read("scorecard.json") or {}
    text = (run.path / "scorecard.md").read_text(encoding="utf-8")
    _markdown("scorecard", text, verdict(scorecard).reason)


def show_result(run: Run, refs: Refs, *, train_reused: bool) -> None:
    """Publish cost-by-stage, lineage and model-card."""
    store = open_store()
    rows = cost_rows(run, store, refs, train_reused=train_reused)
    total = rows[-1]
    with _Guard("cost-by-stage"):
        create_table_artifact(
            rows,
            key="cost-by-stage",
            description=f"{run.name}: {total['seconds']:,.0f} s of work, "
            f"{total['saved by reuse (s)']:,.0f} s saved by reuse",
        )
    lineage = build_lineage(run, store)
    records = sum(source["used"]["records"] for source in lineage["sources"].values())
    licenses = {name for s in lineage["sources"].values() for name in s["used"]["licenses"]}
    _markdown(
        "lineage",
        trace_text(lineage),
        f"{run.name}: trained on {records:,} records under {', '.join(sorted(licenses))}",
    )
    card = (run.path / "card.md").read_text(encoding="utf-8")
    _markdown("model-card", _without_front_matter(card), f"{run.name}: {run.path / 'model'}")


def cost_rows(run: Run, store: Store, refs: Refs, *, train_reused: bool) -> list[dict[str, Any]]:
    """Return a row per step and their total: time, CPU and GPU hours, memory, what reuse saved.

    Money appears only where the hardware file names a price per hour of a node.
    """
    hardware = load_hardware(run.recipe().hardware)
    rows = []
    for stage in STAGES:
        cost = store.manifest(refs[stage.name]).cost
        rows.append(
            _cost_row(
                stage.name, cost.seconds, cost.cpu_seconds, cost.peak_rss, refs[stage.name].cached
            )
        )
    training, scorecard = run.read("training.json") or {}, run.read("scorecard.json") or {}
    for name, result in (("train", training), ("evaluate", scorecard)):
        measured = (result.get(key, 0) for key in ("seconds", "cpu_seconds", "peak_rss"))
        row = _cost_row(name, *measured, reused=train_reused)
        rows.append(row | _gpu_cost(hardware, result.get("seconds", 0), name))
    keys = [key for key in rows[-2] if key not in ("step", "peak memory (MB)")]
    total: dict[str, Any] = {"step": "total"}
    total |= {key: round(sum(row.get(key, 0) for row in rows), 4) for key in keys}
    total["peak memory (MB)"] = max(row["peak memory (MB)"] for row in rows)
    columns = [*rows[-2]]
    return [{key: row.get(key, 0) for key in columns} for row in [*rows, total]]


def _cost_row(
    step: str, seconds: float, cpu_seconds: float, peak_rss: int, reused: bool
) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": 0.0 if reused else round(seconds, 1),
        "saved by reuse (s)": round(seconds, 1) if reused else 0.0,
        "CPU hours": 0.0 if reused else round(cpu_seconds / 3600, 4),
        "peak memory (MB)": round(peak_rss / MB),
    }


def _gpu_cost(hardware: Hardware, seconds: float, step: str) -> dict[str, float]:
    """Return GPU hours and, where a price is known, money; training uses all, evaluation one."""
    hours = seconds / 3600
    gpus = hardware.num_nodes * hardware.processes_per_node if step == "train" else 1
    cost = {"GPU hours": round(hours * gpus, 4) if hardware.device == "cuda" else 0.0}
    if hardware.price_per_hour:
        nodes = hardware.num_nodes if step == "train" else 1
        cost["price"] = round(hours * nodes * hardware.price_per_hour, 2)
    return cost


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
    with _Guard(key):
        create_markdown_artifact(text, key=key, description=description)


class _Guard:
    """Logs, instead of raising, where the server does not take an artifact."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        if kind is not None and issubclass(kind, httpx.HTTPError):
            logger.warning("artifact %s not published: %s", self.key, kind.__name__)
            return True
        return False
