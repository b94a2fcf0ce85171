"""Whatever HTML comes in, Markdown comes out, and no word and no code of it is lost."""

import html
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.sources.html_markdown import html_to_markdown
from tests.assets.html_pages import read_page, render

GARBAGE = st.lists(
    st.sampled_from(
        """<p> </p> <pre> </pre> <code> </code> <pre><code> <a <a\thref="x"> <a\thref='y </a> <b>
        <b </b> <i> </i> <ul> </ul> <ol\tstart="7"> <li> </li> <li\tvalue=x> <blockquote>
        </blockquote> <blockquote\tclass=spoiler> <table> </table> <tr> <td> <th> </td> </tr>
        <td\tcolspan=9\trowspan="9"> <h2> </h2> <hr> <br/> <img\tsrc=x\talt="[*"> <!-- -->
        <!--\tlanguage:\tlang-py\t--> <script> </script> <style </style> <dl> <dt> <dd> </dl>
        <details> <summary> </summary> </details> <DIV> </Div> <x-language> < > & &lt; &amp;lt;
        &#0; &#1; &#xD800; &nbsp; " ' = / $ $$ \\( \\[ \\begin{a} \\end{a} * _ ` ~~ [ ]
        ]( ! # - 1. |
        """.split()
    ).map(lambda tag: tag.replace("\t", " "))
    | st.sampled_from(["\n", " ", "\t", "\r\n", "\x00", "\x01", "\ud800", "\ufeff", "\u3000"])
    | st.text(max_size=3),
    max_size=40,
).map("".join)

LETTERS = st.text("ab1é汉字,.:;()&<>\"'|=+-#!/ \n", max_size=12)
NASTY = st.text("ab1 *_`~[]()<>&\\#+-=.!|:>\n", max_size=12)
PROSE = st.one_of(LETTERS, NASTY).map(html.escape)
CODE = st.text("ab1 *_`~[]()<>&\\#+-=.!|:$\n\t", min_size=1, max_size=20).filter(str.strip)
SPAN = CODE.map(lambda text: f"<code>{html.escape(text)}</code>")
FENCE = CODE.map(lambda text: f"<pre><code>{html.escape(text)}\n</code></pre>")
LINK = st.builds(
    lambda url, text: f'<a href="https://example.org/{html.escape(url)}">{text}</a>',
    st.text("ab()_*<> \\\"'&", max_size=6),
    PROSE,
)
IMAGE = NASTY.map(lambda text: f'<img src="x" alt="{html.escape(text)}">')


def marked(inner):
    return st.builds(
        lambda tag, text: f"<{tag}>{text}</{tag}>",
        st.sampled_from(["strong", "em", "b", "i", "span", "sub"]),
        inner,
    )


RUN = st.lists(st.one_of(PROSE, SPAN, LINK, IMAGE, marked(PROSE), marked(SPAN)), max_size=5).map(
    "".join
)
PARAGRAPH = RUN.map(lambda text: f"<p>{text}</p>\n")
HEADING = LETTERS.map(lambda text: f"<h2>{html.escape(text)}</h2>\n")


def nested(blocks):
    body = st.lists(blocks, max_size=3).map("".join)
    item = st.one_of(body, st.builds("{}{}".format, PROSE, body)).map("<li>{}</li>\n".format)
    items = st.lists(item, max_size=3).map("".join)
    return st.one_of(
        body.map("<blockquote>\n{}</blockquote>\n".format),
        items.map("<ul>\n{}</ul>\n".format),
        items.map('<ol start="3">\n{}</ol>\n'.format),
    )


TABLE = st.lists(
    st.lists(RUN, min_size=1, max_size=3).map(
        lambda row: "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    ),
    min_size=1,
    max_size=3,
).map(lambda rows: f"<table>{''.join(rows)}</table>\n")
BLOCK = st.recursive(st.one_of(PARAGRAPH, FENCE, HEADING, TABLE), nested, max_leaves=6)
# Math is kept byte for byte, so a renderer that knows no math takes its backslashes for escapes.
MATH = re.compile(r"\\[\[(]")
DOCUMENT = st.lists(BLOCK, max_size=4).map("".join).filter(lambda body: not MATH.search(body))
MARKS = re.compile(r"[*~]+")


def seen(page):
    """Words without emphasis marks: CommonMark shows those that punctuation keeps from pairing.

    Neighbouring code spans become one, so that their marks do not merge.
    """
    return MARKS.sub("", "".join(page.words)), page.blocks, "".join("".join(page.spans).split())


@given(GARBAGE)
@example("<!--" * 50)
@example('<a href="' * 50)
def test_any_input_gives_text_and_gives_it_again(body):
    markdown = html_to_markdown(body)

    assert markdown == html_to_markdown(body)
    assert "\x00" not in markdown
    assert "\x01" not in markdown


@given(DOCUMENT)
@settings(max_examples=300)
def test_no_word_and_no_code_of_a_document_is_lost_once_its_markdown_is_rendered(body):
    assert seen(read_page(render(html_to_markdown(body)))) == seen(read_page(body))
