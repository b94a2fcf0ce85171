"""Tells a secret from what only looks like one: placeholders, documented samples, words, hashes."""

import re
from functools import lru_cache

# Values that mean "put yours here": in one case, which letters of a random key hardly are.
_STANDINS = (
    "your example placeholder change insert dummy sample redacted todo fake foobar qwerty".split()
)
PLACEHOLDER = re.compile(
    "|".join(case(word) for word in _STANDINS for case in (str.lower, str.upper, str.title))
    # Variables that a program fills in, what is struck out, sequences and repeats.
    + r"|[<>{}]|\$\w|\$\(|%\(|%[sdr]\b|\benv(?:iron)?\b|process\.|secrets\."
    r"|\*{3}|\.{3}|[xX]{4}|([^A])\1{5}|1234567|(?i:abcdef)"
)
WORDS = frozenset(
    "admin default demo empty false foo guest hidden invalid login none null optional pass"
    " passphrase passwd password postgres prompt pw pwd required root secret string test text token"
    " true undefined unknown user username value x-oauth-basic".split()
)
# Samples that vendors print in their documentation: AWS, Stripe, the Azure storage emulator.
DOCUMENTED = frozenset(
    {
        "AKIAIOSFODNN7EXAMPLE",
        "AKIAI44QH8DHBEXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "sk_test_4eC39HqLyjWDarjtT1zdp7dc",
        "sk_test_BQokikJOvBiI2HlWgH4olfQ2",
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    }
)
UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
HEX = re.compile(r"(?:0x)?[0-9a-fA-F]+")
PAIR = re.compile(r"(?=([a-z]{2}))")
# The commonest pairs of letters in English words and identifiers.
COMMON_PAIRS = frozenset(
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve"
    " co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ke ey ec ct cr et ok ta us lo tr pr"
    " ac ss so el na ut ap pe pa ce am di mo il po".split()
)
# Between a letter and a digit: names have few of these places.
SWITCH = re.compile(r"(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")
COMMON_SHARE = 0.4
FILE_NAME = re.compile(
    r"[\w./\\-]+\.(?:cfg|conf|crt|csv|db|env|gif|go|gz|html?|ini|java|jpe?g|js|json|key|log|md|pem|php"
    r"|png|py|rb|rs|sh|sql|svg|tar|toml|ts|txt|xml|ya?ml|zip)",
    re.IGNORECASE,
)
NAMED = re.compile(r"pass|pwd|secret|token|key|user|api|id$", re.IGNORECASE)
IDENTIFIER = re.compile(r"[A-Za-z_.-]*[0-9]?")


@lru_cache(4096)
def is_placeholder(value: str) -> bool:
    """Say whether a value stands for a secret, or is a sample that everybody knows.

    >>> is_placeholder("YOUR_API_KEY"), is_placeholder("${TOKEN}"), is_placeholder("h7Fq0s1")
    (True, True, False)
    """
    return (
        value in DOCUMENTED
        or value.strip("=:;,.!?-_").lower() in WORDS
        or bool(PLACEHOLDER.search(value))
        or len(set(value)) < min(5, (len(value) + 1) // 2)
    )


@lru_cache(4096)
def is_random(value: str) -> bool:
    """Say whether a value of 16 characters or more is one that a generator made.

    Its letters are no words: fewer than 40 % of neighbouring letters are common in English. A UUID
    names something and is no secret.

    >>> is_random("f3a9c1d07b5e4426a8d1"), is_random("tokenizer_config_v2_base")
    (True, False)
    """
    if len(value) < 16 or is_placeholder(value) or UUID.fullmatch(value):
        return False
    letters = sum(map(str.isalpha, value))
    digits = sum(map(str.isdigit, value))
    if HEX.fullmatch(value):
        return letters > 1 and digits > 1
    if not digits and (value.islower() or value.isupper()):
        return False
    if len(SWITCH.findall(value)) >= max(6, len(value) // 5):
        return True
    pairs = PAIR.findall(value.lower())
    return sum(pair in COMMON_PAIRS for pair in pairs) < COMMON_SHARE * max(len(pairs), 1)


@lru_cache(4096)
def is_password(value: str) -> bool:
    """Say whether what follows `password =` is one, not a label, a name, a path or a variable.

    A value of letters alone is not told from a label ("Passwort") and does not count.

    >>> is_password("hunter2"), is_password("P@ssw0rd!"), is_password("new_password2")
    (True, True, False)
    """
    if len(value) < 6 or is_placeholder(value) or "://" in value:
        return False
    if not any(map(str.isalpha, value)) or not value.isascii():
        return False
    rest = [c for c in value if not c.isalpha() and c not in "_-./: "]
    if not rest or FILE_NAME.fullmatch(value):
        return False
    return not is_label(value)


def is_label(value: str) -> bool:
    """Say whether a value only names what belongs there: `ApiToken`, `my-secret`, `password2`."""
    return bool(IDENTIFIER.fullmatch(value) and NAMED.search(value))
