"""A GitHub of a few files, spoken to by its API and its raw server, as a site to replay."""

import ast
import hashlib
from urllib.parse import unquote

from tests.assets.replay_server import Reply


def blob_sha(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class GitHubSite:
    """Answers for one repository; `before` holds replies that go first, by path without query."""

    def __init__(self, files, name="demo/code", page_url="https://github.com"):
        self.name = name
        self.page = f"{page_url}/{name}"
        self.files = dict(files)
        self.modes = {}
        self.truncated_from = 10**9
        self.license = "BSD-3-Clause"
        self.before = {}
        self.asked = []
        self.headers = []
        self.extra_headers = {}

    @property
    def sha(self):
        return hashlib.sha1(("commit" + self.tree("")).encode()).hexdigest()

    def tree(self, prefix):
        inside = sorted((n, blob_sha(d)) for n, d in self.files.items() if n.startswith(prefix))
        return hashlib.sha1(repr(inside).encode()).hexdigest()

    def paths(self):
        """Return what was asked since the last call, without queries."""
        asked, self.asked = self.asked, []
        return [path.partition("?")[0] for path in asked]

    def __call__(self, path, headers):
        if path == "/robots.txt":
            return Reply(b"", 404)
        self.asked.append(path)
        self.headers.append(headers)
        route, _, query = path.partition("?")
        waiting = self.before.get(route)
        if waiting:
            return waiting.pop(0)
        if route.startswith("/repos/"):
            return self._api(route, query, headers)
        prefix = f"/{self.name}/{self.sha}/"
        name = unquote(route.removeprefix(prefix))
        data = self.files.get(name) if route.startswith(prefix) else None
        return Reply(b"404: Not Found", 404) if data is None else Reply(data)

    def _api(self, route, query, headers):
        value = self._value(route, "recursive=1" in query)
        if value is None:
            return Reply.json({"message": "Not Found"}, 404)
        reply = Reply.json(value)
        etag = f'W/"{hashlib.sha1(reply.body).hexdigest()}"'
        if headers.get("if-none-match") == etag:
            return Reply(b"", 304, {"ETag": etag})
        reply.headers.update({"ETag": etag, **self.extra_headers})
        return reply

    def _value(self, route, recursive):
        home = f"/repos/{self.name}"
        if route == home:
            return {
                "full_name": self.name,
                "html_url": self.page,
                "default_branch": "main",
                "license": {"spdx_id": self.license},
                "owner": {"login": "ada"},
            }
        if route in (f"{home}/commits/main", f"{home}/commits/v1/x", f"{home}/commits/{self.sha}"):
            commit = {"committer": {"date": "2024-05-06T07:08:09Z"}, "tree": {"sha": self.tree("")}}
            return {"sha": self.sha, "commit": commit}
        for folder in {"", *self._folders()}:
            if route == f"{home}/git/trees/{self.tree(folder)}":
                return self._listing(folder, recursive)
        return None

    def _folders(self):
        return {n[: i + 1] for n in self.files for i, c in enumerate(n) if c == "/"}

    def _listing(self, folder, recursive):
        entries = []
        for name, data in sorted(self.files.items()):
            rest = name.removeprefix(folder)
            if name.startswith(folder) and (recursive or "/" not in rest):
                mode = self.modes.get(name, "100644")
                entry = {"path": rest, "mode": mode, "type": "blob", "sha": blob_sha(data)}
                entries.append({**entry, "size": len(data)})
        if not recursive:
            for inner in sorted(self._folders()):
                rest = inner.removeprefix(folder).rstrip("/")
                if inner.startswith(folder) and rest and "/" not in rest:
                    sha = self.tree(inner)
                    entries.append({"path": rest, "mode": "040000", "type": "tree", "sha": sha})
        truncated = recursive and len(entries) > self.truncated_from
        kept = entries[: self.truncated_from] if truncated else entries
        return {"sha": self.tree(folder), "tree": kept, "truncated": truncated}


def read_recorded(path):
    """Return the exchanges of a recorded file as (path, Reply)."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for start in range(0, len(lines) - 9, 11):
        headers = dict(ast.literal_eval(lines[start + 8]))
        # What the recorder changed no longer describes the body.
        gone = ("content-length", "transfer-encoding", "content-encoding", "connection")
        headers = {k: v for k, v in headers.items() if k.lower() not in gone}
        body = lines[start + 9].encode()
        found.append((lines[start + 4], Reply(body, int(lines[start + 7]), headers)))
    return found


def without_token(folder, *secrets):
    """Say whether no file below a folder holds a secret."""
    held = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    return not any(s.encode() in data for data in held for s in secrets)


def request_for(site, url="https://api.github.com", **keys):
    """Return the spider's request for a site."""
    return {
        "repository": site.name, "ref": None, "api_url": url, "raw_url": url, "suffixes": [".py"],
        "names": r"license(?:\.txt)?|\.gitattributes", "max_file_bytes": 1000, "trusted": [url],
        "delay": 0, **keys,
    }  # fmt: skip


def tree_of(folder):
    """Return {path: bytes} below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
