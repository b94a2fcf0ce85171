"""A run folder of `starloom run` over the benchmark's documents: tokenizer, shards, recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.gpu.arms import SHAPES, Arm
from benchmarks.gpu.documents import Documents
from pipelines.engine import Built, Job, Outcome, Work
from pipelines.manifest import Counts
from pipelines.recipe import Recipe, load_recipe
from pipelines.runs import Run, open_run
from pipelines.store import StageRef, StageSpec, Store
from pipelines.training.collate import PackedRow

SPECIAL = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint16())),
        ("labels", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("record_ids", pa.list_(pa.string())),
    ]
)
VALIDATION = 2  # rows; nothing is evaluated within the windows


def make_run(arm: Arm, documents: Documents, folder: Path, *, on_cpu: bool) -> tuple[Run, dict]:
    """Return a run ready to be trained, and {stage: folder} of its tokenizer and dataset."""
    store = Store(folder / "store")
    recipe = make_recipe(arm, on_cpu=on_cpu)
    refs: dict[str, StageRef] = {
        "tokenizer": store.build(
            StageSpec("tokenizer", {}, ""), tokenizer_stage(documents.vocabulary)
        ),
        "pack": store.build(StageSpec("pack", {}, ""), pack_stage(documents.rows())),
    }
    run = open_run(recipe, refs, folder / "runs")
    info = run.info()
    info["key_parts"]["hardware"] |= {"processes_per_node": 1, "strategy": "ddp"}
    run.write("run.json", info)
    run.checkpoints.mkdir(exist_ok=True)
    return run, {name: store.path(ref) for name, ref in refs.items()}


def make_recipe(arm: Arm, *, on_cpu: bool) -> Recipe:
    """Return the quickstart's recipe with the arm's model and batches, its defaults kept."""
    shape = SHAPES[arm.shape]
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd}
    return load_recipe(
        "quickstart",
        overrides={
            "model.config": {"model_type": "gpt_bigcode", **sizes, "n_positions": shape.positions},
            "model.dtype": "bfloat16",
            "tokenizer.train_vocab_size": shape.vocabulary,
            "tokenization.block_size": shape.block,
            "training.per_device_train_batch_size": arm.rows,
            "training.gradient_accumulation_steps": arm.accumulation,
            "training.max_steps": 10**6,
            "training.logging_steps": 10,
            "training.eval_steps": 10**6,
            "training.save_steps": 10**6,
            "training.torch_compile": arm.compiled,
            "hardware": "cpu" if on_cpu else "gpu",
        },
    )


def tokenizer_stage(vocabulary: int) -> Callable[[Work], Built]:
    """Return a builder of a tokenizer with so many ids; it never has to encode anything."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"filler{number}" for number in range(vocabulary - len(SPECIAL)))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [])),
        bos_token=SPECIAL[0], eos_token=SPECIAL[0], pad_token=SPECIAL[-1],
    )  # fmt: skip

    def build(work: Work) -> Built:
        made = work.path / "made"
        tokenizer.save_pretrained(made)

        def copy(inputs: Sequence[Path], output: Path, params: dict[str, Any]) -> Outcome:
            output.write_bytes(inputs[0].read_bytes())
            return Outcome(Counts())

        files = [path for path in sorted(made.iterdir()) if path.is_file()]
        return Built(tuple(work.one(copy, Job(path.name, (path,)), {}) for path in files))

    return build


def pack_stage(rows: list[PackedRow]) -> Callable[[Work], Built]:
    """Return a builder of a packed dataset of these rows, the last few of them for validation."""
    parts = {"train": rows[:-VALIDATION], "validation": rows[-VALIDATION:]}

    def write(inputs: Sequence[Path], output: Path, params: dict[str, Any]) -> Outcome:
        found = parts[params["split"]]
        table = pa.table(
            [
                [row.input_ids for row in found],
                [row.labels for row in found],
                [row.lengths for row in found],
                [[f"random:{i}" for i in range(len(row.lengths))] for row in found],
            ],
            schema=SCHEMA,
        )
        with pa.OSFile(str(output), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_table(table)
        counts = Counts(len(found), len(found), len(found))
        return Outcome(counts, tokens=sum(len(row.input_ids) for row in found))

    def build(work: Work) -> Built:
        jobs = [(name, Job(f"{name}-00000.arrow", (), name)) for name in parts]
        return Built(tuple(work.one(write, job, {"split": name}) for name, job in jobs))

    return build
