"""The picture of a run: training and validation loss over steps, readable at a glance."""

from pathlib import Path
from typing import Any

WIDTH, HEIGHT, DPI = 1200, 700, 100
SMOOTHING = 0.6


def draw_loss(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw loss.png (1200 x 700 pixels) from the lines of metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#4c72b0", alpha=0.35, linewidth=1)
        axes.plot(steps, smooth(list(losses)), color="#4c72b0", linewidth=2.5, label="training")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(
            steps, losses, "o-", color="#dd8452", linewidth=2, markersize=8, label="validation"
        )
        axes.axhline(
            losses[0], color="#555555", linestyle="--", linewidth=1.2,
            label=f"untrained: {losses[0]:.2f}",
        )  # fmt: skip
        axes.annotate(
            f"{losses[-1]:.2f}", (steps[-1], losses[-1]), xytext=(0, 12),
            textcoords="offset points", ha="right", fontsize=14, color="#dd8452",
        )  # fmt: skip
    axes.set_title(title, fontsize=18, pad=12)
    axes.set_xlabel("step", fontsize=15)
    axes.set_ylabel("loss (nats per token)", fontsize=15)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if metrics:
        axes.legend(fontsize=14, frameon=False)
    figure.savefig(path, format="png")


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average with bias correction, as TensorBoard draws it."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed
