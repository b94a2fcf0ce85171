"""The results of the GPU benchmark as Markdown: one line an arm, and the bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.arms import ARMS

Result = Mapping[str, Any]
Results = Mapping[str, Result]

HEAD = (
    "| arm | micro-step | real tok/s | three windows | MFU | real positions | peak GiB | s |",
    "|---|---|---|---|---|---|---|---|",
)
SEED = {"1b": "1b-script", "15b": "15b-script"}
# (what is measured against the bar, the bar)
FULL_TOKENS, FULL_RATIO, LORA_TOKENS, LORA_MEMORY = 57_000, 4.0, 6_900, 110


def render(results: Results) -> str:
    """Return the tables of what is there so far."""
    measured = [r for r in results.values() if r["status"] == "ok"]
    lines = [f"{r['device']}; {r['software']}" for r in measured[:1]]
    lines += _ceiling(results.get("ceiling"))
    peak = results.get("ceiling", {}).get("flops")
    for shape, title in (("1b", "1.1B, full fine-tuning"), ("15b", "15.5B, LoRA r16")):
        found = [
            (arm, results[name])
            for name, arm in ARMS.items()
            if arm.shape == shape and name in results
        ]
        if found:
            lines += ["", f"## {title}", "", *HEAD]
            lines += [_line(ARMS[arm.name].title, result, peak) for arm, result in found]
    verdicts = judge(results)
    if verdicts:
        lines += ["", "## Bars", "", *verdicts]
    missing = [name for name in ARMS if name not in results]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}"]
    return "\n".join(lines) + "\n"


def _ceiling(result: Result | None) -> list[str]:
    if result is None:
        return []
    if result["status"] != "ok":
        return ["", f"The ceiling was not measured: {result['reason']}"]
    products = [
        f"| {name} | {rate / 1e12:.0f} TFLOP/s |" for name, rate in result["products"].items()
    ]
    return [
        "", "| bfloat16 product | rate |", "|---|---|", *products,
        f"| copy on the device, read + written | {result['copy'] / 1e12:.2f} TB/s |",
    ]  # fmt: skip


def _line(title: str, result: Result, peak: float | None) -> str:
    if result["status"] != "ok":
        return f"| {title} | {result['rows']} rows | {result['reason']} | | | | | |"
    note = f", {result['note']}" if result.get("note") else ""
    spread = f"{min(result['spread']):,} to {max(result['spread']):,}"
    mfu = f"{result['useful_flops'] / peak:.1%}" if peak else ""
    real = result["tokens_per_second"] / result["positions_per_second"]
    kind = "documents" if "script" in result["arm"] else "x 2,048"
    memory = f"{result['peak']:.1f} ({result['reserved']:.1f} reserved)"
    return (
        f"| {title} | {result['rows']} {kind}{note} | {result['tokens_per_second']:,.0f} "
        f"| {spread} | {mfu} | {real:.1%} | {memory} "
        f"| {result['seconds']:.0f} |"
    )


def judge(results: Results) -> list[str]:
    """Compare the best line of each model with its bar."""
    full, lora = _best(results, "1b"), _best(results, "15b")
    lines = []
    if full:
        lines.append(_verdict("1B full, real tok/s", full["tokens_per_second"], FULL_TOKENS))
        seed = results.get(SEED["1b"])
        if seed and seed["status"] == "ok":
            ratio = full["tokens_per_second"] / seed["tokens_per_second"]
            lines.append(_verdict("1B full, times the seed's script", ratio, FULL_RATIO))
    fitting = _best(results, "15b", memory=LORA_MEMORY)
    if fitting or lora:
        speed = (fitting or lora or {})["tokens_per_second"]
        name = f"15.5B LoRA, real tok/s at most {LORA_MEMORY} GiB"
        lines.append(_verdict(name, speed if fitting else 0, LORA_TOKENS))
    return lines


def _best(results: Results, shape: str, memory: float | None = None) -> Result | None:
    found: Sequence[Result] = [
        result
        for name, result in results.items()
        if name in ARMS
        and ARMS[name].shape == shape
        and ARMS[name].loop != "script"
        and result["status"] == "ok"
        and (memory is None or result["peak"] <= memory)
    ]
    return max(found, key=lambda r: r["tokens_per_second"], default=None)


def _verdict(name: str, value: float, bar: float) -> str:
    digits = 2 if bar < 100 else 0
    met = "met" if value >= bar else "missed"
    return f"- {name}: {value:,.{digits}f} (at least {bar:,g} wanted): {met}"
