"""Crawls through real Scrapy, in processes of their own, against a server on this machine."""

import ipaddress
import logging
import os
import signal
import ssl
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipelines.errors import SourceError
from pipelines.fingerprint import ROOT
from pipelines.spiders.launch import run_spider
from tests.assets.replay_server import ReplayServer, Reply, Script, until

BODY = b"x" * 1000
INSTANT = "tests.assets.instant_crawl"


@pytest.fixture
def site():
    return Script({"/ok": Reply(b"fine")})


@pytest.fixture
def server(site):
    with ReplayServer(site) as server:
        yield server


def visit(server, folder, *paths, **request):
    """Return what came of each path: [status, bytes, seconds waited] or an error."""
    pages = [path if "://" in path else server.url + path for path in paths]
    asked = {"pages": pages, "trusted": [server.url], "delay": 0, "timeout": 0.4} | request
    return run_spider("pages", asked, folder, program=INSTANT)["pages"]


def test_faults_of_a_server_are_waited_out_and_no_truncated_body_is_accepted(
    server, site, tmp_path
):
    site.pages |= {
        "/gzip": Reply(BODY, gzip=True),
        "/429": [Reply(status=429, headers={"Retry-After": "7"}), Reply(BODY)],
        "/502": [Reply.html(502), Reply.html(503), Reply(BODY)],
        "/cut": [Reply(BODY, fault="truncated"), Reply(BODY)],
        "/slow": [Reply(BODY, fault="slow"), Reply(BODY)],
        "/reset": [Reply(fault="reset"), Reply(BODY)],
        "/unsized": Reply(BODY, fault="unsized"),
        "/cut-gzip": Reply(b"\x1f\x8b\x08" + BODY[:20], headers={"Content-Encoding": "gzip"}),
        "/odd": Reply(BODY, headers={"Content-Encoding": "br"}),
        "/big": Reply(BODY * 40),
        "/bomb": Reply(BODY * 40, gzip=True),
        "/304": Reply(status=304),
    }
    wanted = "gzip 429 502 cut slow reset unsized cut-gzip odd big bomb 304 404 ok".split()

    came = visit(server, tmp_path, *(f"/{name}" for name in wanted), max_bytes=20_000)

    kept = "; what has arrived is kept, run the same command again later"
    found = dict(zip(wanted, came, strict=True))
    cut = found.pop("cut-gzip")
    assert cut.startswith("the compressed body is cut off or damaged")
    assert found == {
        "gzip": [200, 1000, 0],
        "429": [200, 1000, 7],
        "502": [200, 1000, 6],
        "cut": [200, 1000, 2],
        "slow": [200, 1000, 2],
        "reset": [200, 1000, 0],  # on a kept connection Twisted itself asks again
        "unsized": "the body has no length, so nobody can tell whether it is whole (3 attempts)"
        + kept,
        "odd": "the body is encoded as 'br', asked for was gzip (3 attempts)" + kept,
        "big": "the body is larger than allowed",
        "bomb": "the body has more than 20000 bytes",
        "304": [304, 0, 0],
        "404": [404, 12, 0],
        "ok": [200, 4, 0],
    }
    assert not (tmp_path / "7.bin").exists()


def test_no_redirect_leads_off_the_public_web(server, site, tmp_path):
    port = server.port
    targets = {
        "/loop": ("/loop", "redirected in a circle or too often"),
        "/file": ("file:///etc/passwd", "leads to an address that is neither http nor https"),
        "/ftp": ("ftp://host/x", "leads to an address that is neither http nor https"),
        "/data": ("data:,x", "leads to an address that is neither http nor https"),
        "/meta": ("http://169.254.169.254/x", "leads to 169.254.169.254, a private address"),
        "/lan": ("http://10.1.2.3/x", "leads to 10.1.2.3, a private address"),
        "/six": ("http://[::1]:9/x", "leads to ::1, a private address"),
        "/mapped": (
            "http://[::ffff:192.168.1.1]/",
            "leads to ::ffff:192.168.1.1, a private address",
        ),
        "/port": ("http://127.0.0.1:9/x", "leads to 127.0.0.1, a private address"),
        "/name": (
            f"http://localhost:{port}/ok",
            "localhost resolves to 127.0.0.1, a private address",
        ),
        "/number": (
            f"http://2130706433:{port}/ok",
            "2130706433 resolves to 127.0.0.1, a private address",
        ),
        "/user": (
            f"http://u:p@127.0.0.1:{port}/ok",
            "leads to an address with a user name in it",
        ),
    }
    site.pages |= {path: Reply.redirect(target) for path, (target, _) in targets.items()}
    site.pages["/there"] = Reply.redirect("/ok", status=301)

    came = visit(server, tmp_path, *targets, "/there")

    assert came == [*(text for _, text in targets.values()), [200, 4, 0]]
    assert (site.asked.count("/ok"), server.most_at_once) == (1, 1)


def test_the_first_address_is_checked_like_any_other_unless_the_user_named_it(server, tmp_path):
    pages = ["/ok", f"http://localhost:{server.port}/ok", "file:///etc/passwd"]

    came = visit(server, tmp_path, *pages, trusted=[], attempts=1)

    assert came == [
        "leads to 127.0.0.1, a private address",
        "localhost resolves to 127.0.0.1, a private address",
        "leads to file:, only http and https are followed",
    ]


def test_robots_txt_is_obeyed_and_waited_for_where_it_cannot_be_read(server, site, tmp_path):
    site.pages["/robots.txt"] = [
        Reply.html(503),
        Reply(b"User-agent: *\nDisallow: /\n\nUser-agent: starloom\nDisallow: /no\n"),
    ]

    came = visit(server, tmp_path, "/ok", "/no/page")

    assert came == [[200, 4, 2], "forbidden by the site's robots.txt"]
    assert site.asked == ["/ok"]


def test_a_missing_robots_txt_forbids_nothing_whatever_its_page_says(server, site, tmp_path):
    site.pages["/robots.txt"] = Reply(b"User-agent: *\nDisallow: /\n", 404)

    assert visit(server, tmp_path, "/ok") == [[200, 4, 0]]


def test_requests_say_who_asks_and_carry_no_cookies_or_referers(server, site, tmp_path):
    site.pages["/ok"].headers["Set-Cookie"] = "a=b"

    visit(server, tmp_path, "/ok", "/ok", contact="https://example.org/bot", headers={"X-Own": "1"})

    port = server.port
    for headers in site.headers:
        headers.pop("connection", None)
        assert headers == {
            "user-agent": "starloom/0.1.0 (+https://example.org/bot)",
            "accept": "*/*",
            "accept-encoding": "gzip",
            "x-own": "1",
            "host": f"127.0.0.1:{port}",
        }


def test_credentials_do_not_follow_a_redirect_to_another_host(server, site, tmp_path):
    other_site = Script({"/ok": Reply(b"fine")})
    with ReplayServer(other_site) as other:
        site.pages["/away"] = Reply.redirect(f"{other.url}/ok")

        visit(
            server, tmp_path, "/ok", "/away",
            trusted=[server.url, other.url], headers={"Authorization": "token abc"},
        )  # fmt: skip

    assert [headers.get("authorization") for headers in site.headers] == ["token abc"] * 2
    assert [headers.get("authorization") for headers in other_site.headers] == [None]
    assert all("referer" not in headers for headers in site.headers + other_site.headers)


def write_certificate(folder):
    """Write a certificate for 127.0.0.1 that signs itself, with its key; return the path."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2120, 1, 1, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / "server.pem"
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificates_are_verified_and_https_never_falls_back_to_http(
    server, site, tmp_path, monkeypatch
):
    certificate = write_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    site.pages["/down"] = Reply.redirect(f"{server.url}/ok")
    with ReplayServer(site, tls=tls) as secure:
        [unknown] = visit(secure, tmp_path, "/ok", attempts=1, trusted=[secure.url, server.url])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        known = visit(secure, tmp_path, "/ok", "/down", trusted=[secure.url, server.url])

    assert "certificate verify failed" in unknown
    assert known == [[200, 4, 0], "is redirected from https to plain http on 127.0.0.1"]
    assert site.asked == ["/ok", "/down"]


def test_a_spider_gets_an_allowed_environment_and_its_secret_stays_out_of_errors(
    server, tmp_path, monkeypatch
):
    monkeypatch.setenv("STARLOOM_TEST_SECRET", "s3cr3t")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    asked = {"pages": [], "trusted": [server.url]}

    done = run_spider("pages", asked, tmp_path, program=INSTANT, secrets=("STARLOOM_TEST_SECRET",))
    with pytest.raises(SourceError) as caught:
        run_spider(
            "pages", asked | {"crash": True}, tmp_path,
            program=INSTANT, secrets=("STARLOOM_TEST_SECRET",),
        )  # fmt: skip

    assert "STARLOOM_TEST_SECRET" in done["environment"]
    assert "AWS_SECRET_ACCESS_KEY" not in done["environment"]
    assert "RuntimeError: a bug, told ***" in str(caught.value)
    assert str(caught.value).startswith("spider 'pages' crashed: ")


def test_progress_is_logged_while_the_spider_runs(server, site, tmp_path, caplog):
    site.pages["/502"] = [Reply.html(502), Reply(b"x")]

    with caplog.at_level(logging.INFO):
        visit(server, tmp_path, "/502")

    assert f"fetch      {server.url}/502: HTTP status 502, asking again in 2 s" in caplog.messages


PARENT = """
    import pathlib, sys
    from pipelines.spiders.launch import run_spider
    request = {{"pages": ["{url}/slow"], "trusted": ["{url}"], "timeout": 60}}
    run_spider("pages", request, pathlib.Path("{folder}"), program="tests.assets.instant_crawl")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_spider_ends_with_its_parent_however_that_ends(server, site, tmp_path, number):
    site.pages["/slow"] = Reply(BODY, fault="slow")
    code = textwrap.dedent(PARENT.format(url=server.url, folder=tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: "/slow" in site.asked)
    [spider] = psutil.Process(parent.pid).children()

    os.kill(parent.pid, number)
    parent.wait()

    assert until(lambda: not spider.is_running() or spider.status() == psutil.STATUS_ZOMBIE)


def test_an_interrupted_parent_stops_the_spider_and_waits_for_it(server, site, tmp_path):
    site.pages["/slow"] = Reply(BODY, fault="slow")

    def interrupt():
        until(lambda: "/slow" in site.asked)
        os.kill(os.getpid(), signal.SIGINT)

    before = set(psutil.Process().children())
    # A test process that another started may have been told to ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            visit(server, tmp_path, "/slow", timeout=60)
    finally:
        signal.signal(signal.SIGINT, handler)

    assert set(psutil.Process().children()) <= before
