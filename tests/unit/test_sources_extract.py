"""Functions are cut out of files exactly as the project's seed data has them."""

import ast
from pathlib import Path

import pytest

from pipelines.sources.extract import Skipped, Unit, Unusable, extract_units, read_source
from pipelines.syntax import BadSyntax, parse_python

SEED_PROMPT = (
    "Runs a single iteration of isotonic regression on the input data,\n"
    "and reports the total time taken (in seconds)."
)
SEED_COMPLETION = (
    "def bench_isotonic_regression(Y):\n    \n    gc.collect()\n\n    tstart = default_timer()\n"
    "    isotonic_regression(Y)\n    return default_timer() - tstart"
)


def extract(text):
    return list(extract_units(text, parse_python(text)))


def test_the_example_of_seed_003_is_reproduced_character_by_character():
    path = Path(__file__).parents[1] / "assets" / "bench_isotonic.py"

    units = extract(read_source(path, 10**6))

    assert units == [
        Unit("bench_isotonic_regression", (9, 18), SEED_PROMPT, SEED_COMPLETION),
    ]


def test_methods_nested_decorated_async_and_repeated_functions_have_names_of_their_own():
    text = '''\
class Point:
    """Not a function."""

    @property
    def x(self):
        """The x."""
        return 1

    @x.setter
    def x(self, value):
        """Set x.

            Indented more.
        Back.
        """
        self.y = value

    async def load(self):
        "Load."
        def inner():
            """Inner."""
            yield 1
        return inner

def plain():
    return 2

if plain():
    def one(): "One."; return 1
else:
    def one():
        """Other one."""
        return 2
'''

    assert extract(text) == [
        Unit("Point.x", (4, 7), "The x.", "@property\ndef x(self):\n    \n    return 1"),
        Unit(
            "Point.x#2",
            (9, 16),
            "Set x.\n\n    Indented more.\nBack.",
            "@x.setter\ndef x(self, value):\n    \n    self.y = value",
        ),
        Unit(
            "Point.load",
            (18, 23),
            "Load.",
            'async def load(self):\n    \n    def inner():\n        """Inner."""\n'
            "        yield 1\n    return inner",
        ),
        Unit("Point.load.<locals>.inner", (20, 22), "Inner.", "def inner():\n    \n    yield 1"),
        Unit("one", (29, 29), "One.", "def one(): return 1"),
        Unit("one#2", (31, 33), "Other one.", "def one():\n    \n    return 2"),
    ]


def test_text_inside_string_literals_keeps_its_indentation_and_everything_else_loses_it():
    text = '''\
class Q:
    def sql(self):
        """Return SQL."""
        query = """
        SELECT 1
    FROM t"""
# A comment further left.
        error = (
            "one "
            "two"
        )
        return query + \\
    error
'''

    [unit] = extract(text)

    assert unit.completion == (
        'def sql(self):\n    \n    query = """\n        SELECT 1\n    FROM t"""\n'
        '# A comment further left.\n    error = (\n        "one "\n        "two"\n    )\n'
        "    return query + \\\nerror"
    )
    assert ast.parse(unit.completion)


def test_functions_with_nothing_to_learn_from_are_skipped_with_their_reason():
    text = '''\
def stub():
    """Only this."""

def blank():
    """   """
    return 1

def broken():
    "\\ud800"
    return 1
'''

    assert extract(text) == [
        Skipped("stub", "nothing_but_a_docstring"),
        Skipped("broken", "docstring_not_text"),
    ]


def test_offsets_count_bytes_not_characters():
    text = 'def f(a="äöü"): "Größe."; return "ß"\n'

    assert extract(text) == [Unit("f", (1, 1), "Größe.", 'def f(a="äöü"): return "ß"')]


def test_a_thousand_elif_branches_do_not_exhaust_the_stack():
    branches = "".join(f"elif x == {i}:\n    pass\n" for i in range(900))
    text = f'if x:\n    pass\n{branches}else:\n    def f():\n        """F."""\n        return 1\n'

    assert [unit.name for unit in extract(text)] == ["f"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfx = 1\r\ny = 2\r", "x = 1\ny = 2\n"),
        ("# coding: latin-1\ns = 'é'\n".encode(), "# coding: latin-1\ns = 'é'\n"),
        (b"a = 1\x0c\nb = '\xe2\x80\xa8'\n", "a = 1\x0c\nb = '\u2028'\n"),
    ],
)
def test_marks_line_ends_and_coding_lines_are_read_as_utf8(tmp_path, content, text):
    path = tmp_path / "a.py"
    path.write_bytes(content)

    assert read_source(path, 1000) == text


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "empty", "^$"),
        (b" \r\n\t\n", "empty", "^$"),
        (b"x = 1\0", "nul_bytes", "at byte 5"),
        ("# coding: latin-1\ns = 'é'\n".encode("latin-1"), "not_utf8", "invalid continuation"),
        ("x = 1".encode("utf-16"), "nul_bytes", "at byte 3"),
        (b"x" * 1001, "too_large", "1001 bytes, at most 1000"),
    ],
)
def test_files_that_are_no_text_are_refused_with_a_reason(tmp_path, content, reason, detail):
    path = tmp_path / "a.py"
    path.write_bytes(content)

    with pytest.raises(Unusable, match=detail) as caught:
        read_source(path, 1000)

    assert caught.value.reason == reason


def test_a_file_that_is_too_large_is_not_read_at_all(tmp_path, monkeypatch):
    path = tmp_path / "big.py"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read"))

    with pytest.raises(Unusable, match="50000000 bytes") as caught:
        read_source(path, 1_000_000)

    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    ("source", "reason", "detail"),
    [
        ("def f(:\n", "does_not_parse", "line 1: invalid syntax"),
        ("print 'python 2'\n", "does_not_parse", "line 1: Missing parentheses"),
        ("x = 1\n  y = 2\n", "does_not_parse", "line 2: unexpected indent"),
        ("(" * 300 + ")" * 300, "does_not_parse", "too many nested parentheses"),
        ("+".join(["a"] * 20_000), "too_deep", "recursion"),
        ("-" * 100_000 + "1", "too_deep", "stack"),
    ],
)
def test_source_that_python_cannot_parse_is_refused_with_a_reason(source, reason, detail):
    with pytest.raises(BadSyntax, match=detail) as caught:
        parse_python(source)

    assert caught.value.reason == reason


@pytest.mark.filterwarnings("error")
def test_an_invalid_escape_parses_even_where_warnings_are_errors():
    assert ast.dump(parse_python(r"x = '\d'")) == ast.dump(ast.parse(r"x = '\\d'"))


def test_how_deep_source_may_nest_does_not_depend_on_the_caller():
    def verdict(depth, source):
        if depth:
            return verdict(depth - 1, source)
        try:
            parse_python(source)
        except BadSyntax as error:
            return error.reason
        return "parses"

    # Between these the limit of a shallow and of a deep caller would lie.
    sources = ["+".join(["a"] * count) for count in range(500, 4000, 250)]

    assert [verdict(0, s) for s in sources] == [verdict(300, s) for s in sources]
    assert {verdict(0, s) for s in sources} == {"parses", "too_deep"}
