"""A commit's files arrive whole and verified, however the server misbehaves; no token is left."""

import base64
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipelines.errors import SourceError
from pipelines.plan import get_stage, stage_spec
from pipelines.settings.sources import RepositorySource
from pipelines.sources import github
from pipelines.sources.fetch import fetch_source, raw_folder
from pipelines.sources.repository import locate
from pipelines.spiders.conversation import Answer
from pipelines.spiders.github import choose_files, converse
from pipelines.spiders.github_api import limit_wait
from pipelines.spiders.github_folder import git_hash, is_whole, read_commit
from pipelines.spiders.launch import run_spider
from tests.assets.curation import curation_recipe, rows_of, run_stages
from tests.assets.github_site import (
    GitHubSite,
    blob_sha,
    read_recorded,
    request_for,
    tree_of,
    without_token,
)
from tests.assets.replay_server import ReplayServer, Reply, TestClock, play, until

FILES = {
    "LICENSE": b"Permission is hereby granted, free of charge, to any",
    "README.md": b"# demo\n",
    "a.py": b'def a():\n    """A."""\n    return 1\n',
    "pack age/b.py": b"b = 2\n",
    "pack age/deep/c.py": "c = 'ß'\n".encode(),
    "empty.py": b"",
    "huge.py": b"#" * 1001,
}
WANTED = {name: data for name, data in FILES.items() if name not in ("README.md", "huge.py")}
SPENT = {"X-RateLimit-Remaining": "0"}
TOKEN = "ghp_secretsecretsecret"


@pytest.fixture
def site():
    return GitHubSite(FILES)


@pytest.fixture
def clock():
    return TestClock()


def bring(site, folder, clock, **keys):
    folder.mkdir(exist_ok=True)
    return play(converse(request_for(site, **keys), folder, clock.now), site, clock)


def test_the_wanted_files_of_the_default_branch_s_commit_arrive(site, clock, tmp_path):
    done = bring(site, tmp_path, clock)

    assert done == {
        "changed": True, "sha": site.sha, "name": "demo/code", "files": 5, "downloaded": 5,
        "kept": 0, "deleted": 0, "requests": 7,
    }  # fmt: skip
    assert tree_of(tmp_path / site.sha) == WANTED
    assert site.paths() == [
        "/repos/demo/code",
        "/repos/demo/code/commits/main",
        f"/repos/demo/code/git/trees/{site.tree('')}",
        *(f"/demo/code/{site.sha}/{n}" for n in ("LICENSE", "a.py")),
        *(f"/demo/code/{site.sha}/pack%20age/{n}" for n in ("b.py", "deep/c.py")),
    ]
    state = read_commit(tmp_path)
    assert {name: state[name] for name in ("sha", "created", "license", "page", "left_out")} == {
        "sha": site.sha,
        "created": "2024-05-06T07:08:09Z",
        "license": "BSD-3-Clause",
        "page": "https://github.com/demo/code",
        "left_out": {"too_large": 1},
    }
    assert is_whole(tmp_path, state)


def test_a_second_fetch_of_the_same_commit_asks_twice_conditionally_and_changes_nothing(
    site, clock, tmp_path
):
    bring(site, tmp_path, clock)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    site.paths()
    site.headers.clear()

    done = bring(site, tmp_path, clock)

    assert (done["changed"], done["downloaded"], done["kept"], done["requests"]) == (False, 0, 5, 2)
    assert site.paths() == ["/repos/demo/code", "/repos/demo/code/commits/main"]
    assert all("if-none-match" in headers for headers in site.headers)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_new_commit_fetches_only_what_changed_and_deleted_files_vanish(site, clock, tmp_path):
    bring(site, tmp_path, clock)
    first = site.sha
    del site.files["a.py"]
    site.files["moved.py"] = site.files.pop("pack age/b.py")
    site.files["pack age/deep/c.py"] = b"c = 3\n"
    site.paths()

    done = bring(site, tmp_path, clock)

    assert site.paths()[2:] == [
        f"/repos/demo/code/git/trees/{site.tree('')}",
        f"/demo/code/{site.sha}/pack%20age/deep/c.py",
    ]
    assert (done["changed"], done["downloaded"], done["kept"], done["deleted"]) == (True, 1, 3, 2)
    kept = {"LICENSE": FILES["LICENSE"], "empty.py": b""}
    new = {**kept, "moved.py": FILES["pack age/b.py"], "pack age/deep/c.py": b"c = 3\n"}
    assert tree_of(tmp_path / site.sha) == new
    assert (tmp_path / first).is_dir()
    site.files["a.py"] = b"a = 4\n"
    bring(site, tmp_path, clock)
    assert not (tmp_path / first).exists()


def test_a_truncated_tree_is_walked_folder_by_folder(clock, tmp_path):
    files = {
        f"p{i}/q{j}/f{k}.py": b"%d" % (i + j + k)
        for i in range(3)
        for j in range(2)
        for k in range(2)
    }
    site = GitHubSite({**files, "top.py": b"1"})
    site.truncated_from = 3

    bring(site, tmp_path, clock)

    assert tree_of(tmp_path / site.sha) == {**files, "top.py": b"1"}
    assert read_commit(tmp_path)["files"] == {n: blob_sha(d) for n, d in sorted(site.files.items())}


def test_a_folder_that_is_too_large_by_itself_is_an_error(clock, tmp_path):
    site = GitHubSite({f"f{number}.py": b"1" for number in range(5)})
    listing = {"tree": [], "truncated": True}
    site.before = {f"/repos/demo/code/git/trees/{site.tree('')}": [Reply.json(listing)] * 2}

    with pytest.raises(SourceError, match="is too large to be listed"):
        bring(site, tmp_path, clock)


def test_bytes_with_another_hash_are_asked_for_again_and_never_accepted(site, clock, tmp_path):
    page = f"/demo/code/{site.sha}/a.py"
    site.before = {page: [Reply(FILES["a.py"][:-3]), Reply(b"other")]}
    bring(site, tmp_path / "mends", clock)
    assert tree_of(tmp_path / "mends" / site.sha) == WANTED

    site.before = {page: [Reply(b"evil")] * 9}
    with pytest.raises(SourceError) as caught:
        bring(site, tmp_path / "stays", clock)

    assert str(caught.value) == (
        f"{page}: the bytes that came have git hash {git_hash(b'evil')}, the commit has "
        f"{git_hash(FILES['a.py'])} (4 attempts); what has arrived is kept, run the same command "
        "again later"
    )
    assert tree_of(tmp_path / "stays") == {f"{site.sha}/LICENSE": FILES["LICENSE"]}


def test_a_broken_fetch_goes_on_where_it_stopped(site, clock, tmp_path):
    site.before = {f"/demo/code/{site.sha}/pack%20age/b.py": [Reply(b"", 404)]}
    with pytest.raises(SourceError, match="HTTP status 404"):
        bring(site, tmp_path, clock)
    (tmp_path / ".part-123").write_bytes(b"half")
    (tmp_path / site.sha / "LICENSE").write_bytes(b"damaged")
    site.paths()

    done = bring(site, tmp_path, clock)

    assert [path.rpartition("/")[2] for path in site.paths()[3:]] == ["LICENSE", "b.py", "c.py"]
    assert (done["downloaded"], done["kept"]) == (3, 2)
    assert tree_of(tmp_path / site.sha) == WANTED
    assert not list(tmp_path.glob(".part-*"))


def test_a_file_that_was_damaged_here_is_mended_by_the_next_fetch(site, clock, tmp_path):
    bring(site, tmp_path, clock)
    (tmp_path / site.sha / "a.py").write_bytes(b"x")

    done = bring(site, tmp_path, clock)

    assert (done["changed"], done["downloaded"]) == (True, 1)
    assert tree_of(tmp_path / site.sha) == WANTED


@pytest.mark.parametrize(
    ("reply", "waits"),
    [
        (Reply(b"", 429, {"Retry-After": "7"}), [7]),
        (Reply(b"", 403, {"Retry-After": "30"}), [30]),
        (Reply.json({"message": "You have exceeded a secondary rate limit"}, 403), [60]),
        (Reply(b"", 429), [60]),
        (Reply(b"", 403, {**SPENT, "X-RateLimit-Reset": "1700000500"}), [500.9]),
        (Reply(b"", 403, {**SPENT, "X-RateLimit-Reset": "1600000000"}), [1]),
        (Reply.html(502), [2]),
        (Reply(b"", 503, {"Retry-After": "11"}), [11]),
        (Reply(b'{"full_na', fault="truncated"), [2]),
        (Reply(fault="reset"), [2]),
        (Reply(fault="slow"), [2]),
        (Reply.html(200), [2]),
    ],
)  # fmt: skip
def test_limits_and_faults_are_waited_out_as_long_as_the_server_says(
    site, clock, tmp_path, reply, waits
):
    site.before = {"/repos/demo/code": [reply]}

    bring(site, tmp_path, clock)

    assert clock.waits == pytest.approx(waits)
    assert tree_of(tmp_path / site.sha) == WANTED


def test_an_exhausted_limit_is_waited_for_before_the_next_request_and_not_for_raw_files(
    site, clock, tmp_path
):
    site.extra_headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1700000100"}

    bring(site, tmp_path, clock)

    assert clock.waits == pytest.approx([100.9])


def test_a_limit_that_lasts_too_long_says_when_to_come_back(site, clock, tmp_path):
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1700003000"}
    site.before = {"/repos/demo/code": [Reply(b"", 403, headers)]}

    with pytest.raises(SourceError) as caught:
        bring(site, tmp_path, clock)

    assert str(caught.value) == (
        "https://api.github.com/repos/demo/code: GitHub's limit of requests is used up for 50 more "
        "minutes; what has arrived is kept, run the same command again then, or set GITHUB_TOKEN "
        "in the environment (5,000 requests an hour instead of 60)"
    )


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([Reply.json({"message": "Bad credentials"}, 401)], r"\(Bad credentials\): the token in"),
        ([Reply(b"no", 403)], "HTTP status 403: access is denied"),
        ([Reply.json({"message": "Not Found"}, 404)], "not there, or private: check 'demo/code'"),
        ([Reply.json({"message": ["x"]}, 451)], "taken down for legal reasons"),
        ([Reply(b"?", 418)], "an answer nobody expected"),
        ([Reply.html(502)] * 9, r"HTTP status 502 \(6 attempts\)"),
        ([Reply.html(200)] * 9, r"the answer is no JSON \(4 attempts\)"),
        ([Reply(b"[" * 9000)] * 9, r"the answer is no JSON \(4 attempts\)"),
        ([Reply(b"", 429)] * 9, r"refused for too many requests \(4 attempts\)"),
        ([Reply.json({"full_name": "../../etc"})], "'../../etc' is no repository"),
        ([Reply.json([1])], "no git hash|HTTP status 404"),
    ],
)
def test_what_cannot_be_mended_is_one_clear_error(site, clock, tmp_path, replies, message):
    site.before = {"/repos/demo/code": replies}

    with pytest.raises(SourceError, match=message):
        bring(site, tmp_path, clock, ref="nowhere")

    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"path": "../evil.py"}, r"holds a path like '\.\./evil.py'"),
        ({"path": "/etc/evil.py"}, "holds a path like"),
        ({"path": "x/.git/evil.py"}, "holds a path like"),
        ({"path": "x\0.py"}, "holds a path like"),
        ({"path": None}, "lacks path, mode, type or sha"),
    ],
)
def test_a_tree_that_leads_out_of_the_folder_is_refused(site, clock, tmp_path, tree, message):
    entry = {"path": "a.py", "mode": "100644", "type": "blob", "sha": "0" * 40, "size": 1, **tree}
    listing = Reply.json({"tree": [entry], "truncated": False})
    site.before = {f"/repos/demo/code/git/trees/{site.tree('')}": [listing]}

    with pytest.raises(SourceError, match=message):
        bring(site, tmp_path, clock)

    assert tree_of(tmp_path) == {}


def test_links_modules_and_names_no_disk_can_hold_are_left_out_and_counted(site):
    def entry(path, mode="100644", kind="blob", size=5):
        return {"path": path, "mode": mode, "type": kind, "sha": "0" * 40, "size": size}

    entries = [
        entry("a.py"), entry("b.py", "100755"), entry("l.py", "120000"), entry("o.py", "100600"),
        entry("m.py", "160000", "commit"), entry("d.py", "040000", "tree"), entry("LICENSE"),
        entry("x" * 250 + ".py"), entry("\udc80.py"), entry("big.py", size=1001), entry("n.txt"),
        entry("LICENSE.txt", size=9999),
    ]  # fmt: skip

    files, left_out = choose_files(entries, request_for(site))

    assert sorted(files) == ["LICENSE", "a.py", "b.py"]
    assert left_out == {"bad_file_name": 2, "link": 1, "special": 1, "too_large": 1}


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.github.com", f"Bearer {TOKEN}"),
        ("http://127.0.0.1:1", f"Bearer {TOKEN}"),
        ("http://api.github.com", None),
        ("https://ghe.example.org/api/v3", "Bearer other"),
        ("http://ghe.example.org", None),
        ("https://api.github.com.example.org", "Bearer other"),
    ],
)
def test_a_token_goes_to_its_own_host_over_tls_and_into_no_file(
    site, clock, tmp_path, monkeypatch, caplog, url, sent
):
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    monkeypatch.setenv("GITHUB_ENTERPRISE_TOKEN", "other")
    caplog.set_level("DEBUG")
    site.before = {"/repos/demo/code": [Reply.html(502)]}

    class Below:
        def __call__(self, path, headers):
            return site(path.removeprefix("/api/v3"), headers)

    play(converse(request_for(site, url), tmp_path, clock.now), Below(), clock)

    assert {headers.get("authorization") for headers in site.headers} == {sent}
    assert without_token(tmp_path, TOKEN, "Bearer")
    assert TOKEN not in caplog.text


def remote(server, **keys):
    return RepositorySource(
        type="repository", id="demo", repository="demo/code", api_url=server.url,
        raw_url=server.url, max_file_bytes=1000, **keys,
    )  # fmt: skip


def test_a_fetched_repository_is_read_with_its_provenance(site, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    caplog.set_level("INFO")
    with ReplayServer(site) as server:
        source = remote(server, revision="v1/x")
        fetched = fetch_source(source)
        again = fetch_source(source, refresh=True)

    counts = {"files": 5, "downloaded": 5, "kept": 0, "deleted": 0, "requests": 7}
    assert (fetched.changed, fetched.counts) == (True, counts)
    assert fetched.summary == (
        f"demo/code at v1/x is {site.sha[:12]}: 5 files, 5 of them new or changed, 0 gone"
    )
    assert (again.changed, again.counts["requests"]) == (False, 2)
    assert again.summary == f"nothing changed: demo/code at v1/x still is {site.sha[:12]}"
    store, refs = run_stages(
        tmp_path / "store", curation_recipe(source.model_dump()), until="collect"
    )
    rows, manifest = rows_of(store, refs["collect"]), store.manifest(refs["collect"])
    assert [row["id"] for row in rows] == [
        "demo:a.py", "demo:a.py::a", "demo:pack age/b.py", "demo:pack age/deep/c.py",
    ]  # fmt: skip
    assert {
        name: rows[1][name] for name in ("revision", "url", "author", "license", "created")
    } == {
        "revision": site.sha,
        "url": f"https://github.com/demo/code/blob/{site.sha}/a.py#L1-L3",
        "author": "ada",
        "license": "MIT",
        "created": "2024-05-06T07:08:09Z",
    }
    assert manifest.counts.dropped == {"too_large": 1}
    assert manifest.counts.quarantined == {"empty": 1}
    assert TOKEN not in caplog.text
    assert without_token(tmp_path, TOKEN)


def test_a_pinned_commit_that_is_here_is_not_asked_for_again(site):
    with ReplayServer(site) as server:
        source = remote(server, revision=site.sha)
        fetch_source(source)
        site.paths()
        again = fetch_source(source, refresh=True)

    assert site.paths() == []
    assert (again.changed, again.counts) == (False, {"files": 5, "requests": 0})
    assert again.summary == (
        f"nothing changed: commit {site.sha[:12]} is here, and a commit never does"
    )


def test_a_renamed_repository_is_followed_and_a_token_is_not_sent_to_other_hosts(
    site, tmp_path, monkeypatch
):
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    elsewhere = GitHubSite(FILES)
    with ReplayServer(site) as server, ReplayServer(elsewhere) as other:
        old = "/repos/old/name"
        site.before = {
            old: [Reply.redirect(f"{server.url}/repos/demo/code", 301)],
            f"/demo/code/{site.sha}/a.py": [
                Reply.redirect(f"{other.url}/demo/code/{site.sha}/a.py")
            ],
        }
        request = {**request_for(site, server.url), "repository": "old/name"}
        request["trusted"] = [server.url, other.url]
        done = run_spider("github", request, tmp_path / "raw", secrets=("GITHUB_TOKEN",))

    assert (done["name"], done["downloaded"]) == ("demo/code", 5)
    assert tree_of(tmp_path / "raw" / site.sha) == WANTED
    assert site.asked[:2] == ["/repos/old/name", "/repos/demo/code"]
    assert {h.get("authorization") for h in site.headers} == {f"Bearer {TOKEN}"}
    assert elsewhere.asked == [f"/demo/code/{site.sha}/a.py"]
    assert "authorization" not in elsewhere.headers[0]


def test_a_body_cut_off_on_the_wire_is_asked_for_again(site, tmp_path):
    page = f"/demo/code/{site.sha}/a.py"
    with ReplayServer(site) as server:
        site.before = {
            page: [Reply(FILES["a.py"], fault="truncated"), Reply(FILES["a.py"], gzip=True)]
        }
        program = "tests.assets.instant_crawl"
        run_spider("github", request_for(site, server.url), tmp_path, program=program)

    assert site.paths().count(page) == 2
    assert tree_of(tmp_path / site.sha) == WANTED


def test_a_fetch_that_is_killed_goes_on_and_asks_for_nothing_twice(site, tmp_path):
    class Slow:
        def __call__(self, path, headers):
            if path.endswith("/c.py"):
                time.sleep(1.5)
            return site(path, headers)

    code = (
        "import sys, json; from pipelines.spiders.launch import run_spider; "
        "from pathlib import Path; "
        "run_spider('github', json.loads(sys.argv[1]), Path(sys.argv[2]))"
    )
    with ReplayServer(Slow()) as server:
        request = request_for(site, server.url)
        command = [sys.executable, "-c", code, json.dumps(request), str(tmp_path)]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            until((tmp_path / site.sha / "pack age/b.py").exists)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert read_commit(tmp_path) == {}
        time.sleep(1.6)
        site.paths()
        done = run_spider("github", request, tmp_path)

    assert done["downloaded"] < 3
    assert not {f"/demo/code/{site.sha}/{n}" for n in ("LICENSE", "a.py")} & set(site.paths())
    assert tree_of(tmp_path / site.sha) == WANTED


def test_settings_that_only_select_do_not_fetch_again_and_others_do(site):
    with ReplayServer(site) as server:
        source = remote(server)
        folder = raw_folder(source)

        assert raw_folder(remote(server, exclude=("**/deep/**",), kinds=("file",))) == folder
        assert raw_folder(remote(server, revision="v1/x")) != folder
        assert raw_folder(remote(server, extensions=(".go",))) != folder


def test_what_was_not_fetched_or_is_not_finished_is_an_error_that_says_what_to_do(site):
    source = RepositorySource(type="repository", id="demo", repository="demo/code")
    with pytest.raises(SourceError, match="source 'demo' has not been fetched yet"):
        locate(source)
    folder = raw_folder(source)
    folder.mkdir(parents=True)
    (folder / "fetched.json").write_text("{}")

    with pytest.raises(SourceError, match="holds no finished commit; remove that folder"):
        locate(source)


def test_the_key_follows_the_commit(site):
    with ReplayServer(site) as server:
        source = remote(server)
        fetch_source(source)
        recipe = curation_recipe(source.model_dump())
        before = stage_spec(get_stage("collect"), recipe, {}).key
        fetch_source(source, refresh=True)
        assert stage_spec(get_stage("collect"), recipe, {}).key == before
        site.files["README.md"] += b"more\n"
        assert fetch_source(source, refresh=True).changed

    assert stage_spec(get_stage("collect"), recipe, {}).key != before


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("scikit-learn/scikit-learn", "scikit-learn/scikit-learn"),
        ("https://github.com/a/b.c.git", "a/b.c"),
        ("http://ghe.example.org:8080/a/b/", "a/b"),
        ("a", None), ("a/b/c", None), ("git@github.com:a/b", None), ("", None),
    ],
)  # fmt: skip
def test_addresses_of_repositories_are_understood(repository, name):
    found = github.ADDRESS.fullmatch(repository)

    assert (found and found["name"]) == name


def test_recorded_limits_and_trees_and_contents_are_read_as_github_sends_them(real_data):
    recorded = real_data / "github_api_replay_pygithub"
    _, refused = read_recorded(recorded / "SpecificExceptions.testRateLimitExceeded.txt")[1]
    answer = Answer(
        refused.status, {k.lower(): v for k, v in refused.headers.items()}, refused.body
    )
    assert limit_wait(answer, 1e9, 0) == 60.0

    [(path, tree)] = read_recorded(recorded / "Repository.testGetGitTreeWithRecursive.txt")
    assert path.endswith("/git/trees/f492784d8ca837779650d1fb406a1a3587a764ad?recursive=1")
    listed = json.loads(tree.body)["tree"]
    request = request_for(GitHubSite({}), max_file_bytes=10_000)
    files, left_out = choose_files(listed, request)
    blobs = [e for e in listed if e["type"] == "blob" and e["path"].endswith(".py")]
    small = {e["path"]: e["sha"] for e in blobs if e["size"] <= 10_000}
    assert (files, left_out) == (small, {"too_large": len(blobs) - len(small)})
    assert len(blobs) == 50

    for _, reply in read_recorded(recorded / "Repository.testGetContents.txt"):
        content = json.loads(reply.body)
        assert git_hash(base64.b64decode(content["content"])) == content["sha"]


def test_a_recorded_repository_answers_after_three_bad_gateways(real_data, clock, tmp_path):
    recorded = real_data / "github_api_replay_pygithub"
    replies = [r for _, r in read_recorded(recorded / "Retry.testReturnsRepoAfter3Retries.txt")]
    assert [reply.status for reply in replies] == [502, 502, 502, 200]
    [(_, tree)] = read_recorded(recorded / "Repository.testGetGitTreeWithRecursive.txt")
    site = GitHubSite({}, name="PyGithub/PyGithub")
    home = "/repos/PyGithub/PyGithub"
    commit = {"sha": "1" * 40, "commit": {"tree": {"sha": json.loads(tree.body)["sha"]}}}
    site.before = {
        home: replies,
        f"{home}/commits/master": [Reply.json(commit)],
        f"{home}/git/trees/{json.loads(tree.body)['sha']}": [tree],
    }

    done = bring(site, tmp_path, clock, suffixes=[".cpp"], names="nothing")

    # An exhausted or dated limit in the recordings is long over.
    assert clock.waits == [2.0, 4.0, 8.0]
    assert (done["name"], done["files"], done["requests"]) == ("PyGithub/PyGithub", 0, 3)
    assert read_commit(tmp_path)["license"] == "LGPL-3.0"


def test_a_recorded_redirect_is_followed(real_data, tmp_path):
    recorded = real_data / "github_api_replay_pygithub"
    name = "Issue174.testGetDirContentsWithHttpRedirect.txt"
    [(asked, moved), (target, _)] = read_recorded(recorded / name)
    site = GitHubSite(FILES)
    with ReplayServer(site) as server:
        moved.headers["Location"] = moved.headers["Location"].replace(
            "https://api.github.com", server.url
        )
        site.before = {
            "/repos/demo/code": [moved],
            target: [Reply.json(site._value("/repos/demo/code", recursive=False))],
        }
        run_spider("github", request_for(site, server.url), tmp_path)

    assert asked.startswith("/repos/twbs/bootstrap/")
    assert site.paths()[:2] == ["/repos/demo/code", target]
    assert tree_of(tmp_path / site.sha) == WANTED
