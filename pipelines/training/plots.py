"""The picture of a run: training and validation loss over steps, readable at a glance."""

import base64
import io
from pathlib import Path
from typing import IO, Any

WIDTH, HEIGHT, DPI = 1200, 700, 100
LIVE_DPI = 60  # 720 x 420 pixels, about 20 kB
SMOOTHING = 0.6


def show_live(metrics: list[dict[str, Any]], name: str) -> tuple[str, str] | None:
    """Return (Markdown with the picture so far, one line on it), None before the first loss."""
    train = [line for line in metrics if "loss" in line]
    if not train:
        return None
    last = train[-1]
    buffer = io.BytesIO()
    draw_loss(metrics, name, buffer, dpi=LIVE_DPI)
    picture = base64.b64encode(buffer.getvalue()).decode()
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    validation = f", validation {held_out[-1]:.3f}" if held_out else ""
    mfu = f", MFU {last['mfu']:.0%}" if last.get("mfu") else ""
    speed = f"{last['tokens_per_second']:,.0f} tokens/s{mfu}"
    step = f"step {last['step']} of {last['max_steps']}"
    return (
        f"![training and validation loss](data:image/png;base64,{picture})",
        f"{step}: training loss {last['loss']:.3f}{validation}, {speed}, {name}",
    )


def draw_loss(
    metrics: list[dict[str, Any]], title: str, path: Path | IO[bytes], *, dpi: int = DPI
) -> None:
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
    figure.savefig(path, format="png", dpi=dpi)


def smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average with bias correction, as TensorBoard draws it."""
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(average / weight)
    return smoothed
