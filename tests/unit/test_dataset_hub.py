"""Downloads are pinned, checked and put in place whole; without a network the cache will do."""

import hashlib
import http.server
import threading

import pytest

from pipelines.errors import SourceError
from pipelines.settings.sources import DatasetSource
from pipelines.sources import get_source
from pipelines.sources.dataset import hub
from pipelines.sources.fetch import fetch_source, raw_folder
from tests.assets.curation import write_files
from tests.assets.datasets import body, collect, lines, pairs

SHA = "0123456789abcdef0123456789abcdef01234567"
TEXT = lines(*pairs("a", "b")).encode()
PAIRS = [("What is a?", "It is a."), ("What is b?", "It is b.")]


@pytest.fixture
def server(monkeypatch):
    """A server of raw files that answers what `answers` says, in order, and notes the requests."""
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, content, length = answers.pop(0)
            self.send_response(status)
            self.send_header("content-length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "RAW_HOST", f"http://127.0.0.1:{listening.server_port}")
        yield answers, asked
        listening.shutdown()


def get(folder, sha256=None):
    hashes = {"data/a.jsonl": sha256} if sha256 else {}
    return hub.fetch_github(
        "o/n", SHA, ("data/a.jsonl",), hashes, folder, sleep=lambda seconds: None
    )


def test_a_file_of_a_repository_is_fetched_once_and_read(tmp_path, monkeypatch, server):
    answers, asked = server
    answers.append((200, TEXT, len(TEXT)))
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path / "data"))
    settings = {
        "type": "dataset", "id": "d", "repository": "o/n", "revision": SHA,
        "files": ["data/a.jsonl"], "license": "MIT",
    }  # fmt: skip
    source = DatasetSource(**settings)

    fetched = fetch_source(source)
    again = fetch_source(source, refresh=True)
    records, _ = collect(tmp_path, settings)

    assert asked == [f"/o/n/{SHA}/data/a.jsonl"]
    assert (fetched.changed, fetched.counts["bytes"]) == (True, len(TEXT))
    assert (again.changed, again.summary[:37]) == (False, "o/n@0123456789ab is a pinned revision")
    assert [body(record) for record in records] == PAIRS
    assert {r["url"] for r in records} == {f"https://github.com/o/n/blob/{SHA}/data/a.jsonl"}
    assert {r["revision"] for r in records} == {SHA}


def test_a_source_that_was_not_fetched_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path))
    source = DatasetSource(type="dataset", id="d", dataset="o/n", revision=SHA)

    with pytest.raises(SourceError, match="'d' has not been fetched yet"):
        get_source(source).locate(source)


@pytest.mark.parametrize(
    ("given", "sha256", "said"),
    [
        ([(200, TEXT[:9], len(TEXT))] * hub.ATTEMPTS, None, "RemoteProtocolError"),
        ([(503, b"", 0)] * hub.ATTEMPTS, None, "HTTP 503"),
        ([(404, b"", 0)], None, "HTTP 404"),
        ([(302, b"", 0)], None, "HTTP 302"),
        ([(200, b"<html>", 6)], "0" * 64, "expected 0000"),
    ],
)
def test_a_download_that_is_cut_off_or_other_is_not_kept(tmp_path, server, given, sha256, said):
    answers, _ = server
    answers.extend(given)

    with pytest.raises(SourceError, match=said):
        get(tmp_path, sha256)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert answers == []


def test_a_server_that_recovers_is_asked_again(tmp_path, server):
    answers, asked = server
    answers.extend([(500, b"", 0), (200, TEXT[:5], len(TEXT)), (200, TEXT, len(TEXT))])

    fetched = get(tmp_path, hashlib.sha256(TEXT).hexdigest())

    assert (fetched.changed, len(asked)) == (True, 3)
    assert (tmp_path / "files/data/a.jsonl").read_bytes() == TEXT


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with a dataset in it, and no network."""
    import huggingface_hub.constants

    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path / "data"))
    repo = root / "datasets--o--n"
    card = b"---\nlicense: cc-by-sa-4.0\n---\n"
    files = {
        "data/train.jsonl": (hashlib.sha256(TEXT).hexdigest(), TEXT),
        "README.md": (git_blob(card), card),
        "run.py": (git_blob(b"x"), b"x"),
    }
    for name, (blob, content) in files.items():
        write_files(repo, {f"blobs/{blob}": content})
        link = repo / "snapshots" / SHA / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../" * (2 + name.count("/")) + f"blobs/{blob}")
    return repo


SETTINGS = {"type": "dataset", "id": "d", "dataset": "o/n", "revision": SHA}


def test_a_dataset_is_read_from_the_cache_without_a_network(tmp_path, cache):
    source = DatasetSource(**SETTINGS)

    fetched = fetch_source(source)
    records, _ = collect(tmp_path, SETTINGS)

    kept = raw_folder(source) / "files"
    assert fetched.summary == "1 files, 0.0 MB from o/n@0123456789ab"
    assert sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*.*")) == [
        "README.md",
        "data/train.jsonl",
    ]
    assert [body(record) for record in records] == PAIRS
    assert {record["license"] for record in records} == {"CC-BY-SA-4.0"}
    page = f"https://huggingface.co/datasets/o/n/blob/{SHA}/data/train.jsonl"
    assert {record["url"] for record in records} == {page}


def test_a_cut_off_blob_in_the_cache_is_refused(cache):
    blob = cache / "blobs" / hashlib.sha256(TEXT).hexdigest()
    blob.write_bytes(TEXT[:-5])

    with pytest.raises(SourceError, match=r"data/train\.jsonl: the file in the hub's cache is dam"):
        fetch_source(DatasetSource(**SETTINGS))


def test_what_the_cache_has_not_is_said(cache):
    with pytest.raises(SourceError, match="the hub cannot be reached and its cache does not hold"):
        fetch_source(DatasetSource(**{**SETTINGS, "dataset": "o/other"}))

    with pytest.raises(SourceError, match=r"no data files .* scripts are never run"):
        fetch_source(DatasetSource(**{**SETTINGS, "files": ["*.csv"]}))
