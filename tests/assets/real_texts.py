"""The texts of the real data sets, whatever their form."""

import json


def strings_in(value):
    """Yield every string in decoded JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def corpus_texts(folder):
    """Yield the strings of every JSON file below a folder, and the lines of other text files."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".gz", ".ftz") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if path.suffix == ".json":
            yield from strings_in(json.loads(text))
        elif path.suffix == ".jsonl":
            for line in filter(None, text.split("\n")):
                yield from strings_in(json.loads(line))
        else:
            yield from text.split("\n")
