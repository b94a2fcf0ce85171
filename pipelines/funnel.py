"""What became of the rows: per stage, per source, and samples of what was left out or changed."""

from collections.abc import Mapping
from typing import Any

from pipelines.lineage import reasons_text
from pipelines.manifest import Manifest
from pipelines.markdown import cell, table

SAMPLES_SHOWN = 3


def funnel_text(manifests: Mapping[str, Manifest], reused: Mapping[str, bool]) -> str:
    """Return the funnel as Markdown; `reused` tells which stages were in the store already."""
    parts = [stage_table(manifests, reused)]
    for title, text in (
        ("By source", source_table(manifests)),
        ("Mixture", mixture_table(manifests)),
        ("Samples", samples_text(manifests)),
    ):
        if text:
            parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts)


def stage_table(manifests: Mapping[str, Manifest], reused: Mapping[str, bool]) -> str:
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
            f"{'reused' if reused.get(name) else 'built'}, {manifest.cost.seconds:.1f} s",
        ]
        for name, manifest in manifests.items()
    ]
    return table(["stage", "rows in", "used", "rows out", "left out", "work"], rows)


def source_table(manifests: Mapping[str, Manifest]) -> str:
    """Return what each filter kept of each source; "" where no stage counts by source."""
    rows = []
    for name, manifest in manifests.items():
        for source, counts in _by_source(manifest).items():
            lost = {"dropped": counts["dropped"], "quarantined": {}}
            left_out = reasons_text(lost)
            rows.append([source, name, counts["rows_in"], counts["rows_out"], left_out])
    rows.sort(key=lambda row: str(row[0]))
    return table(["source", "stage", "rows in", "rows out", "left out"], rows) if rows else ""


def mixture_table(manifests: Mapping[str, Manifest]) -> str:
    """Return what mixing made of the sources' train rows; "" for one source taken once."""
    mixture: dict[str, dict[str, Any]] = (
        manifests["split"].report.get("mixture", {}) if "split" in manifests else {}
    )
    if len(mixture) < 2 and all(each["epochs"] == 1 for each in mixture.values()):
        return ""
    rows = [
        [
            source,
            "-" if each["weight"] is None else f"{each['weight']:g}",
            f"{each['epochs']:g}",
            each["train_rows"],
            each["mixed_rows"],
            f"{each['share']:.1%}",
        ]
        for source, each in mixture.items()
    ]
    return table(["source", "weight", "epochs", "train rows", "mixed rows", "share"], rows)


def samples_text(manifests: Mapping[str, Manifest]) -> str:
    """Return a few rows for each reason that a stage gives."""
    lines = []
    for name, manifest in manifests.items():
        for reason, samples in manifest.report.get("samples", {}).items():
            lines.append(f"- {name}, {cell(reason)}")
            lines += [
                f"  - `{sample['id']}`: {cell(sample['detail'])}"
                for sample in samples[:SAMPLES_SHOWN]
            ]
    return "\n".join(lines)


def _by_source(manifest: Manifest) -> dict[str, Any]:
    """Return the counts by source of a stage that filters; others report something else."""
    found = manifest.report.get("sources", {})
    return {
        source: counts
        for source, counts in found.items()
        if isinstance(counts, dict) and {"rows_in", "rows_out", "dropped"} <= counts.keys()
    }
