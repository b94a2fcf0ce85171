"""Real Python with secrets planted anywhere parses after redaction wherever it parsed before."""

import ast
import sysconfig
import warnings
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.curate.redact_text import ALL_KINDS, find_edits, redact
from tests.assets.labelled_secrets import decoys, positives

STDLIB = Path(sysconfig.get_paths()["stdlib"])
MODULES = "smtplib.py shlex.py calendar.py netrc.py textwrap.py ftplib.py email/utils.py".split()
SOURCES = [(STDLIB / name).read_text(encoding="utf-8") for name in MODULES]
SECRETS = [sample for sample in positives(3) if len(sample.text) < 500]
FRAGMENTS = [sample.text for sample in [*SECRETS, *decoys(3, 1)]]
# A key that its issuer marked is no code even where it parses, as sk-... does.
CODE = [sample.text for sample in SECRETS if sample.kind in {"email", "password", "secret"}]


def parses(source):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(SOURCES), st.lists(st.sampled_from(FRAGMENTS), max_size=3), st.randoms())
def test_python_parses_after_redaction_wherever_it_parsed_before(source, fragments, rng):
    for fragment in fragments:
        lines = source.split("\n")
        number = rng.randrange(len(lines))
        flat = fragment.replace("\n", " ").strip()
        code = rng.choice(CODE).replace("\n", " ").strip()
        lines[number] += rng.choice([f"  # {flat}", code, f"; x = {flat!r}", f" @ {code}"])
        planted = "\n".join(lines)
        source = planted if parses(planted) else source + f"\nx = {fragment!r}\n"
    assert parses(source)

    done = redact(source, find_edits(source, ALL_KINDS, python=True))
    fenced = f"Try this:\n\n```python\n{source}\n```\n"
    inside = redact(fenced, find_edits(fenced, ALL_KINDS)).split("```python\n")[-1]

    assert parses(done)
    assert parses(inside.rpartition("\n```")[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SOURCES), st.sampled_from(SECRETS), st.sampled_from("'\""), st.randoms())
def test_a_secret_in_a_string_or_a_comment_of_real_python_is_gone(source, sample, quote, rng):
    if quote in sample.secret or "\n" in sample.secret or "\\" in sample.secret:
        return
    planted = f"password = {quote}{sample.secret}{quote}\n"
    if sample.kind == "secret":
        planted = f"api_key = {quote}{sample.secret}{quote}\n"
    if sample.kind == "azure":
        planted = f"x = {quote}AccountKey={sample.secret}{quote}\n"
    text = planted + source if rng.random() < 0.5 else f"{source}\n{planted}"

    done = redact(text, find_edits(text, ALL_KINDS, python=True))

    assert sample.secret not in done
    assert parses(done)


@given(st.lists(st.sampled_from([*FRAGMENTS, "\\", "\n", "@", ":", "'", "."])).map("".join))
def test_edits_lie_in_order_and_apart_and_leave_nothing_to_find(text):
    edits = find_edits(text, ALL_KINDS)

    assert all(edit.start < edit.end for edit in edits)
    assert all(left.end <= right.start for left, right in pairwise(edits))
    kept = [text[a.end : b.start] for a, b in pairwise(edits)]
    assert all(part in redact(text, edits) for part in kept)
