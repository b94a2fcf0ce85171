"""Functions are cut out of files exactly as the project's seed data has them."""

import ast
from pathlib import Path

import pytest

from pipelines.sources.code_files import Unusable, read_source
from pipelines.sources.docstrings import strip_doctests
from pipelines.sources.extract import Form, Skipped, Unit, extract_units
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
        Unit("Point.x", (4, 7), "The x.", "@property\ndef x(self):\n    \n    return 1", "method"),
        Unit(
            "Point.x#2",
            (9, 16),
            "Set x.\n\n    Indented more.\nBack.",
            "@x.setter\ndef x(self, value):\n    \n    self.y = value",
            "method",
        ),
        Unit(
            "Point.load",
            (18, 23),
            "Load.",
            'async def load(self):\n    \n    def inner():\n        """Inner."""\n'
            "        yield 1\n    return inner",
            "method",
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
        (
            "# vim: set fileencoding=latin-1 :\ns = 'é'\n".encode("latin-1"),
            "# vim: set fileencoding=latin-1 :\ns = 'é'\n",
        ),
        (
            "#!/bin/x\n# -*- coding: euc-jp -*-\ns = '日本'\r\n".encode("euc-jp"),
            "#!/bin/x\n# -*- coding: euc-jp -*-\ns = '日本'\n",
        ),
        (b"a = 1\x0c\nb = '\xe2\x80\xa8'\n", "a = 1\x0c\nb = '\u2028'\n"),
    ],
)
def test_marks_and_line_ends_are_taken_out_and_a_coding_line_is_asked_after_utf8(
    tmp_path, content, text
):
    path = tmp_path / "a.py"
    path.write_bytes(content)

    assert read_source(path, 1000) == text


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "empty", "^$"),
        (b" \r\n\t\n", "empty", "^$"),
        (b"x = 1\0", "nul_bytes", "at byte 5"),
        ("s = 'é'\n".encode("latin-1"), "not_utf8", "invalid continuation byte at byte 5"),
        ("# coding: utf-7\ns = 'é'\n".encode("latin-1"), "not_utf8", "invalid continuation"),
        ("# coding: unicode_escape\n'é'".encode("latin-1"), "not_utf8", "invalid continuation"),
        ("# coding: nonsense\ns = 'é'".encode("latin-1"), "not_utf8", "invalid continuation"),
        (b"# coding: cp932\ns = '\xe9'\n", "not_utf8", "invalid continuation"),
        (b"# coding: shift_jis\ns = '\xe9'\n", "not_utf8", "nor shift_jis: "),
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


FORMS = '''\
@register("p",
          2)
class Point:
    """A point.

    >>> Point(1).x
    1

    Examples
    --------
    >>> Point(2)
    <Point 2>
    """

    def __init__(self, x):
        self.x = x

    def move(self, by):
        """Move it."""

        # By so much.
        return Point(self.x + by)

    @overload
    def scale(self, by: int) -> int: ...

    @typing.overload
    def scale(self, by: str) -> str:
        """Never run."""

    def scale(self, by):
        "Scale it." ; return by

class Empty(Point):
    """Nothing else."""
'''


def test_the_form_decides_what_is_cut_and_how():
    form = Form(frozenset({"class", "method"}), "clean", strip_doctests=True)

    units = list(extract_units(FORMS, parse_python(FORMS), form))

    assert units == [
        Unit(
            "Point",
            (1, 32),
            "A point.",
            '@register("p",\n          2)\nclass Point:\n' + "\n".join(FORMS.split("\n")[14:32]),
            "class",
        ),
        Unit(
            "Point.move",
            (18, 22),
            "Move it.",
            "def move(self, by):\n    # By so much.\n    return Point(self.x + by)",
            "method",
        ),
        Skipped("Point.scale", "overload"),
        Skipped("Point.scale#2", "overload"),
        Unit(
            "Point.scale#3", (31, 32), "Scale it.", "def scale(self, by):\n    return by", "method"
        ),
        Skipped("Empty", "nothing_but_a_docstring"),
    ]


def test_the_name_of_a_definition_does_not_depend_on_what_else_is_cut():
    text = 'class f:\n    "A."\n    x = 1\ndef f():\n    "B."\n    return 1\n'

    names = [
        [unit.name for unit in extract_units(text, parse_python(text), Form(frozenset(kinds)))]
        for kinds in (["class"], ["function"], ["class", "function"])
    ]

    assert names == [["f"], ["f#2"], ["f", "f#2"]]


def test_what_only_looks_like_a_docstring_is_none():
    text = "".join(
        f"def f{number}():\n    {first}\n    return 1\n"
        for number, first in enumerate(['b"bytes"', 'f"text {1}"', "1", "...", '"a" + "b"', "x"])
    )

    assert extract(text) == []
    assert extract('def f():\n    r"""A \\d."""\n    return 1\n')[0].prompt == r"A \d."


@pytest.mark.parametrize("form", ["seed", "clean"])
@pytest.mark.parametrize(
    "text",
    [
        'class A:\n\tdef f(self):\n\t\t"""D."""\n\t\tif x:\n\t\t\treturn 1\n',
        'class A:\n\x0c    def f(self):\n        """D."""\n\x0c        if x:\n            y = 1\n',
        '\x0c\x0cdef f(self):\n    """D."""\n    return 1\n',
        'class A:\n  def f(self):\n      """D."""\n      return (1,\n 2)\n',
        'class A:\n    def f(self):\n    \t"""D."""\n    \treturn 1\n',
        'class A:\n    @a\n    \n# left\n    async def f(self):\n        "D."\n        return 1\n',
        'if 1:\n    \\\n  def f():\n        "D."\n        if 1:\n            return 1\n',
    ],
)  # fmt: skip
def test_tabs_form_feeds_and_odd_indentation_keep_the_meaning_or_are_skipped(text, form):
    tree = parse_python(text)
    [unit] = extract_units(text, tree, Form(completion=form))

    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    node.body = node.body[1:]
    if isinstance(unit, Skipped):
        assert unit.reason == "cannot_be_cut"
    else:
        assert ast.dump(ast.parse(unit.completion).body[0]) == ast.dump(node)
        assert unit.prompt == "D."


def test_a_function_that_is_nothing_but_doctests_is_skipped_when_they_are_stripped():
    text = 'def f():\n    """\n    >>> f()\n    1\n    """\n    return 1\n'

    assert list(extract_units(text, parse_python(text), Form(strip_doctests=True))) == [
        Skipped("f", "nothing_but_doctests")
    ]
    assert extract(text)[0].prompt == ">>> f()\n1"


@pytest.mark.parametrize(
    ("docstring", "left"),
    [
        ("Add.", "Add."),
        ("Add.\n\n>>> add(1)\n1\n\nMore.", "Add.\n\nMore."),
        ("Add.\n\nExamples\n--------\n>>> add(1)\n1\n", "Add."),
        ("Add.\n\nExamples\n--------\nSo:\n\n>>> add(1)\n", "Add.\n\nExamples\n--------\nSo:"),
        ("Add.\n\nExample:\n    >>> add(1)\n    1\n\nReturns:\n    B.", "Add.\n\nReturns:\n    B."),
        ("Add.\n\n>>> for i in x:\n...     add(i)\n<BLANKLINE>\n2\n", "Add."),
        ("Examples of >>> in text stay.", "Examples of >>> in text stay."),
        ("Add.\n\n>>> a\n1\n\n>>> b\n2\n\n\n\nEnd.", "Add.\n\nEnd."),
    ],
)  # fmt: skip
def test_sessions_go_with_their_output_and_an_empty_heading(docstring, left):
    assert strip_doctests(docstring) == left


def test_source_nested_three_thousand_deep_is_refused_or_read_but_never_crashes():
    reasons = []
    for text in (
        "(" * 3000 + ")" * 3000,
        "x = " + "[" * 3000 + "]" * 3000,
        "x = " + "-" * 3000 + "1",
        "x" + ".y()" * 3000,
        "".join(" " * i + "if x:\n" for i in range(3000)) + " " * 3000 + "pass\n",
        "def f():\n    'D.'\n    return " + "+".join("a" * 3000) + "\n",
    ):
        try:
            list(extract_units(text, parse_python(text)))
            reasons.append("parses")
        except BadSyntax as error:
            reasons.append(error.reason)

    assert set(reasons) <= {"does_not_parse", "too_deep", "parses"}
    assert reasons[0] == "does_not_parse"
