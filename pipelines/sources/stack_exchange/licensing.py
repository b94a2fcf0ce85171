"""Which license a post is under: as its row says, else by the date of its text.

Contributions before 2011-04-08 (UTC) are under CC BY-SA 2.5, those before 2018-05-02 under 3.0 and
later ones under 4.0 (Meta Stack Exchange, post 347758). An edit puts the post under the license of
its own day, so the later of creation and last edit decides. A dump does not say whether an edit was
a rollback or changed only tags: those dates may name a later license than the one that holds.
"""

import re

CHANGES = (  # (from this second on, UTC; license), latest first
    ("2018-05-02T00:00:00", "CC-BY-SA-4.0"),
    ("2011-04-08T00:00:00", "CC-BY-SA-3.0"),
    ("", "CC-BY-SA-2.5"),
)
SECONDS = 19  # characters of an ISO 8601 time up to its seconds
NAMED = re.compile(r"CC[ -]BY-SA[ -](\d\.\d)")


def license_at(time: str) -> str:
    """Return the SPDX id of the license that a contribution of this time (ISO 8601, UTC) is under.

    >>> license_at("2011-04-07T23:59:59.999"), license_at("2011-04-08T00:00:00.000")
    ('CC-BY-SA-2.5', 'CC-BY-SA-3.0')
    """
    return next(name for since, name in CHANGES if time[:SECONDS] >= since)


def license_of(named: str | None, default: str | None, created: str, edited: str | None) -> str:
    """Return a post's license: its row's, else the recipe's `default`, else that of its date."""
    if named:
        return spdx_of_name(named)
    return default or license_at(max(created, edited or ""))


def spdx_of_name(name: str) -> str:
    """Return the SPDX id of a license as a row names it; one that is not CC BY-SA stays as it is.

    >>> spdx_of_name("CC BY-SA 4.0")
    'CC-BY-SA-4.0'
    """
    found = NAMED.fullmatch(name.strip())
    return f"CC-BY-SA-{found[1]}" if found else name.strip()


def combined_license(question: str, answer: str) -> str:
    """Return the license of a text made of both: CC BY-SA can be adapted under a later version."""
    if NAMED.fullmatch(question) and NAMED.fullmatch(answer):
        return max(question, answer)
    return question if question == answer else f"{question} AND {answer}"
