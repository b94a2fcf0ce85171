"""Follows trainings from their files: what a terminal shows while the flow runs elsewhere."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.jsonlines import read_new

SHOW_EVERY_SECONDS = 10.0
POLL_SECONDS = 1.0


def follow(runs: Path) -> Iterator[str]:
    """Yield a line for each training's progress from now on, until our parent is gone."""
    parent = os.getppid()
    places = {path: path.stat().st_size for path in runs.glob("*/metrics.jsonl")}
    shown = 0.0
    while os.getppid() == parent:
        for path in sorted(runs.glob("*/metrics.jsonl")):
            lines, places[path] = read_new(path, places.get(path, 0))
            for line in lines:
                is_last = line["step"] == line.get("max_steps")
                if "eval_loss" in line or is_last or time.monotonic() - shown > SHOW_EVERY_SECONDS:
                    shown = time.monotonic()
                    yield f"{path.parent.name}: {describe(line)}"
        time.sleep(POLL_SECONDS)


def describe(line: dict[str, Any]) -> str:
    """Return a line of metrics.jsonl in words."""
    if "eval_loss" in line:
        return f"step {line['step']}: validation loss {line['eval_loss']:.3f}"
    mfu = f", MFU {line['mfu']:.0%}" if line.get("mfu") else ""
    return (
        f"step {line['step']} of {line['max_steps']}: loss {line['loss']:.3f}, "
        f"{line['tokens_per_second']:,.0f} tokens/s{mfu}"
    )
