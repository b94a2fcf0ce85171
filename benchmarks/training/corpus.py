"""Function/docstring pairs from installed packages, made into what each arm of `train` reads.

The documents go through the stages `tokenizer`, `format`, `tokenize` and `pack`, as in
`starloom run`; `documents.parquet` holds the same ones as text, for the scripts of the seeds.
"""

import ast
import inspect
import random
import shutil
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.plan import build_stage, get_stage
from pipelines.recipe import Recipe, load_recipe
from pipelines.records import new_record, write_rows
from pipelines.runs import Run, open_run
from pipelines.store import StageSpec, Store
from pipelines.training.embeddings import padded_size

BLOCK = 1024
PACKAGES = (
    "accelerate", "datasets", "deepspeed", "numpy", "peft", "prefect", "pyarrow", "scipy",
    "scrapy", "sklearn", "torch", "transformers",
)  # fmt: skip
VALIDATION = 40  # documents; what is measured is training
LARGEST = 20_000  # characters; a block holds about 4,000


def find_pairs(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (docstring, function without it) of the installed packages, in a fixed order."""
    paths = sorted(p for name in PACKAGES for p in (root / name).rglob("*.py") if p.is_file())
    random.Random(42).shuffle(paths)  # noqa: S311
    for path in paths:
        try:
            text = path.read_bytes().decode()
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                yield split_function(node, lines)


def split_function(node: ast.FunctionDef, lines: Sequence[str]) -> tuple[str, str]:
    docstring = node.body[0]
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1]]
    kept += lines[docstring.end_lineno or 0 : node.end_lineno]
    return inspect.cleandoc(ast.get_docstring(node) or ""), textwrap.dedent("".join(kept))


def collect_pairs(count: int) -> list[tuple[str, str]]:
    """Return so many different pairs."""
    pairs: dict[tuple[str, str], None] = {}
    for prompt, completion in find_pairs(Path(sysconfig.get_paths()["purelib"])):
        if prompt.strip() and completion.strip() and len(prompt) + len(completion) < LARGEST:
            pairs[prompt, completion] = None
        if len(pairs) == count:
            break
    return list(pairs)


def make_recipe(vocabulary: int) -> Recipe:
    """Return the recipe of starloom's arm: the quickstart's, on one process, 4 layers of 128."""
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": BLOCK}
    return load_recipe(
        "quickstart",
        overrides={
            "model.config": {"model_type": "gpt_bigcode", **shape},
            "tokenizer.train_vocab_size": vocabulary,
            "tokenization.block_size": BLOCK,
            "training.per_device_train_batch_size": 3,
            "training.max_steps": 10_000,
            "training.logging_steps": 10,
            "training.eval_steps": 10_000,
            "training.save_steps": 10_000,
        },
    )


def prepare(folder: Path, vocabulary: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Build tokenizer, packed dataset, run and documents; return where they are, and the sizes."""
    store = Store(folder / "store", workers=1)
    recipe = make_recipe(vocabulary)
    refs = {"split": store.build(StageSpec("split", {"n": len(pairs)}, ""), _copier(folder, pairs))}
    for name in ("tokenizer", "format", "tokenize", "pack"):
        refs[name] = build_stage(get_stage(name), recipe, refs, store)
    run = open_run(recipe, refs, folder / "runs")
    _on_one_process(run)
    paths = {name: str(store.path(refs[name])) for name in ("tokenizer", "pack")}
    return {
        **paths,
        "run": str(run.path),
        "documents": str(folder / "documents.parquet"),
        **_write_documents(folder, pairs, Path(paths["tokenizer"])),
    }


def _copier(folder: Path, pairs: Sequence[tuple[str, str]]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("validation", pairs[:VALIDATION]), ("train", pairs[VALIDATION:])):
        rows = [
            new_record(
                id=f"pair:{split}-{number:05d}", group=f"{split}-{number}", source="pair",
                prompt=prompt, completion=completion,
            )
            for number, (prompt, completion) in enumerate(part)
        ]  # fmt: skip
        write_rows(folder / f"{split}.parquet", rows)

    def copy(inputs: Sequence[Path], target: Path, params: dict) -> Outcome:
        shutil.copy(inputs[0], target)
        number = pq.read_metadata(target).num_rows
        return Outcome(Counts(number, number, number))

    def build(work: Any) -> Built:
        names = ("train", "validation")
        jobs = [Job(f"{name}-00000.parquet", (folder / f"{name}.parquet",), name) for name in names]
        return Built(work.map(copy, jobs, {}))

    return build


def _on_one_process(run: Run) -> None:
    """Give the run the hardware of one process: no ranks, no ZeRO, one thread."""
    info = run.info()
    info["key_parts"]["hardware"] |= {"processes_per_node": 1, "strategy": "ddp"}
    run.write("run.json", info)


def _write_documents(
    folder: Path, pairs: Sequence[tuple[str, str]], tokenizer: Path
) -> dict[str, Any]:
    """Write the documents that fit into a block, as text; return their number and tokens."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [f"{prompt}\n{completion}" for prompt, completion in pairs[VALIDATION:]]
    sizes = [len(found) + 1 for found in encode.encode_batch_fast(texts)]
    kept = [(text, size) for text, size in zip(texts, sizes, strict=True) if size <= BLOCK]
    table = pa.table({"text": [t for t, _ in kept], "tokens": [s for _, s in kept]})
    pq.write_table(table, folder / "documents.parquet")
    return {
        "rows": padded_size(encode.get_vocab_size(with_added_tokens=True)),
        "number": len(kept),
        "tokens": sum(size for _, size in kept),
    }
