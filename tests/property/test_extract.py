"""Whatever a file holds, extraction keeps the code's meaning or gives a known reason."""

import ast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.records import clean_text
from pipelines.sources.code_files import Unusable, read_source
from pipelines.sources.extract import Form, Unit, extract_units
from pipelines.syntax import BadSyntax, parse_python

REASONS = {
    "empty", "nul_bytes", "not_utf8", "too_large", "does_not_parse", "too_deep",
}  # fmt: skip

DOCSTRINGS = st.sampled_from(
    ['"""Doc."""', "'''Doc\n  more\n\n    deep\n'''", '"Doc."', 'r"""\\d"""', '("a"  "b")',
     '"""Größe \U0001f600"""', '"one" \\\n "two"', '"""Doc."""  # note', '"""Doc."""; x = 0']
)  # fmt: skip
STATEMENTS = st.sampled_from(
    ["return 1", "x = 'é'", 'y = """a\n  b\n"""', "z = (1,\n2,\n      3)", "# comment\npass",
     "w = 'a\\\nb'", "f = f'''{1}\n  {2}'''", "for i in x:\n    pass", "v = 1 + \\\n  2",
     "x = [\n# far left\n1]"]
)  # fmt: skip


def indented(text, depth):
    """Indent the lines of a statement that begin outside of string literals."""
    return "    " * depth + text.replace("\n", "\n" + "    " * depth)


@st.composite
def functions(draw, depth=0):
    """A documented function, nested in classes or other functions, decorated or not."""
    body = [draw(DOCSTRINGS), *draw(st.lists(STATEMENTS, min_size=1, max_size=3))]
    head = draw(
        st.sampled_from(["def f(a, b=1):", "async def f(*, é):", "def f() -> (\n  int\n):"])
    )
    decorator = draw(st.sampled_from(["", "@a\n", "@a.b(\n    1)\n"]))
    lines = [f"{decorator}{head}", *(indented(part, 1) for part in body)]
    text = "\n".join(lines)
    if depth < 3 and draw(st.booleans()):
        inner = draw(functions(depth=depth + 1))
        text += "\n" + indented(inner, 1)
    if draw(st.booleans()):
        documented = draw(st.sampled_from(["", '    """A class."""\n', '    "A class."; x = 1\n']))
        text = f"class C:\n{documented}" + indented(text, 1)
    return text


@settings(max_examples=200, deadline=None)
@given(functions(), st.sampled_from(["seed", "clean"]))
def test_a_completion_parses_to_the_definition_without_its_docstring(text, completion):
    tree = parse_python(text)
    expected = []
    for node in ast.walk(tree):
        documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node):
            bare = type(node)(**{name: getattr(node, name) for name in node._fields})
            bare.body = node.body[1:]
            expected.append((ast.get_docstring(node), ast.dump(bare)))
    form = Form(frozenset({"function", "method", "class"}), completion)

    units = list(extract_units(text, tree, form))

    found = [(unit.prompt, ast.dump(ast.parse(unit.completion).body[0])) for unit in units]
    assert sorted(found) == sorted(expected)
    assert len({unit.name for unit in units}) == len(units)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode(errors="replace")))
@example(b"\xef\xbb\xbf")
@example(b"def f():\r  '\\ud800'\r  return 1")
@example("def f(): '\u2028'; return '\x0c'".encode())
def test_any_bytes_yield_clean_text_or_a_known_reason(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "a.py"
    path.write_bytes(data)

    reason, texts = None, []
    try:
        text = read_source(path, 150)
        units = list(extract_units(text, parse_python(text)))
        texts = [text, *(u.prompt + u.completion for u in units if isinstance(u, Unit))]
    except (Unusable, BadSyntax) as error:
        reason = error.reason

    assert reason in REASONS or texts
    assert all(clean_text(value) is not None for value in texts)
    assert "\r" not in "".join(texts[:1])
