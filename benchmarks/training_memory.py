"""Estimated against measured peak memory of real training on this CPU.

    python -m benchmarks.training_memory [--only WORD] [--case JSON]

Every case is a run of the trainer itself, two steps and two evaluations from random weights, in
processes of its own. Measured is the peak resident memory of a rank less that of a run whose model
is next to nothing (imports, process group, data); estimated is `pipelines.training.estimate` less
its share for the framework. Prints a Markdown table.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.recipe import Recipe, load_recipe
from pipelines.runs import TRAINER, open_run
from pipelines.settings.model import ScratchConfig
from pipelines.store import StageRef, StageSpec, Store
from pipelines.training.environment import child_environment, hardware_of
from pipelines.training.estimate import GIB, Memory, estimate_memory
from pipelines.training.shapes import Shape, scratch_shape

LEAVES = {"gpt_bigcode": ["c_attn", "c_proj", "c_fc"]}
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint16())),
        ("labels", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("record_ids", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Case:
    """One run: a model's sizes, how it is trained, and on how many processes."""

    label: str
    model_type: str = "gpt_bigcode"
    layers: int = 8
    width: int = 512
    vocab: int = 8192
    block: int = 512
    batch: int = 4
    accumulation: int = 1
    lora: bool = False
    checkpointing: bool = False
    dtype: str = "float32"
    strategy: str = "ddp"
    processes: int = 1
    bits: int = 0  # of a quantized base, which is read from disk


CASES = (
    Case("full, activations"),
    Case("full, weights", layers=8, width=1024, block=256, batch=1),
    Case("full, logits", layers=2, width=256, vocab=49_152),
    Case("full, long rows", block=2048, batch=1),
    Case("full, accumulation", width=768, block=256, batch=2, accumulation=2),
    Case("full, checkpointing", layers=12, width=768, checkpointing=True),
    Case("full, bfloat16", dtype="bfloat16"),
    Case("LoRA", lora=True, width=768),
    Case("LoRA, checkpointing", lora=True, layers=12, width=768, checkpointing=True),
    Case(
        "LoRA, checkpointing, long rows",
        lora=True,
        layers=12,
        width=768,
        block=2048,
        batch=1,
        checkpointing=True,
    ),
    Case("LoRA, bfloat16", lora=True, layers=12, width=768, dtype="bfloat16"),
    Case("llama, full", "llama"),
    Case("llama, LoRA", "llama", lora=True),
    Case("starcoder2, full", "starcoder2"),
    Case("qwen2, checkpointing", "qwen2", layers=12, width=768, checkpointing=True),
    Case("ddp x 2", width=768, block=256, batch=2, processes=2),
    Case("zero2 x 2", width=1024, block=256, batch=2, strategy="zero2", processes=2),
    Case("zero3 x 2", width=1024, block=256, batch=2, strategy="zero3", processes=2),
    Case("4 bit", lora=True, width=768, bits=4),
    Case("4 bit, weights", lora=True, layers=12, width=1024, block=256, batch=1, bits=4),
    Case("4 bit, checkpointing", lora=True, layers=12, width=768, checkpointing=True, bits=4),
    Case("4 bit, bfloat16", lora=True, layers=12, width=768, dtype="bfloat16", bits=4),
    Case("4 bit, llama", "llama", lora=True, width=768, bits=4),
    Case("4 bit, zero2 x 2", lora=True, width=1024, block=256, batch=2, strategy="zero2",
         processes=2, dtype="bfloat16", bits=4),
    Case("8 bit", lora=True, width=768, bits=8),
    Case("8 bit, weights", lora=True, layers=12, width=1024, block=256, batch=1, bits=8),
    Case("8 bit, checkpointing", lora=True, layers=12, width=768, checkpointing=True, bits=8),
    Case("8 bit, bfloat16", lora=True, layers=12, width=768, dtype="bfloat16", bits=8),
)  # fmt: skip


def scratch_of(case: Case) -> dict[str, Any]:
    """Return the `model.config` of a case."""
    return {
        "model_type": case.model_type,
        "n_layer": case.layers,
        "n_head": case.width // 64,
        "n_embd": case.width,
        "n_positions": max(case.block, 64),
    }


def recipe_of(case: Case, base: Path | None) -> Recipe:
    """Return the recipe of a case; `base` is the folder of the model that it quantizes."""
    model: dict[str, Any] = {"config": scratch_of(case)}
    if case.bits:
        quantized = {f"load_in_{case.bits}bit": True}
        model = {"model_name_or_path": str(base), "quantization_config": quantized}
    return load_recipe(
        "quickstart",
        overrides={
            "model": {**model, "dtype": case.dtype},
            "tokenizer.train_vocab_size": case.vocab,
            "tokenization.block_size": case.block,
            "adapter": {"r": 8, "target_modules": LEAVES.get(case.model_type, "all-linear")}
            if case.lora
            else None,
            "training.max_steps": 2,
            "training.warmup_steps": 1,
            "training.per_device_train_batch_size": case.batch,
            "training.per_device_eval_batch_size": 1,
            "training.gradient_accumulation_steps": case.accumulation,
            "training.gradient_checkpointing": case.checkpointing,
            "training.logging_steps": 1,
            "training.eval_steps": 2,
            "training.save_steps": 100,
        },
    )


def estimate(case: Case, folder: Path) -> tuple[Shape, Memory]:
    """Return the sizes of a case's model and the estimate for one of its processes."""
    shape = scratch_shape(ScratchConfig.model_validate(scratch_of(case)), case.vocab)
    run = _run(case, folder)
    return shape, estimate_memory(run.recipe(), shape, hardware_of(run))


def measure(case: Case, folder: Path, *, timeout: float = 600) -> int:
    """Train a case and return the peak resident bytes of its largest rank."""
    run = _run(case, folder)
    store = Store(folder / "store")
    refs = run.refs()
    environment = child_environment(run.recipe(), hardware_of(run), os.environ)
    start = [sys.executable, "-m"]
    if case.processes > 1:
        start += ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                  "--nnodes=1", f"--nproc-per-node={case.processes}", "-m", "--"]  # fmt: skip
    else:  # as torchrun would start its one process
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}  # fmt: skip
    command = [
        *start, TRAINER, f"--run={run.path}", f"--dataset={store.path(refs['pack'])}",
        f"--tokenizer={store.path(refs['tokenizer'])}",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    result = run.read("training.json") or {}
    if result.get("status") != "finished":
        raise RuntimeError(f"{case.label}: {result.get('error')}\n{done.stderr[-3000:]}")
    return int(result["peak_rss"]) // case.processes


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def smallest(case: Case) -> Case:
    """Return the case whose model and batch are next to nothing."""
    return replace(case, label="nothing", layers=2, width=64, vocab=512, block=64, batch=1,
                   accumulation=1, checkpointing=False)  # fmt: skip


def _run(case: Case, folder: Path) -> Any:
    store = Store(folder / "store")
    refs = {"tokenizer": _tokenizer(store, case.vocab), "pack": _rows(store, case)}
    base = _base(case, folder, store.path(refs["tokenizer"])) if case.bits else None
    run = open_run(recipe_of(case, base), refs, folder / "runs")
    info = run.info()
    info["key_parts"]["hardware"] |= {
        "strategy": case.strategy, "processes_per_node": case.processes
    }  # fmt: skip
    run.write("run.json", info)
    return run


def _base(case: Case, folder: Path, tokenizer: Path) -> Path:
    """Write a model of random weights, as a release has it, with its tokenizer.

    In a process of its own: a child's peak on Linux starts at what its parent holds.
    """
    base = folder / f"base of {case.label}"
    if not base.exists():
        process = get_context("spawn").Process(target=_write_base, args=(case, base, tokenizer))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{case.label}: the base could not be written")
    return base


def _write_base(case: Case, base: Path, tokenizer: Path) -> None:
    from pipelines.training.models import build_model, save_trained

    recipe = recipe_of(replace(case, bits=0, lora=False), None)
    save_trained(build_model(recipe, tokenizer), base, tokenizer, case.dtype)


def _rows(store: Store, case: Case) -> StageRef:
    """Store full rows of random ids, two documents each."""

    def write(inputs: Any, output: Path, params: Any) -> Outcome:
        number = params["rows"]
        ids = np.random.default_rng(0).integers(20, case.vocab, (number, case.block)).tolist()
        lengths = [case.block // 2, case.block - case.block // 2]
        table = pa.table(
            {"input_ids": ids, "labels": ids, "lengths": [lengths] * number,
             "record_ids": [[f"s:{i}a", f"s:{i}b"] for i in range(number)]},
            schema=SCHEMA,
        )  # fmt: skip
        with pa.OSFile(str(output), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(table)
        return Outcome(Counts(rows_in=number, rows_out=number, used=number), tokens=number)

    def build(work: Any) -> Built:
        train = 2 * case.batch * case.accumulation * case.processes
        sizes = {"train": train, "validation": case.processes, "test": 1}
        return Built(
            tuple(
                work.one(write, Job(f"{split}-00000.arrow", (), split), {"rows": rows})
                for split, rows in sizes.items()
            )
        )

    parameters = {"vocab": case.vocab, "block": case.block,
                  "rows": [case.batch, case.accumulation, case.processes]}  # fmt: skip
    return store.build(StageSpec("pack", parameters, ""), build)


def _tokenizer(store: Store, vocab: int) -> StageRef:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def build(work: Any) -> Built:
        folder = work.path / "made"
        special = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
        names = [*special, *(f"t{i}" for i in range(vocab - len(special)))]
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)},
                                                  merges=[])),
            bos_token=special[0], eos_token=special[0], pad_token=special[4],
        ).save_pretrained(folder)  # fmt: skip

        def copy(inputs: Any, output: Path, params: Any) -> Outcome:
            output.write_bytes((folder / params["name"]).read_bytes())
            return Outcome(Counts())

        files = sorted(folder.iterdir())
        return Built(tuple(work.one(copy, Job(f.name, ()), {"name": f.name}) for f in files))

    return store.build(StageSpec("tokenizer", {"vocab": vocab}, ""), build)


def compare(cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """Return one row a case: estimated and measured GiB beyond the framework, and the deviation."""
    baselines: dict[tuple[Any, ...], int] = {}
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as name:
            # peft and bitsandbytes are libraries too
            key = (case.strategy, case.processes, case.lora, case.bits)
            if key not in baselines:
                baselines[key] = measure(smallest(case), Path(name))
            shape, memory = estimate(case, Path(name))
            measured = measure(case, Path(name)) - baselines[key]
        estimated = memory.total - memory.framework
        rows.append({
            "case": case, "million": shape.parameters / 1e6, "moment": memory.moment,
            "estimated": estimated / GIB, "measured": measured / GIB,
            "baseline": baselines[key] / GIB, "off": estimated / measured - 1,
        })  # fmt: skip
        print(json.dumps({**rows[-1], "case": asdict(case)}), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Compare all cases, or those whose label holds a word, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.label]
    if find_spec("bitsandbytes") is None:
        print("left out, without bitsandbytes: 4 and 8 bit", file=sys.stderr)
        cases = [case for case in cases if not case.bits]
    rows = compare(tuple(cases))
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "peft"))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} CPUs, {versions}\n"
    )
    print("| case | model | M params | layers x width | vocab | rows x tokens | peak at |"
          " estimate GiB | measured GiB | off | libraries GiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        case = row["case"]
        print(f"| {case.label} | {case.model_type} | {row['million']:.1f} | "
              f"{case.layers} x {case.width} | {case.vocab:,} | {case.batch} x {case.block} | "
              f"{row['moment']} | {row['estimated']:.2f} | {row['measured']:.2f} | "
              f"{row['off']:+.0%} | {row['baseline']:.2f} |")  # fmt: skip
    worst = max(rows, key=lambda row: abs(row["off"]))
    print(f"\nLargest deviation: {worst['off']:+.1%} ({worst['case'].label}).")


if __name__ == "__main__":
    main()
