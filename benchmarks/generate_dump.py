"""Writes a Posts.xml of any size as Stack Exchange writes it: layout, escapes, byte order mark.

    python -m benchmarks.generate_dump PATH --mb 1000

Two posts in five are questions. Bodies are paragraphs, code, lists, links, formulas and some CJK
text, escaped twice where the site does; about 1 byte in 30 is an escape and a row has 1.5 kB, as in
dumps of technical sites. The same seed and size give the same bytes.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

HEAD = '\ufeff<?xml version="1.0" encoding="utf-8"?>\r\n<posts>\r\n'
WORDS = """the a of to in is and for with when value function data model returns error list matrix
regression variance estimate sample distribution parameter test prior likelihood random forest
gradient descent layer kernel feature dataset column predict fit train loss accuracy normal mean
naïve café Łukasz σ² θ 回归 データ 분산 because however therefore instead whether between
""".split()
CODE = """for i in range(len(x)): | if a < b and c > d: | return fit(x, y, weights=None) |
print("loss: %f" % loss) | df[df["n"] >= 10].groupby("k").mean() | model <- lm(y ~ x, data = df) |
std::vector<double> v(n, 0.0); | assert x.shape == (n, p), f"{x.shape}" | y = x @ w
""".split("|")
TAGS = "r python regression bayesian machine-learning c++ time-series hypothesis-testing".split()
PARTS, ROWS_AT_A_TIME = 4000, 1000


def escape(text: str) -> str:
    """Return text as a dump writes it into an attribute."""
    for char, reference in (("&", "amp"), ("<", "lt"), (">", "gt"), ('"', "quot"), ("\n", "#xA")):
        text = text.replace(char, f"&{reference};")
    return text


def make_part(rng: random.Random) -> str:
    """Return one block of a body as HTML."""

    def prose(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    kind = rng.random()
    if kind < 0.66:
        return f"<p>{prose(12, 60).capitalize()}.</p>\n"
    if kind < 0.76:
        address = f"https://example.com/questions/{rng.randint(1, 10**6)}"
        return (
            f'<p>{prose(5, 25)} <a href="{address}" rel="nofollow noreferrer">{prose(1, 4)}</a>, '
            f"where <em>{prose(1, 3)}</em> is <code>x &lt; {rng.randint(1, 99)}</code>.</p>\n"
        )
    if kind < 0.82:
        return f"<p>So $\\hat\\beta_{rng.randint(0, 9)} = (X'X)^{{-1}}X'y$ {prose(10, 40)}.</p>\n"
    if kind < 0.94:
        lines = [
            "    " * rng.randint(0, 2) + rng.choice(CODE).strip() for _ in range(rng.randint(3, 20))
        ]
        code = "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"<pre><code>{code}\n</code></pre>\n"
    items = "".join(f"<li>{prose(4, 14)}</li>\n" for _ in range(rng.randint(2, 5)))
    return f"<ul>\n{items}</ul>\n"


def make_rows(rng: random.Random, parts: list[str]) -> Iterator[str]:
    """Yield rows without end: a question, then its answers."""
    id_ = 0
    while True:
        id_ += 1
        question, answers = id_, rng.choice((0, 1, 1, 1, 2, 2, 3))
        accepted = f' AcceptedAnswerId="{id_ + 1}"' if answers and rng.random() < 0.5 else ""
        date = _date(rng)
        title = escape(" ".join(rng.choices(WORDS, k=rng.randint(4, 12))))
        tags = escape("".join(f"<{tag}>" for tag in rng.sample(TAGS, rng.randint(1, 4))))
        edited = f' LastEditorUserId="9" LastEditDate="{date}"' if rng.random() < 0.4 else ""
        yield (
            f'  <row Id="{id_}" PostTypeId="1"{accepted} CreationDate="{date}" '
            f'Score="{rng.randint(-2, 40)}" ViewCount="{rng.randint(10, 99_999)}" '
            f'Body="{_body(rng, parts)}" {_owner(rng)}{edited} LastActivityDate="{date}" '
            f'Title="{title}" Tags="{tags}" AnswerCount="{answers}" CommentCount="1" '
            'FavoriteCount="2" ContentLicense="CC BY-SA 4.0" />\r\n'
        )
        for _ in range(answers):
            id_ += 1
            date = _date(rng)
            yield (
                f'  <row Id="{id_}" PostTypeId="2" ParentId="{question}" CreationDate="{date}" '
                f'Score="{rng.randint(-2, 60)}" Body="{_body(rng, parts)}" {_owner(rng)} '
                f'LastActivityDate="{date}" CommentCount="0" ContentLicense="CC BY-SA 4.0" />\r\n'
            )


def _body(rng: random.Random, parts: list[str]) -> str:
    return "".join(rng.choices(parts, k=rng.choice((1, 2, 3, 3, 4, 5, 8))))


def _owner(rng: random.Random) -> str:
    if rng.random() < 0.02:
        return f'OwnerDisplayName="user{rng.randint(1, 10**6)}"'
    return f'OwnerUserId="{rng.randint(1, 200_000)}"'


def _date(rng: random.Random) -> str:
    return (
        f"20{rng.randint(9, 24):02}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}T"
        f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}."
        f"{rng.randint(0, 999):03}"
    )


def write_dump(path: Path, megabytes: float, seed: int = 1) -> None:
    """Write a dump of about this size (10^6 bytes each)."""
    rng = random.Random(seed)  # noqa: S311
    parts = [escape(make_part(rng)) for _ in range(PARTS)]
    rows = make_rows(rng, parts)
    left = megabytes * 1e6
    with path.open("wb") as file:
        file.write(HEAD.encode())
        while left > 0:
            block = "".join(next(rows) for _ in range(ROWS_AT_A_TIME)).encode()
            left -= file.write(block)
        file.write(b"</posts>")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Posts.xml of any size.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--mb", type=float, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    write_dump(options.path, options.mb, options.seed)


if __name__ == "__main__":
    main()
