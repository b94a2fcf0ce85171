"""Raw input of every shipped recipe, made from the standard library: real English, real code."""

import ast
import itertools
import json
import shutil
import sysconfig
from pathlib import Path
from xml.sax.saxutils import quoteattr

STDLIB = Path(sysconfig.get_paths()["stdlib"])
PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest")


def functions(number):
    """Return (name, docstring, source) of documented functions, different ones."""
    return list(itertools.islice(_functions(), number))


def _functions():
    for package in PACKAGES:
        for path in sorted((STDLIB / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and len(ast.get_docstring(node) or "") > 60:
                    name = f"{path.relative_to(STDLIB).with_suffix('')}.{node.name}"
                    yield name.replace("/", "."), ast.get_docstring(node), _source(text, node)


def _source(text, node):
    lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines)


def question(name, docstring):
    return f"How would I write the function {name}? It should do this: {docstring}"


def write_instructions(path, answer, number=300):
    """Write Code Alpaca (`answer` "output") or GPTeacher ("response") rows as one JSON array."""
    rows = [
        {
            "instruction": question(name, docstring) if n % 3 else "Explain this Python function.",
            "input": "" if n % 3 else source,
            answer: source if n % 3 else docstring,
        }
        for n, (name, docstring, source) in enumerate(functions(number))
    ]
    path.write_text(json.dumps(rows))
    return path


def write_trees(path, number=120):
    """Write OpenAssistant trees: a question, two ranked answers, and a follow-up of the first."""
    with path.open("w") as file:
        for n, (name, docstring, source) in enumerate(functions(number)):
            first = f"You could write it like this:\n```python\n{source}\n```"
            more = _message(f"m{n}-3", "prompter", "Thanks! And what does it do, in short?")
            more["replies"] = [_message(f"m{n}-4", "assistant", f"In short: {docstring}")]
            answers = [
                {**_message(f"m{n}-1", "assistant", first), "rank": 0, "replies": [more]},
                {**_message(f"m{n}-2", "assistant", f"I would read {docstring}"), "rank": 1},
            ]
            root = {
                **_message(f"m{n}-0", "prompter", question(name, docstring)), "replies": answers,
            }  # fmt: skip
            tree = {
                "message_tree_id": f"m{n}-0", "tree_state": "ready_for_export", "prompt": root,
            }  # fmt: skip
            file.write(json.dumps(tree) + "\n")
    return path


def _message(message_id, role, text):
    return {
        "message_id": message_id, "role": role, "text": text, "lang": "en", "replies": [],
        "deleted": False, "synthetic": False, "review_result": True,
    }  # fmt: skip


def write_posts(folder, number=200):
    """Write Posts.xml of a dump: a question with an accepted answer and a worse one each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<posts>"]
    for n, (name, docstring, source) in enumerate(functions(number)):
        first = 3 * n + 1
        asked = f"<p>{_text(question(name, docstring))}</p>"
        best = f"<p>Write it like this:</p>\n<pre><code>{_text(source)}\n</code></pre>"
        worse = f"<p>I would just read what it says: {_text(docstring)}</p>"
        lines += [
            _row(first, 1, asked, Score=n % 7, Title=f"How to write {name}?", Tags="<python>",
                 AcceptedAnswerId=first + 1),
            _row(first + 1, 2, best, Score=n % 5 + 1, ParentId=first),
            _row(first + 2, 2, worse, Score=0, ParentId=first),
        ]  # fmt: skip
    (folder / "Posts.xml").write_text("\ufeff" + "\n".join([*lines, "</posts>", ""]))
    return folder


def _text(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _row(number, kind, body, **more):
    values = {
        "Id": number, "PostTypeId": kind, "CreationDate": "2024-05-01T10:00:00.000",
        "Body": body, "OwnerUserId": number % 50 + 1, "OwnerDisplayName": f"user{number % 50}",
        "LastActivityDate": "2024-05-02T10:00:00.000", "ContentLicense": "CC BY-SA 4.0", **more,
    }  # fmt: skip
    written = " ".join(f"{k}={quoteattr(str(v), {chr(10): '&#xA;'})}" for k, v in values.items())
    return f"  <row {written} />"


def write_code(folder):
    """Copy packages of the standard library."""
    for package in PACKAGES:
        shutil.copytree(
            STDLIB / package,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__", "test*", "*.pyc"),
        )
    return folder


def make_source(recipe, folder):
    """Write what a shipped recipe reads into a folder; return the path to give it."""
    folder.mkdir(parents=True, exist_ok=True)
    match recipe:
        case "oasst":
            return write_trees(folder / "trees.jsonl")
        case "code-alpaca":
            return write_instructions(folder / "code_alpaca.json", "output")
        case "gpteacher":
            return write_instructions(folder / "codegen.json", "response")
        case "stack-exchange":
            return write_posts(folder / "python.stackexchange.com")
        case "scikit-learn" | "qwen-coder":
            return write_code(folder / "stdlib")
    raise AssertionError(recipe)
