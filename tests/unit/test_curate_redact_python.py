"""Code that only looks like a secret stays, and little is parsed to know it."""

import pytest

from pipelines.curate import redact_python
from pipelines.curate.redact_text import ALL_KINDS, find_edits, redact
from pipelines.syntax import is_python, parse_python

FUNCTION = '''
def run_{0}(self, value, other=None):
    """Return what is left of a value, as bob@corp.com says."""
    return self.first[{0}] + value * other.second("name", key=value)  # eve@corp.com
'''


def redacted(text, *, python=True):
    return redact(text, find_edits(text, ALL_KINDS, python=python))


@pytest.fixture
def parsed(monkeypatch):
    """What is parsed, in order."""
    sources = []

    def note(source):
        sources.append(source)
        return is_python(source)

    monkeypatch.setattr(redact_python, "is_python", note)
    return sources


@pytest.mark.parametrize("python", [True, False])
def test_hits_in_strings_and_comments_are_replaced_without_a_parse(parsed, python):
    text = "".join(FUNCTION.format(number) for number in range(40))

    done = redacted(text, python=python)

    assert done == text.replace("bob@corp.com", "<EMAIL>").replace("eve@corp.com", "<EMAIL>")
    assert parsed == []


@pytest.mark.parametrize("python", [True, False])
def test_a_hit_in_code_takes_one_parse_and_none_of_the_strings(parsed, python):
    text = "import x\ny = a@b.io\n" + FUNCTION.format(1) + "z = a@b.io\n"

    done = redacted(text, python=python)

    assert done == text.replace("bob@corp.com", "<EMAIL>").replace("eve@corp.com", "<EMAIL>")
    [source] = parsed
    assert "value * other" in source
    assert "Return" not in source
    assert "corp" not in source


def test_a_megabyte_of_python_with_a_hit_in_its_code_still_parses(parsed):
    text = "".join(FUNCTION.format(number) for number in range(5500)) + "y = a@b.io\n"

    done = redacted(text, python=False)

    assert len(text) > 1_000_000
    assert done.endswith("y = a@b.io\n")
    assert done.count("<EMAIL>") == 11_000
    assert len(parsed) == 1
    assert is_python(done)


@pytest.mark.parametrize("unit", ["a\n", "a,", "a;", "''\n", "[],", "...\n", "x=1\n", "f'{a}'\n"])
def test_what_would_take_long_to_parse_is_not_read_as_code(parsed, unit):
    text = "import x\ny = a@b.io\n" + unit * (400_000 // len(unit))

    assert redacted(text).startswith("import x\ny = <EMAIL>\n")
    assert parsed == []


@pytest.mark.parametrize(("names", "blocks"), [(0, 10_000), (1000, 30)])
def test_fenced_blocks_share_what_may_be_parsed(parsed, names, blocks):
    """A name in seven characters; a parse costs as much as a hundred."""
    text = ("```python\ny = a@b.io\n" + "aaaaa\n" * names + "```\n") * blocks

    done = redacted(text, python=False)

    assert 0 < len(parsed) * (names + 100) <= 2000 + len(text) / 7
    assert len(parsed) < blocks
    assert done.count("a@b.io") == len(parsed)


def test_a_small_block_is_read_as_code_after_one_that_is_made_to_be_slow(parsed):
    slow = "```python\ny = a@b.io\n" + "a\n" * 20_000 + "```\n"

    done = redacted(f"{slow}```python\nz = a@b.io\n```\n", python=False)

    assert done.startswith("```python\ny = <EMAIL>\n")
    assert done.endswith("z = a@b.io\n```\n")


def test_a_list_of_addresses_is_data_whether_it_parses_or_not(parsed):
    few = "mail = [\n" + "bob@corp.com,\n" * 500 + "]\n"
    many = few.replace("]", "bob@corp.com,\n]")

    assert redacted(few) == few
    assert redacted(many) == many.replace("bob@corp.com", "<EMAIL>")
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "key", ["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", "AKIA44OV52TNQFFV7RNL"]
)
def test_a_key_that_its_issuer_marked_is_replaced_though_it_parses_without_quotes(key):
    text = f"import openai\nopenai.key = {key}\ny = a@b.io\n"

    assert is_python(text)
    assert redacted(text) == text.replace(key, "<KEY>")


@pytest.mark.parametrize(
    ("literal", "expected"),
    [
        ("f'{a@b.io} bob@corp.com'", "f'{a@b.io} <EMAIL>'"),
        ("rF'{x}{{{a@b.io}}} bob@corp.com'", "rF'{x}{{{a@b.io}}} <EMAIL>'"),
        ("f'{{bob@corp.com}}'", "f'{{<EMAIL>}}'"),
        ("f'{d[\"bob@corp.com\"]}'", "f'{d[\"<EMAIL>\"]}'"),
        ("f'''{x}\n{a@b.io:>{w}} bob@corp.com'''", "f'''{x}\n{a@b.io:>{w}} <EMAIL>'''"),
        ("'{bob@corp.com}'", "'{<EMAIL>}'"),
        ("b'\\'bob@corp.com' # it's bob@corp.com", "b'\\'<EMAIL>' # it's <EMAIL>"),
        ("'#' + a@b.io + '''\\''' bob@corp.com'''", "'#' + a@b.io + '''\\''' <EMAIL>'''"),
        ("'x\\\n bob@corp.com' + a@b.io", "'x\\\n <EMAIL>' + a@b.io"),
        ("'' '' + a@b.io", "'' '' + a@b.io"),
    ],
)
def test_strings_and_comments_end_where_python_ends_them(literal, expected):
    for end in ("\n", "\r\n"):
        text = f"import x{end}y = {literal}{end}z = a@b.io{end}"
        assert redacted(text, python=False) == f"import x{end}y = {expected}{end}z = a@b.io{end}"


@pytest.mark.parametrize(
    "broken",
    [
        "print 1", "x = (", "x = 'it", "x = '''", "\x00", "\ud800", "\tx\n        y",
        "x = " + "9" * 5000, "x = " + "(" * 500 + ")" * 500, "x = " + "-" * 50_000 + "1",
        "x = " + "1+" * 50_000 + "1", "\\\n" * 50_000, "\\", "import x as",
    ],
)  # fmt: skip
def test_in_what_does_not_parse_every_hit_is_a_secret(broken):
    """Also where it is too deep for the parser, or no text at all."""
    text = f"import x\ny = bob@corp.com\n{broken}"

    assert not is_python(text)
    assert redacted(text) == f"import x\ny = <EMAIL>\n{broken}"


@pytest.mark.parametrize(
    "literal",
    ["f'{to bob@corp.com}'", "f'{to:bob@corp.com}'", "f'{to=bob@corp.com}'", "'{bob@corp.com'",
     "f'{x + a@b.io + " + "x + " * 300 + "x}'"],
)  # fmt: skip
def test_what_is_no_code_in_braces_is_a_secret(literal):
    text = f"import x\ny = {literal}\n"

    assert redacted(text) == text.replace("bob@corp.com", "<EMAIL>").replace("a@b.io", "<EMAIL>")


def test_python_is_what_parses_and_whose_names_may_be():
    for source in ("", "x = 1", "def f(a): return a", "'\\d'", "return 1"):
        parse_python(source)
        assert is_python(source)
    assert not is_python("def f(a, a): pass")
