"""Rows and files in the schemas that instruction and dialogue datasets come in."""

import json

from tests.assets.curation import curation_recipe, rows_of, run_stages

# The example of seed 001, trailing commas included.
SEED_001 = """\
{
    "messages": [
        {"content": "Is it possible to imagine a society without law?", "role": "user"},
        {
            "content": "It is difficult to imagine a society that is able to be maintained \
without any semblance of Law.",
            "role": "assistant",
        },
        {
            "content": "Is it still difficult to imagine?",
            "role": "user",
        },
        {
            "content": "You are correct that there are other factors that can guide behavior.",
            "role": "assistant",
        }
    ]
}
"""
# The example of seed 003, as it stands there.
SEED_003 = {
    "prompt": "Runs a single iteration of isotonic regression on the input data,\n"
    "and reports the total time taken (in seconds).'",
    "completion": "def bench_isotonic_regression(Y):\n    \n    gc.collect()\n\n"
    "    tstart = default_timer()\n    isotonic_regression(Y)\n"
    "    return default_timer() - tstart",
}
ALPACA = [
    {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
    {"instruction": "Name a prime.", "input": "", "output": "7"},
]


def dataset_source(path, **keys):
    """Return a dataset source that reads a path."""
    return {"type": "dataset", "id": "d", "path": str(path), "license": "MIT", **keys}


def collect(tmp_path, *sources, workers=1, store="store"):
    """Collect sources; return (records, manifest)."""
    recipe = curation_recipe(*sources)
    made, refs = run_stages(tmp_path / store, recipe, until="collect", workers=workers)
    return rows_of(made, refs["collect"]), made.manifest(refs["collect"])


def lines(*rows):
    """Return rows as JSON lines; a string stands as it is."""
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return "".join(f"{text}\n" for text in texts)


def body(record):
    """Return what a record trains on."""
    if record["messages"] is not None:
        return [(turn["role"], turn["content"], turn["train"]) for turn in record["messages"]]
    return record["text"] or (record["prompt"], record["completion"])


def pairs(*names):
    """Return one prompt/completion row for each name."""
    return [{"prompt": f"What is {name}?", "completion": f"It is {name}."} for name in names]
