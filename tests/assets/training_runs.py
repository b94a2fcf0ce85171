"""A tiny tokenizer, packed dataset and run, as the data stages would leave them."""

import random
from itertools import chain

import pyarrow as pa

from pipelines.engine import Built, Job, Outcome, ShardReport
from pipelines.manifest import Counts
from pipelines.recipe import load_recipe
from pipelines.runs import open_run
from pipelines.store import StageSpec, Store

SPECIAL = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
VOCABULARY = 300
BLOCK = 64
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint16())),
        ("labels", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("record_ids", pa.list_(pa.string())),
    ]
)


def write_tokenizer(folder, new_tokens=()):
    """Write a byte-level tokenizer of 300 ids with StarCoder's control tokens, and new ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"filler{i}" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<fim_pad>",
        extra_special_tokens=[*SPECIAL[1:4], *new_tokens],
    ).save_pretrained(folder)
    return folder


def document(rng, size):
    """Return a counting sequence, which a small model learns in a few steps."""
    start, step = rng.randrange(5, 50), rng.randrange(1, 4)
    return [5 + (start + step * i) % 200 for i in range(size)]


def packed_rows(number, seed=0):
    """Return rows of two or three documents; the first two tokens of each are not trained."""
    rng = random.Random(seed)
    rows = []
    for row in range(number):
        lengths = [rng.randrange(10, 30) for _ in range(rng.randrange(1, 3))]
        documents = [document(rng, size) for size in lengths]
        labels = [[-100, -100, *d[2:]] for d in documents]
        rows.append(
            {
                "input_ids": list(chain(*documents)),
                "labels": list(chain(*labels)),
                "lengths": lengths,
                "record_ids": [f"r{row}-{i}" for i in range(len(lengths))],
            }
        )
    return rows


def write_shard(inputs, output, params):
    """Write one Arrow stream shard (a shard function of the engine)."""
    rows = params["rows"][params["first"] : params["last"]]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with pa.OSFile(str(output), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=7)
    counts = Counts(rows_in=len(rows), rows_out=len(rows), used=len(rows))
    trained = sum(label != -100 for row in rows for label in row["labels"])
    return Outcome(counts, sum(len(row["input_ids"]) for row in rows), trained)


def build_stages(store, train=40, validation=9, new_tokens=()):
    """Build the two stages that training reads; return {name: reference}."""

    def pack(work):
        reports: list[ShardReport] = []
        for split, number in (("train", train), ("validation", validation), ("test", 4)):
            rows = packed_rows(number, seed=len(split))
            for shard, first in enumerate(range(0, number, 25)):
                job = Job(f"{split}-{shard:05d}.arrow", (), split)
                params = {"rows": rows, "first": first, "last": first + 25}
                reports.append(work.one(write_shard, job, params))
        return Built(tuple(reports))

    def tokenizer(work):
        folder = write_tokenizer(work.path / "made", new_tokens)

        def copy(inputs, output, params):
            output.write_bytes((folder / params["name"]).read_bytes())
            return Outcome(Counts())

        return Built(
            tuple(
                work.one(copy, Job(path.name, ()), {"name": path.name})
                for path in sorted(folder.iterdir())
            )
        )

    spec = {"train": train, "validation": validation}
    return {
        "tokenizer": store.build(StageSpec("tokenizer", {"new": new_tokens}, ""), tokenizer),
        "pack": store.build(StageSpec("pack", spec, ""), pack),
    }


def make_recipe(**overrides):
    """Return the quickstart at toy size; overrides are dotted keys with "__" for the dots."""
    values = {
        "model.config": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": BLOCK},
        "tokenizer.train_vocab_size": VOCABULARY,
        "tokenization.block_size": BLOCK,
        "training.max_steps": 20,
        "training.warmup_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.logging_steps": 2,
        "training.eval_steps": 10,
        "training.save_steps": 5,
    }
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe("quickstart", overrides=values | changes)


def make_run(root, recipe=None, new_tokens=(), **hardware):
    """Return (run, store) ready to train; `hardware` changes fields of the run's hardware."""
    store = Store(root / "store")
    refs = build_stages(store, new_tokens=new_tokens)
    run = open_run(recipe or make_recipe(), refs, root / "runs")
    info = run.info()
    info["key_parts"]["hardware"] |= hardware
    run.write("run.json", info)
    return run, store


CLUSTER_VARIABLES = (
    "STARLOOM_RDZV_ENDPOINT", "STARLOOM_NODE_RANK", "SLURM_JOB_ID", "SLURM_NODEID"
)  # fmt: skip


def write_hardware(folder, text):
    """Write a hardware file; return its path as `hardware` takes it."""
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)
