"""Small tokenizers, and the rendering stages run on records that a test makes up."""

import functools
import inspect

import pyarrow as pa

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.plan import build_stage, get_stage
from pipelines.recipe import load_recipe
from pipelines.records import new_record, write_rows
from pipelines.render import fim, pack, templates
from pipelines.render.arrow_files import open_writer, read_batches
from pipelines.render.encode import EXAMPLE_SCHEMA
from pipelines.render.fragments import Splitter
from pipelines.render.text_encoder import open_encoder
from pipelines.render.vocabulary import train_tokenizer
from pipelines.store import StageSpec, Store

# Code and prose that every machine has: the project's own.
CORPUS = [inspect.getsource(module) for module in (fim, pack, templates)]
STAGES = ("tokenizer", "format", "tokenize", "pack")

# Text that looks like control tokens, in the places where it may stand.
CONTROL_STRINGS = (
    *templates.CHAT_TOKENS, "<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>",
    "<fim_pad>", "<filename>", "<jupyter_code>", "<reponame>", "<|ASSISTANT|>", "<|END|>",
)  # fmt: skip
CONTEXTS = (
    "{}", "{}{}", "before {} after", "x={}", "line\n{}\nline", "```\n{}\n```",
    "caf\u00e9 {} \U0001f600",
)  # fmt: skip
FORGED = [context.format(text, text) for text in CONTROL_STRINGS for context in CONTEXTS]


@functools.cache
def small_tokenizer():
    """Return a trained tokenizer of 512 tokens that also knows the chat tokens."""
    tokenizer = train_tokenizer(CORPUS, 512)
    tokenizer.add_special_tokens(list(templates.CHAT_TOKENS))
    tokenizer.encode_special_tokens = True
    return tokenizer


def small_splitter(block_size):
    """Return a splitter of files with the small tokenizer."""
    tokenizer = small_tokenizer()
    return Splitter(tokenizer, open_encoder(tokenizer, fast=True), block_size)


def record(record_id, **body):
    """Return a record of source `s` that is its own group."""
    return new_record(id=record_id, group=record_id, source="s", **body)


def rendering_recipe(**overrides):
    """Return the quickstart recipe with a vocabulary of 512 and dotted keys replaced."""
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_recipe("quickstart", overrides={"tokenizer.train_vocab_size": 512, **keys})


def store_split(store, splits):
    """Put records into a store as the split stage leaves them; return its reference.

    `splits` maps a split to one shard's rows, or to a list of such shards.
    """

    def build(work):
        reports = []
        for split, rows in splits.items():
            shards = rows if rows and isinstance(rows[0], list) else [rows]
            for number, part in enumerate(shards):

                def write(inputs, output, params, part=part):
                    write_rows(output, part)
                    return Outcome(Counts(len(part), len(part), len(part)))

                reports.append(work.one(write, Job(f"{split}-{number:05d}.parquet", (), split), {}))
        return Built(tuple(reports))

    return store.build(StageSpec("split", {"records": repr(splits)}, ""), build)


def render_stages(root, recipe, splits, *, workers=1, until="pack"):
    """Build the rendering stages on records; return the store and the references by stage."""
    store = Store(root, workers=workers)
    refs = {"split": store_split(store, splits)}
    for name in STAGES[: STAGES.index(until) + 1]:
        refs[name] = build_stage(get_stage(name), recipe, refs, store)
    return store, refs


def write_pieces(path, rows, schema):
    """Write rows as a stage between others leaves them."""
    with open_writer(path, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def read_stream(path):
    """Return the rows of a shard of pieces or examples."""
    return [row for batch in read_batches(path) for row in batch.to_pylist()]


def write_examples(path, rows):
    """Write rows with labels as the tokenize stage leaves them."""
    trained = [{**row, "trained": [label != -100 for label in row["labels"]]} for row in rows]
    write_pieces(path, trained, EXAMPLE_SCHEMA)


def read_examples(path):
    """Return the rows of a shard of examples, with their labels."""
    found = read_stream(path)
    for row in found:
        pairs = zip(row["input_ids"], row["trained"], strict=True)
        row["labels"] = [i if is_label else -100 for i, is_label in pairs]
    return found
