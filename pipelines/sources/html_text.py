r"""Inline text for Markdown: entities, escapes, code spans, fences and link targets.

Escapes appear only where the text would otherwise change its meaning under CommonMark with GFM
tables and strikethrough: `snake_case`, `5 * 3`, `a < b` and `C:\dir` stay as they are. Whether a
lone `*`, `_`, `~~` or backtick pairs with another one is known only when its block is complete;
until then `RISKY` stands in front of it and `settle_escapes` decides. MathJax (`$...$`,
`$$...$$`, `\(...\)`, `\[...\]`, `\begin{x}...\end{x}`) is kept byte for byte.
"""

import html
import re
from itertools import pairwise

# Both are replaced in the input before anything else happens, so neither is ever the author's.
CHUNK = "\x00"
RISKY = "\x01"
_BLANKS = " \t\n\f"

# A single dollar counts as math by pandoc's rule (no blank inside the marks, no digit behind) or
# when the text between reads like TeX; prices and shell variables are left alone.
_PLAIN = r"(?:[^\x00\\]++|\\(?!begin\{|end\{))*+"
_BEGIN, _END = r"\\begin\{[a-zA-Z]{1,20}\*?\}", r"\\end\{[a-zA-Z]{1,20}\*?\}"
_DOLLARS = (
    r"\$(?:\$[^\x00$]++\$\$"
    r"|(?<![\\$]\$)(?=[^\s$])[^\x00$]*+(?<![\s\\])\$(?![\d$])"
    r"|(?<![\\$]\$)[^\x00$\\^_{]*+[\\^_{][^\x00$]*+\$)"
)
# Every alternative stops at the next mark of its own kind, so a failed try costs no second look.
MATH = re.compile(
    rf"({_DOLLARS}"
    rf"|\\(?:{_BEGIN[2:]}{_PLAIN}(?:{_BEGIN}{_PLAIN}{_END}{_PLAIN})*+{_END}"
    r"|\$[^\x00$\\]*+(?:\\[^\x00$][^\x00$\\]*+)*+\\\$"
    r"|\((?:[^\x00\\]++|\\[^\x00()])++\\\)"
    r"|\[(?:[^\x00\\]++|\\[^\x00\[\]])++\\\]))"
)
_MATH_IN_DOLLARS = re.compile(f"({_DOLLARS})")
_STAR = re.compile(r"\*(?:(?=\S)|(?<=\S\*))")
_UNDERSCORES = re.compile(r"_++(?:(?<![^\W_]_)|(?![^\W_]))")  # not those as in snake_case
_BACKSLASH = re.compile(r"\\(?=[!-#%-/:-@\[-`{-~\n]|[ \t\f]*+\x00)")
_ANGLE = re.compile(r"<(?=/?[A-Za-z][A-Za-z0-9-]*+(?:[\s/>:@.+\x00]|$)|[!?]|/?\x00)")
_ENTITY = re.compile(r"&(?=#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]*;)")
_BRACKET = re.compile(r"\](?=[(\x00])")
# Patterns that begin with a literal are searched by jumping from one to the next.
_BLANK_AT_LINE_END = re.compile(r"\n(?: |(?<= \n))")
_OPENING = (
    r"(?:(#{1,6}(?=[ \t\n]|\Z)|>|[-+*](?=[ \t\n]|\Z)|[=|:-][ \t=|:-]*(?=\n|\Z)|\x01?~~\x01?~"
    r"|\[(?:[^\[\]\\\n]|\\.){1,999}+\]:)|(\d{1,9})(?=[.)](?:[ \t\n]|\Z)))"
)
_LINE_START, _FIRST_LINE_START = re.compile(rf"\n{_OPENING}"), re.compile(_OPENING)
_LATER_LINE_START = re.compile(r"\n[\x01#>+*=|:~\[0-9\n-]")
# What can begin an emphasis has no blank behind it, what can end one has none before it.
_PAIRS = {
    mark: (
        re.compile(rf"{RISKY}{re.escape(mark)}(?!{RISKY}{re.escape(mark)}|\s|\Z)"),
        re.compile(rf"(?<=[^\s{mark[0]}]){RISKY}{re.escape(mark)}"),
    )
    for mark in ("*", "_", "~~")
}
_PAIRS["`"] = (re.compile("`"), re.compile("`"))  # code spans begin and end anywhere
_RISKY_MARK = re.compile(rf"{RISKY}(?![\[\]])")
_ODD_LABEL = re.compile(r"[\x00-\x1f\\*_`~<&$\[\]]")
_BRACKETS = re.compile(r"[\\\x01].|[\[\]]", re.DOTALL)
_ODD_URL = re.compile(r"[\x00-\x20<>\\\x7f]")
LINE_STARTS = frozenset("\x01#>-+*=|:~[0123456789")


def unescape(text: str) -> str:
    """Return the text with character references decoded, as html.unescape does, but faster."""
    text = (
        text.replace("&quot;", '"').replace("&gt;", ">").replace("&lt;", "<").replace("&#39;", "'")
    )
    if "&" in text:
        text = html.unescape(text)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def prepare_prose(text: str) -> tuple[list[str], bool]:
    """Decode, escape and tidy all text outside code at once; return it and whether it is risky.

    The chunks of text between tags are separated by CHUNK.
    """
    if "&" in text:
        text = unescape(text)
    if "$" in text or "\\" in text:
        pieces = (MATH if "\\" in text else _MATH_IN_DOLLARS).split(text)
        for at in range(0, len(pieces), 2):  # text, math, text, ...
            pieces[at] = _escape(_tidy_line_ends(pieces[at]))
        text = "".join(pieces)
    else:
        text = _escape(_tidy_line_ends(text))
    return text.split(CHUNK), RISKY in text


def _tidy_line_ends(text: str) -> str:
    if "\t" in text or "\f" in text:
        text = text.replace("\t", " ").replace("\f", " ")
    if not _BLANK_AT_LINE_END.search(text):
        return text
    first, *between, last = text.split("\n")
    lines = [line.strip(" ") for line in between]
    return "\n".join([first.rstrip(" "), *lines, last.lstrip(" ")])


def _escape(text: str) -> str:
    if "\\" in text:
        text = _BACKSLASH.sub(r"\\\\", text)
    if "&" in text:
        text = _ENTITY.sub(r"\\&", text)
    if "*" in text:
        text = _STAR.sub(f"{RISKY}*", text)
    if "_" in text:
        text = _UNDERSCORES.sub(_mark_underscores, text)
    if "`" in text:
        text = text.replace("`", f"{RISKY}`")
    if "~" in text:
        text = text.replace("~~", f"{RISKY}~~")
    if "<" in text:
        text = _ANGLE.sub(r"\\<", text)
    if "]" in text:
        text = _BRACKET.sub(_escape_bracket, text)
    return text


def _mark_underscores(match: re.Match[str]) -> str:
    text, (start, end) = match.string, match.span()
    if start and end < len(text) and text[start - 1].isalnum() and text[end].isalnum():
        return match[0]
    return f"{RISKY}_" * (end - start)


def _escape_bracket(match: re.Match[str]) -> str:
    follows = match.string[match.end() : match.end() + 2]
    return "\\]" if follows[0] == "(" or follows == "\x00(" else "]"


def settle_escapes(block: str) -> str:
    """Escape the risky marks of a finished block that could pair; leave the others as they are."""
    for mark, (opening, closing) in _PAIRS.items():
        risky = RISKY + mark
        count = block.count(risky)
        if count:
            ours = mark != "_" and block.count(mark) > count
            pairs = ours or (count > 1 and opening.search(block) and closing.search(block))
            block = block.replace(risky, f"\\{mark}" if pairs else mark)
    return block.replace(RISKY, "\\")  # brackets, which are not to be taken for math before


def escape_line_starts(block: str) -> str:
    """Escape what would open a heading, quote, list, rule, table or reference; not in math."""
    if not _LATER_LINE_START.search(block) and not _FIRST_LINE_START.match(block):
        return block
    if "\n\n" in block:
        block = re.sub(r"\n{2,}", "\n", block)
    if "$" in block or "\\" in block:
        return _outside_math(f"\n{block}")[1:]
    return _LINE_START.sub(_escape_start, f"\n{block}")[1:]


def _outside_math(block: str) -> str:
    spans = [match.span() for match in MATH.finditer(block)]
    # Both come in order of position, so one pass finds the lines that do not start in math.
    result, done, at = [], 0, 0
    for match in _LINE_START.finditer(block):
        while at < len(spans) and spans[at][1] <= match.start():
            at += 1
        if at < len(spans) and spans[at][0] < match.start():
            continue
        result += [block[done : match.start()], _escape_start(match)]
        done = match.end()
    return "".join([*result, block[done:]])


def _escape_start(match: re.Match[str]) -> str:
    if match[1]:
        return f"\n\\{match[1].removeprefix(RISKY)}"
    return f"\n{match[2]}\\"


def code_span(code: str) -> str:
    """Return inline code: delimiters longer than any run of backticks inside, line ends blank."""
    if "\n" in code:
        code = code.replace("\n", " ")
    if "`" not in code:
        if code[:1] != " " or code[-1:] != " " or not code.strip(" "):
            return f"`{code}`" if code else ""
        return f"` {code} `"
    marks = "`" * (longest_run(code) + 1)
    pad = " " if code[0] in " `" or code[-1] in " `" else ""
    return f"{marks}{pad}{code}{pad}{marks}"


def fenced_block(code: str, language: str) -> str:
    """Return a fenced code block; one line end of the code is the one before the closing fence."""
    marks = "```"
    if "`" in code and marks in code:
        marks = "`" * (longest_run(code) + 1)
    if code[-1:] == "\n":
        return f"{marks}{language}\n{code}{marks}"
    return f"{marks}{language}\n{code}\n{marks}"


def longest_run(code: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(len(run) for run in re.findall("`+", code))


def link_target(url: str, title: str) -> str:
    """Return what stands between the parentheses of a link or an image."""
    url = url.strip(" \t\n\f")
    if url[:5] in ("data:", "DATA:"):
        url = ""
    if _ODD_URL.search(url):
        url = _ODD_URL.sub(_percent, url)
    if ("(" in url or ")" in url) and not balanced(url, "(", ")"):
        url = f"<{url}>"
    if not title:
        return url
    quoted = " ".join(title.split()).replace("\\", "\\\\").replace('"', '\\"')
    return f'{url} "{quoted}"'


def _percent(match: re.Match[str]) -> str:
    return f"%{ord(match[0]):02X}"


def escape_label(text: str) -> str:
    """Return the alternative text of an image, decoded and escaped, on one line.

    Its brackets without a partner are still to be settled.
    """
    text = text.strip(_BLANKS)
    if not _ODD_LABEL.search(text):
        return text
    chunks, _ = prepare_prose(text.replace(CHUNK, "") + CHUNK)
    label = chunks[0].replace("\n", " ")
    if "[" in label or "]" in label:
        label = escape_brackets([label])
    return _RISKY_MARK.sub(r"\\", label) if RISKY in label else label


def balanced(text: str, opening: str, closing: str) -> bool:
    """Return whether each opening bracket has its closing one, in order, at most 30 deep."""
    depth = 0
    for mark in re.findall(f"[{re.escape(opening + closing)}]", text):
        depth += 1 if mark == opening else -1
        if not 0 <= depth <= 30:
            return False
    return depth == 0


def escape_brackets(parts: list[str]) -> str:
    """Return the joined parts of a link's text, square brackets without a partner marked risky.

    Parts with code in them stay as they are: a code span binds tighter than brackets.
    """
    open_ones: list[tuple[int, int]] = []
    lone: dict[int, list[int]] = {}
    for at, part in enumerate(parts):
        if part.count("`") > part.count(f"{RISKY}`"):
            continue
        for match in _BRACKETS.finditer(part):
            if match[0] == "[":
                open_ones.append((at, match.start()))
            elif match[0] == "]" and open_ones:
                open_ones.pop()
            elif match[0] == "]":
                lone.setdefault(at, []).append(match.start())
    for at, start in open_ones:
        lone.setdefault(at, []).append(start)
    return "".join(
        _insert_backslashes(part, sorted(lone[at])) if at in lone else part
        for at, part in enumerate(parts)
    )


def _insert_backslashes(text: str, places: list[int]) -> str:
    cuts = [0, *places, len(text)]
    return RISKY.join(text[a:b] for a, b in pairwise(cuts))
