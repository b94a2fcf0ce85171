"""The small parts of the spiders: addresses, settings, gzip, Retry-After, patience."""

import gzip
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.spiders.conversation import Answer, Ask, Failed, Pause, ask_patiently, retry_after
from pipelines.spiders.crawl import gunzip
from pipelines.spiders.guards import TRUSTED, is_public, origin_of
from pipelines.spiders.launch import hide_secrets
from pipelines.spiders.settings import scrapy_settings, user_agent


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 "
    "255.255.255.255 192.0.2.1 :: ::1 fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 "
    "::ffff:169.254.169.254 2002:7f00:1:: 64:ff9b::a00:1 64:ff9b::7f00:1".split(),
)
def test_an_address_that_is_not_on_the_public_internet_is_told(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    "8.8.8.8 140.82.121.4 2606:50c0:8000::154 ::ffff:8.8.8.8 64:ff9b::808:808 172.32.0.1".split(),
)
def test_an_address_on_the_public_internet_is_told(address):
    assert is_public(address)


@given(st.integers(0, 2**32 - 1))
def test_an_address_is_judged_alike_however_it_is_embedded_in_ipv6(number):
    plain = ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))

    high, low = f"{number >> 16:x}", f"{number & 0xFFFF:x}"
    embedded = (f"::ffff:{plain}", f"64:ff9b::{high}:{low}", f"2002:{high}:{low}::")

    assert {is_public(address) for address in embedded} == {is_public(plain)}


def test_an_origin_is_host_and_port():
    assert origin_of("https://API.github.com/x?y") == ("api.github.com", 443)
    assert origin_of("http://[::1]:80/") == ("::1", 80)
    for bad in ("file:///etc/passwd", "http:///x", "ftp://host", "host/path", ""):
        with pytest.raises(ValueError, match="no http or https address"):
            origin_of(bad)


def test_every_default_of_scrapy_that_is_not_safe_or_polite_is_off():
    found = scrapy_settings({"trusted": ["http://127.0.0.1:81/2.3"], "timeout": 5, "delay": 0.25})

    assert {name: found[name] for name in found if name.endswith("_ENABLED")} == {
        "COMPRESSION_ENABLED": False,
        "RETRY_ENABLED": False,
        "METAREFRESH_ENABLED": False,
        "COOKIES_ENABLED": False,
        "HTTPCACHE_ENABLED": False,
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,
    }
    handlers = found["DOWNLOAD_HANDLERS"]
    assert [handlers[scheme] for scheme in ("file", "ftp", "s3", "data")] == [None] * 4
    assert found["REFERRER_POLICY"] == "no-referrer"
    assert (found["ROBOTSTXT_OBEY"], found["DOWNLOAD_VERIFY_CERTIFICATES"]) == (True, True)
    assert (found["CONCURRENT_REQUESTS_PER_DOMAIN"], found["DOWNLOAD_DELAY"]) == (1, 0.25)
    assert (found["DOWNLOAD_TIMEOUT"], found["DOWNLOAD_MAXSIZE"]) == (5.0, 20 * 2**20)
    assert (found[TRUSTED], found["REDIRECT_MAX_TIMES"]) == ([["127.0.0.1", 81]], 5)


def test_the_settings_name_only_settings_that_scrapy_knows():
    from scrapy.settings import default_settings

    names = set(scrapy_settings({})) - {TRUSTED}

    assert {name for name in names if not hasattr(default_settings, name)} == set()


def test_the_user_agent_says_who_we_are():
    assert user_agent().startswith("starloom/")
    assert user_agent("crawl@example.org").endswith(" (+crawl@example.org)")


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3), st.data())
def test_gzip_is_read_whole_or_not_at_all(members, data):
    packed = b"".join(gzip.compress(each, mtime=0) for each in members)
    whole = b"".join(members)

    assert gunzip(packed, 1000) == whole
    cut = data.draw(st.integers(1, len(gzip.compress(members[-1], mtime=0)) - 1))
    with pytest.raises((EOFError, zlib.error)):
        gunzip(packed[:-cut], 1000)


def test_a_gzip_bomb_is_refused_before_it_is_unpacked():
    bomb = gzip.compress(b"\0" * 50_000_000)

    with pytest.raises(OverflowError):
        gunzip(bomb, 1_000_000)


def test_retry_after_is_seconds_or_a_date_and_nonsense_is_nothing():
    now = datetime(2024, 5, 1, 12, tzinfo=UTC).timestamp()

    assert retry_after("120", now) == 120
    assert retry_after("Wed, 01 May 2024 12:01:00 GMT", now) == 60
    assert retry_after("Wed, 01 May 2024 11:00:00 GMT", now) == 0
    assert [retry_after(each, now) for each in (None, "", "-5", "soon", "1e9", "٣")] == [0] * 6


def drive(answers):
    """Return what a patient request came to, and the waits."""
    waits, left, conversation = [], iter(answers), ask_patiently(Ask("http://h/x?k=1"), lambda: 0.0)
    step = next(conversation)
    try:
        while True:
            if isinstance(step, Pause):
                waits.append(step.seconds)
                step = next(conversation)
            else:
                step = conversation.send(next(left))
    except StopIteration as end:
        return end.value.status, waits
    except SourceError as error:
        return str(error), waits


def answer(status, **headers):
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


def test_waits_double_and_a_longer_retry_after_counts():
    answers = [answer(500), answer(429, retry_after="30"), Failed("timeout"), answer(200)]

    assert drive(answers) == (200, [2.0, 30.0, 8.0])


def test_what_will_not_change_is_not_asked_again():
    assert drive([answer(404)]) == (404, [])
    assert drive([Failed("robots", "forbidden")]) == ("http://h/x: forbidden", [])


def test_nobody_waits_a_day():
    error, waits = drive([answer(429, retry_after="86400")])

    assert waits == []
    assert error == (
        "http://h/x: HTTP status 429, and the server wants 86400 seconds of quiet; what has "
        "arrived is kept, run the same command again after that"
    )


def test_secrets_are_hidden_in_every_form_they_take_in_an_address(monkeypatch):
    monkeypatch.setenv("A_KEY", "a*b((c d")

    hide = hide_secrets(("A_KEY", "UNSET"))

    assert hide("x a*b((c d y") == "x *** y"
    assert hide("k=a%2Ab%28%28c+d&k=a%2Ab%28%28c%20d") == "k=***&k=***"
