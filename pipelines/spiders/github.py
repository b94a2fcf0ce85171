"""Spider `github`: the wanted files of one commit of a repository, each verified by its git hash.

The API names the commit and lists its tree (conditional requests: an unchanged answer costs
nothing of the limit); the bytes come from the raw server, which has no such limit. A file whose
hash is known here already is linked, never asked for again; one that arrives with another hash is
refused.
"""

import logging
import re
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from pipelines.errors import SourceError
from pipelines.spiders.conversation import Answer, Ask, Conversation, Failed, Now, Pause
from pipelines.spiders.github_api import OTHER_TOKEN, TOKEN, Server
from pipelines.spiders.github_folder import git_hash, link_known, publish, read_commit, write_file

logger = logging.getLogger(__name__)

SECRETS = (TOKEN, OTHER_TOKEN)
REGULAR, LINK = ("100644", "100755", "100664"), "120000"
MAX_LISTINGS = 20_000

Listing = Generator[Ask | Pause, Answer | Failed | None, list[dict[str, Any]]]


def converse(request: dict[str, Any], folder: Path, now: Now) -> Conversation:
    """Bring the folder to the commit that `ref` names now.

    `request` has repository (OWNER/NAME), ref (or None), api_url, raw_url, suffixes, names (a
    pattern of further file names) and max_file_bytes. Returns {"changed", "sha", "files",
    "downloaded", "kept", "deleted", "requests"}. Raises SourceError; what has arrived is kept.
    """
    before = read_commit(folder)
    server = Server(request, now, dict(before.get("etags", {})))
    commit = yield from _resolve(server)
    files, left_out = before.get("files", {}), before.get("left_out", {})
    if commit["tree"] != before.get("tree"):
        listed = yield from _list_tree(server, commit)
        files, left_out = choose_files(listed, request)
    target = folder / commit["sha"]
    missing = link_known(folder, target, files, before)
    for number, name in enumerate(missing):
        if number % 100 == 0:
            logger.info("%s: file %d of %d", commit["name"], number + 1, len(missing))
        path = f"/{commit['name']}/{commit['sha']}/{name}"
        sha = files[name]
        data = b"" if sha == git_hash(b"") else (yield from server.get_raw(path, sha))
        write_file(folder, target / name, data)
    changed = before.get("sha") != commit["sha"] or bool(missing)
    state = {**commit, "files": files, "left_out": left_out, "etags": server.etags}
    if {**before, "previous": None} != {**state, "previous": None}:
        previous = before.get("sha" if before.get("sha") != commit["sha"] else "previous")
        publish(folder, target, {**state, "previous": previous})
    gone = before.get("files", {}).keys() - files.keys()
    return {
        "changed": changed,
        "sha": commit["sha"],
        "name": commit["name"],
        "files": len(files),
        "downloaded": len(missing),
        "kept": len(files) - len(missing),
        "deleted": len(gone),
        "requests": server.asked,
    }


def _resolve(server: Server) -> Generator[Any, Any, dict[str, Any]]:
    """Return the commit that is asked for: sha, tree, created, and what is said of its home."""
    about = {
        "name": "full_name", "page": "html_url", "branch": "default_branch",
        "license": "license.spdx_id", "author": "owner.login",
    }  # fmt: skip
    home = yield from server.get_json(f"/repos/{server.request['repository']}", about)
    name = home["name"] or server.request["repository"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SourceError(f"/repos/{server.request['repository']}: {name!r} is no repository")
    ref = server.request["ref"] or home["branch"] or "HEAD"
    wanted = {"sha": "sha", "tree": "commit.tree.sha", "created": "commit.committer.date"}
    path = f"/repos/{name}/commits/{quote(ref)}"
    # One file's changes of the commit are listed at least, a hundred by default.
    commit = yield from server.get_json(f"{path}?per_page=1", wanted)
    for key in ("sha", "tree"):
        if not re.fullmatch(r"[0-9a-f]{40}", commit[key] or ""):
            raise SourceError(f"{path}: {commit[key]!r} is no git hash")
    return {**home, "name": name, "ref": ref, **commit}


def _list_tree(server: Server, commit: dict[str, Any]) -> Listing:
    """Return every entry below a commit's tree; folders of a truncated list are asked in turn."""
    entries: list[dict[str, Any]] = []
    todo = [("", commit["tree"], True)]
    for count in range(MAX_LISTINGS):
        if not todo:
            return entries
        prefix, sha, recursive = todo.pop()
        path = f"/repos/{commit['name']}/git/trees/{sha}"
        data = yield from server.get_json(f"{path}?recursive=1" if recursive else path)
        found = list(_read_entries(data, path))
        if data.get("truncated") and recursive:
            todo.append((prefix, sha, False))
            continue
        if data.get("truncated"):
            raise SourceError(f"{path}: the folder {prefix!r} is too large to be listed")
        if count and count % 50 == 0:
            logger.info("%s: %d folders listed, %d to go", commit["name"], count, len(todo))
        for entry in found:
            inside = {**entry, "path": prefix + entry["path"]}
            if entry["type"] == "tree" and not recursive:
                todo.append((f"{inside['path']}/", entry["sha"], True))
            entries.append(inside)
    raise SourceError(f"{commit['name']}: more than {MAX_LISTINGS} folders to be listed")


def _read_entries(data: Any, path: str) -> Iterator[dict[str, Any]]:
    listed = data.get("tree") if isinstance(data, dict) else None
    if not isinstance(listed, list):
        raise SourceError(f"{path}: the answer lists no tree")
    for entry in listed:
        texts = [entry.get(key) for key in ("path", "mode", "type", "sha")]
        if not all(isinstance(text, str) for text in texts):
            raise SourceError(f"{path}: an entry of the tree lacks path, mode, type or sha")
        size = entry.get("size")
        keys = ("path", "mode", "type", "sha")
        yield dict(zip(keys, texts, strict=True)) | {"size": size if isinstance(size, int) else 0}


def choose_files(
    entries: list[dict[str, Any]], request: dict[str, Any]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return {path: git hash} of the files to fetch, and counts of those left out by reason.

    Raises SourceError for a path that would lead out of the folder.
    """
    files: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    suffixes, others = tuple(request["suffixes"]), re.compile(request["names"], re.IGNORECASE)
    for entry in entries:
        name = entry["path"]
        parts = name.split("/")
        if not set(parts).isdisjoint({"", ".", "..", ".git"}) or "\0" in name:
            raise SourceError(f"{request['repository']}: the tree holds a path like {name!r}")
        if entry["type"] != "blob":
            continue
        code = name.endswith(suffixes)
        if not code and not others.fullmatch(PurePosixPath(name).name):
            continue
        reason = _find_reason(entry, parts, request["max_file_bytes"])
        if reason is None:
            files[name] = entry["sha"]
        elif code:
            left_out[reason] += 1
    return dict(sorted(files.items())), dict(sorted(left_out.items()))


def _find_reason(entry: dict[str, Any], parts: list[str], max_bytes: int) -> str | None:
    if entry["mode"] == LINK:
        return "link"
    if entry["mode"] not in REGULAR:
        return "special"
    try:
        encoded = [part.encode() for part in parts]
    except UnicodeEncodeError:
        return "bad_file_name"
    if max(map(len, encoded)) > 200 or sum(map(len, encoded)) > 3000:
        return "bad_file_name"
    return "too_large" if entry["size"] > max_bytes else None
