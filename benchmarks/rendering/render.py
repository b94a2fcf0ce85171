"""Renders, encodes, packs and writes the same rows in six ways, and compares CPU seconds.

    python -m benchmarks.rendering.corpus --folder data/bench/rendering --megabytes 110
    python -m benchmarks.rendering.render --corpus data/bench/rendering --tokenizer FOLDER

Prompt and completion are encoded each by itself, the end of text follows, the completion is
trained, and rows of 2,048 tokens are packed and written as Arrow. Each arm is a process of its own;
CPU seconds are of it and its children, without imports. The peers need `benchmarks/peers.txt`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.rendering.cost import cpu_seconds, peak_megabytes, summarize

PEERS = Path(__file__).parents[1] / ".venv"
BLOCK = 2048
ROWS_PER_SHARD = 2048
SEED = 42
END = "<|endoftext|>"

ARMS = {
    "starloom": "starloom: numpy split, cache over the tokenizer's own merges",
    "seed": "(a) the seeds' path: datasets.map, one example at a time",
    "alpaca": "(a2) the same, prompt and answer tokenized together, then the prompt for its length",
    "map": "(b) datasets.map(batched, num_proc=2)",
    "trl": "(c) TRL 1.16: SFTTrainer's tokenize + pack (bfd), num_proc=2",
    "batch": "(d) starloom with tokenizers' encode_batch_fast",
    "tiktoken": "(e) starloom with tiktoken, the same merges",
}


def read_pairs(corpus: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(corpus.glob("train-*.parquet")):
        table = pq.read_table(path, columns=["prompt", "completion"])
        yield from zip(*(table[name].to_pylist() for name in table.column_names), strict=True)


def run_starloom(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Run the stages format, tokenize and pack, as `starloom run` does."""
    from pipelines.engine import Built, Job, Outcome
    from pipelines.manifest import Counts
    from pipelines.plan import build_stage, get_stage
    from pipelines.recipe import load_recipe
    from pipelines.store import StageSpec, Store

    def copy(inputs: Sequence[Path], target: Path, params: dict) -> Outcome:
        shutil.copy(inputs[0], target)
        number = pq.read_metadata(target).num_rows
        return Outcome(Counts(number, number, number))

    recipe = load_recipe(
        "quickstart",
        overrides={
            "tokenizer": {"name_or_path": str(tokenizer)},
            "model": {"model_name_or_path": "bigcode/starcoderbase-1b"},
            "template": {"name": "plain"},
            "tokenization": {"block_size": BLOCK, "rows_per_shard": ROWS_PER_SHARD},
        },
    )
    store = Store(output / "store", workers=1)
    jobs = [Job(path.name, (path,), "train") for path in sorted(corpus.glob("train-*.parquet"))]
    refs = {
        "split": store.build(StageSpec("split", {}, ""), lambda w: Built(w.map(copy, jobs, {})))
    }
    for stage in ("tokenizer", "format", "tokenize", "pack"):
        refs[stage] = build_stage(get_stage(stage), recipe, refs, store)
    for shard, path in store.shards(refs["pack"], "train"):
        path.rename(output / shard.file)


def run_batch(corpus: Path, tokenizer: Path, output: Path) -> None:
    from pipelines.render import encode

    encode.choose_fast = lambda *_: False
    run_starloom(corpus, tokenizer, output)


def run_tiktoken(corpus: Path, tokenizer: Path, output: Path) -> None:
    from pipelines.render import encode

    encode.open_encoder = lambda opened, fast: TiktokenEncoder(opened)
    run_starloom(corpus, tokenizer, output)


class TiktokenEncoder:
    """starloom's encoder interface over tiktoken."""

    def __init__(self, tokenizer: Any) -> None:
        sys.path.append(str(next(PEERS.glob("lib/python3*/site-packages"))))
        import tiktoken

        from pipelines.render.piece_cache import byte_characters

        values = {character: byte for byte, character in enumerate(byte_characters())}
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        ranks = {
            bytes(values[c] for c in token): index
            for token, index in tokenizer.get_vocab(with_added_tokens=False).items()
            if token not in special
        }
        pattern = (
            r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
        )
        # Bytes that the vocabulary lacks are in no text of the corpus, but tiktoken wants all.
        for byte in range(256):
            ranks.setdefault(bytes([byte]), 10**6 + byte)
        self._encoding = tiktoken.Encoding(
            "same", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode_spans(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode each span by itself."""
        raw, ends = data.tobytes(), offsets.tolist()
        parts = [
            np.array(self._encoding.encode_ordinary(raw[i:j].decode()), np.int32)
            for i, j in pairwise(ends)
        ]
        counts = np.array([len(part) for part in parts], np.int64)
        return np.concatenate([np.empty(0, np.int32), *parts]), counts


def load_transformers(tokenizer: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), split_special_tokens=True
    )


def pack_lists(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray], output: Path) -> None:
    """Pack whole examples best-fit and write Arrow streams, as starloom's rows are."""
    from pipelines.render.pack import order_rows, plan_rows

    plan = plan_rows([len(row) for row in ids], BLOCK)
    plan = order_rows(plan, "train", {"seed": SEED})
    for number, first in enumerate(range(0, len(plan), ROWS_PER_SHARD)):
        rows = plan[first : first + ROWS_PER_SHARD]
        sizes = [sum(len(ids[i]) for i in row) for row in rows]
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        lists = [
            pa.ListArray.from_arrays(
                offsets,
                pa.array(np.concatenate([values[i] for row in rows for i in row]).astype(kind)),
            )
            for values, kind in ((ids, "u2"), (labels, "i4"))
        ]
        lengths = pa.array([[len(ids[i]) for i in row] for row in rows], pa.list_(pa.int32()))
        batch = pa.record_batch([*lists, lengths], names=["input_ids", "labels", "lengths"])
        path = str(output / f"train-{number:05d}.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)


def load_rows(corpus: Path, output: Path) -> Any:
    import datasets

    files = [str(path) for path in sorted(corpus.glob("train-*.parquet"))]
    columns = ["prompt", "completion"]
    return datasets.load_dataset(
        "parquet", data_files=files, columns=columns, split="train", cache_dir=str(output / "cache")
    )


def pack_dataset(rows: Any, output: Path) -> None:
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for batch in rows.with_format("numpy").iter(1000):
        for name, values in columns.items():
            values.extend(batch[name])
    pack_lists(columns["input_ids"], columns["labels"], output)


def run_seed(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Render, encode and mask one example at a time, as the scripts of the seeds do.

    The mask is found token by token in Python, as in `mask_user_labels`. Their attention masks,
    which no arm needs, are left out.
    """
    encode = load_transformers(tokenizer)
    end = encode.convert_tokens_to_ids(END)

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        source, target = encode(row["source"])["input_ids"], encode(row["target"])["input_ids"]
        ids = [*source, *target, end]
        labels = ids.copy()
        for number in range(len(labels)):
            if number < len(source):
                labels[number] = -100
        return {"input_ids": ids, "labels": labels}

    map_each(corpus, output, tokenize)


def run_alpaca(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Tokenize each row twice, as Alpaca's training script does, which seed 002 was trained with.

    What stands at the border of prompt and answer is merged, so that the rows are not the others'.
    """
    encode = load_transformers(tokenizer)
    end = encode.convert_tokens_to_ids(END)

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        ids = [*encode(row["source"] + row["target"])["input_ids"], end]
        length = len(encode(row["source"])["input_ids"])
        return {"input_ids": ids, "labels": [-100] * length + ids[length:]}

    map_each(corpus, output, tokenize)


def map_each(
    corpus: Path, output: Path, tokenize: Callable[[dict[str, str]], dict[str, list[int]]]
) -> None:
    """Render, then tokenize, one example at a time; pack."""

    def render(row: dict[str, str]) -> dict[str, str]:
        return {"source": f"{row['prompt']}\n", "target": row["completion"]}

    rows = load_rows(corpus, output).map(render, remove_columns=["prompt", "completion"])
    rows = rows.map(tokenize, remove_columns=["source", "target"])
    pack_dataset(rows.filter(lambda row: len(row["input_ids"]) <= BLOCK), output)


def run_map(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Encode with datasets.map, batched, in two processes, then pack."""
    encode = load_transformers(tokenizer)
    end = encode.convert_tokens_to_ids(END)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = encode([f"{prompt}\n" for prompt in batch["prompt"]])["input_ids"]
        completions = encode(batch["completion"])["input_ids"]
        pairs = [
            (a, [*b, end])
            for a, b in zip(prompts, completions, strict=True)
            if len(a) + len(b) < BLOCK
        ]
        return {
            "input_ids": [a + b for a, b in pairs],
            "labels": [[-100] * len(a) + b for a, b in pairs],
        }

    columns = ["prompt", "completion"]
    rows = load_rows(corpus, output)
    pack_dataset(rows.map(tokenize, batched=True, num_proc=2, remove_columns=columns), output)


def run_trl(corpus: Path, tokenizer: Path, output: Path) -> None:
    """Let SFTTrainer tokenize and pack; the model is the smallest there can be."""
    import datasets
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM
    from trl import SFTConfig, SFTTrainer

    encode = load_transformers(tokenizer)
    encode.add_special_tokens({"eos_token": END, "pad_token": "<fim_pad>"})
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": BLOCK}
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=len(encode), **shape))
    table = pa.table(
        {
            name: [f"{text}{end}" for text in values]
            for name, end, values in zip(
                ("prompt", "completion"),
                ("\n", ""),
                zip(*read_pairs(corpus), strict=True),
                strict=True,
            )
        }
    )
    rows = datasets.Dataset(table)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output / "trl"), max_length=BLOCK, packing=True, use_cpu=True,
            bf16=False, dataset_num_proc=2, completion_only_loss=True, report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=encode,
    )  # fmt: skip
    trainer.train_dataset.save_to_disk(str(output / "packed"))


def run_arm(arm: str, corpus: Path, tokenizer: Path) -> None:
    """Run one arm in this process and print what it took as JSON."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    work: Callable[[Path, Path, Path], None] = globals()[f"run_{arm}"]
    if arm in ("starloom", "batch", "tiktoken"):
        import pipelines.render.pack  # noqa: F401
    with tempfile.TemporaryDirectory(dir=corpus) as name:
        output = Path(name)
        before, started, floor = cpu_seconds(), time.monotonic(), peak_megabytes()
        work(corpus, tokenizer, output)
        took = {
            "cpu": cpu_seconds() - before,
            "wall": time.monotonic() - started,
            "peak": peak_megabytes(),
            "imports": floor,
        }
        print(json.dumps({**took, **summarize(output)}))


def table(results: dict[str, dict[str, Any]], megabytes: float) -> str:
    own = results["starloom"]
    lines = [
        f"{megabytes:.1f} MB of text (UTF-8), {own['tokens']:,} tokens, block {BLOCK}",
        "",
        "| arm | CPU s | MB / CPU s | wall s | ratio | peak MB | rows | tokens | rows' content |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in results.items():
        same = "same" if found["digest"] == own["digest"] else "differ"
        lines.append(
            f"| {ARMS[arm]} | {found['cpu']:.1f} | {megabytes / found['cpu']:.1f} "
            f"| {found['wall']:.1f} | {found['cpu'] / own['cpu']:.1f}x | {found['peak']:.0f} "
            f"| {found['rows']:,} | {found['tokens']:,} | {same} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_arm(arguments.run, arguments.corpus, arguments.tokenizer)
        return
    megabytes = (
        sum(len(a.encode()) + len(b.encode()) for a, b in read_pairs(arguments.corpus)) / 1e6
    )
    runs: dict[str, list[dict[str, Any]]] = {}
    for arm in in_turns(arguments.arms):
        python = PEERS / "bin" / "python" if arm == "trl" else sys.executable
        command = [str(python), "-m", "benchmarks.rendering.render", "--run", arm]
        command += ["--corpus", str(arguments.corpus), "--tokenizer", str(arguments.tokenizer)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"{ARMS[arm]} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        result = json.loads(done.stdout.strip().split("\n")[-1])
        runs.setdefault(arm, []).append(result)
        print(f"{arm}: {result}", file=sys.stderr, flush=True)
    results = {
        arm: sorted(found, key=lambda each: each["cpu"])[len(found) // 2]
        for arm, found in runs.items()
    }
    print(table(results, megabytes))


def in_turns(arms: Sequence[str]) -> list[str]:
    """Return the arms with starloom's, which takes seconds, before, between and after them."""
    others = [arm for arm in dict.fromkeys(arms) if arm != "starloom"]
    return ["starloom", *(each for arm in others for each in (arm, "starloom"))]


if __name__ == "__main__":
    main()
