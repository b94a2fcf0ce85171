"""One arm of the GPU benchmark, in a process of its own.

    python -m benchmarks.gpu.measure ARM [--rows N] [--dry-run]

Its last line on stdout is the result as JSON. A process for each arm keeps the memory of one from
another, and a crash costs its own line only.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.arms import ARMS, SHAPES, Arm, dry
from benchmarks.gpu.documents import Documents
from benchmarks.gpu.windows import Windows
from pipelines.engine import die_with_parent

MARK = "@result "
GIB = 2**30
COUNT = 12_000  # documents, 4 M tokens
# The allocator raises OutOfMemoryError; libraries and compiled kernels that take memory themselves
# raise other errors.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
# (tokens, width in, width out) of the largest products of the two models.
PRODUCTS = {
    "8192 x 8192 x 8192": (8192, 8192, 8192),
    "1B: 32768 x 2048 -> 8192": (32_768, 2048, 8192),
    "1B: 32768 x 8192 -> 2048": (32_768, 8192, 2048),
    "15.5B: 8192 x 6144 -> 24576": (8192, 6144, 24_576),
}


def measure_ceiling(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return the rates of bfloat16 products on random data, and of a copy (bytes read + written).

    The rate of the square product is what utilisation is measured against.
    """
    rates = {}
    for name, sizes in PRODUCTS.items():
        rows, wide, tall = (size // 64 for size in sizes) if tiny else sizes
        left = torch.randn(rows, wide, device=device, dtype=torch.bfloat16)
        right = torch.randn(wide, tall, device=device, dtype=torch.bfloat16)
        seconds = time_calls(lambda a=left, b=right: torch.mm(a, b), device)
        rates[name] = 2 * rows * wide * tall / seconds
    size = 2**20 if tiny else 2**32
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * size / time_calls(lambda: target.copy_(source), device)
    return {"flops": next(iter(rates.values())), "products": rates, "copy": copy}


def time_calls(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a call over five rounds of ten."""
    for _ in range(3):
        call()
    rounds = []
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            call()
        synchronize(device)
        rounds.append((time.perf_counter() - began) / 10)
    return median(rounds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_arm(arm: Arm, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Train an arm's model and return rates, memory and what was compiled."""
    from benchmarks.gpu import loops
    from benchmarks.gpu.models import build_model
    from pipelines.training.flops import count_flops

    shape = SHAPES[arm.shape]
    documents = Documents.draw(COUNT // 40 if tiny else COUNT, shape.block, shape.vocabulary)
    began = time.perf_counter()
    windows = Windows(lambda: synchronize(device), seconds=0.02 if tiny else 4.0)
    if arm.loop == "starloom":
        model = loops.train_starloom(arm, documents, windows)
    else:
        model = build_model(arm, device)
        train = loops.train_script if arm.loop == "script" else loops.train_bare
        train(arm, model, documents, windows)
    flops = count_flops(model, gradient_checkpointing=arm.checkpointing)
    return {
        "tokens_per_second": windows.rate(lambda w: w.tokens),
        "positions_per_second": windows.rate(lambda w: w.positions),
        "useful_flops": windows.rate(lambda w: flops.of(w.tokens, w.pairs)),
        "spread": [round(w.tokens / w.seconds) for w in windows.found],
        "steps": sum(w.steps for w in windows.found),
        "tokens_per_step": windows.found[-1].tokens // windows.found[-1].steps,
        "flops_per_token": flops.per_token,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "whole_seconds": round(time.perf_counter() - began, 1),
        "warmup_seconds": round(windows.warmup_seconds, 1),
        "graphs": compiled_graphs(),
        **memory(device),
    }


def memory(device: torch.device) -> dict[str, float]:
    """Return the peak GiB of tensors, and of what the allocator took from the device."""
    if device.type != "cuda":
        return {"peak": 0.0, "reserved": 0.0}
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(("peak", "reserved"), (round(n / GIB, 1) for n in peaks), strict=True))


def compiled_graphs() -> int:
    """Return how many graphs torch.compile made: about one is right, many are recompilations."""
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))


def versions(device: torch.device) -> dict[str, str]:
    """Return the device and the versions that decide its speed."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, tiny shapes"
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return {
        "device": name,
        "software": f"torch {torch.__version__}{cuda}, transformers {transformers.__version__}",
    }


def run(name: str, rows: int, *, tiny: bool) -> dict[str, Any]:
    """Measure an arm; an error becomes part of the result, with `memory` for out of memory."""
    device = torch.device("cpu" if tiny else "cuda")
    arm = replace(ARMS[name], rows=rows or ARMS[name].rows)
    arm = dry(arm) if tiny else arm
    result: dict[str, Any] = {"arm": name, "rows": arm.rows, "settings": asdict(arm)}
    began = time.perf_counter()
    try:
        result |= versions(device)
        found = (
            measure_ceiling(device, tiny=tiny)
            if arm.is_ceiling
            else measure_arm(arm, device, tiny=tiny)
        )
        result |= {"status": "ok", **found}
    except Exception as error:  # whatever an arm dies of is a line of the table
        logging.getLogger(__name__).exception("%s failed", name)
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        no_memory = isinstance(error, torch.OutOfMemoryError) or any(
            text in str(error) for text in NO_MEMORY
        )
        result |= {"status": "memory" if no_memory else "failed", "reason": reason[:300]}
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--parent", type=int, default=0, help="end when this process is gone")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.parent:
        die_with_parent(options.parent)
    print(MARK + json.dumps(run(options.arm, options.rows, tiny=options.dry_run)), flush=True)
    os._exit(0)  # what is left would only be torn down: CUDA, NCCL, the compiler's workers


if __name__ == "__main__":
    main()
