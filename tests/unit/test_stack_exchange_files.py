"""Dumps are found, unpacked and checked; what is not a whole dump is one clear error."""

import gzip
import struct
import zlib
from pathlib import Path

import py7zr
import pytest

from pipelines.errors import PreflightError, SourceError
from pipelines.manifest import Counts
from pipelines.recipe import Recipe
from pipelines.sources import check_sources
from pipelines.sources.stack_exchange import dump, unpacking
from pipelines.sources.stack_exchange.located import locate_dump, site_of
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files
from tests.assets.stack_exchange_dump import USERS, answer, dump_source, posts_xml, question

SITE = "https://stats.stackexchange.com"


def collect(tmp_path, *sources, name="store"):
    recipe = curation_recipe(*sources)
    store, refs = run_stages(tmp_path / name, recipe, until="collect")
    return rows_of(store, refs["collect"]), store.manifest(refs["collect"])


def pack_7z(path, files):
    with py7zr.SevenZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(content, name)
    return path


CONTENT = posts_xml(question(1, AcceptedAnswerId=2), answer(2, 1))


@pytest.mark.parametrize(
    "form", ["file", "folder", "gz", "gz folder", "7z", "7z folder", "split 7z"]
)
def test_every_packing_gives_the_same_records(tmp_path, form):
    folder = tmp_path / "stats.stackexchange.com"
    folder.mkdir()
    path = folder
    if form in ("file", "folder"):
        write_files(folder, {"Posts.xml": CONTENT, "Users.xml": USERS, "Badges.xml": b"x"})
        path = folder / "Posts.xml" if form == "file" else folder
    elif form in ("gz", "gz folder"):
        packed = {"Posts.xml.gz": gzip.compress(CONTENT), "Users.xml.gz": gzip.compress(USERS)}
        write_files(folder, packed)
        path = folder / "Posts.xml.gz" if form == "gz" else folder
    elif form == "split 7z":
        pack_7z(folder / "stats.stackexchange.com-Posts.7z", {"Posts.xml": CONTENT})
        pack_7z(folder / "stats.stackexchange.com-Users.7z", {"Users.xml": USERS})
    else:
        name = "stats.stackexchange.com.7z"
        files = {"Badges.xml": b"x" * 99, "Posts.xml": CONTENT, "Users.xml": USERS}
        pack_7z(folder / name, files)
        path = folder / name if form == "7z" else folder

    rows, manifest = collect(tmp_path, dump_source(path, site=None))

    assert [(r["id"], r["author"], r["url"]) for r in rows] == [("se:2", "Grace", f"{SITE}/a/2")]
    assert [path.name for path in (tmp_path / "store").rglob("*.xml*")] == []
    assert manifest.report["sources"]["se"]["users"] == {"rows": 3, "bad": 0}


DOCTYPE = (
    b'<?xml version="1.0"?>\n<!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa">]>\n'
    b'<posts>\n<row Id="1" Body="&a;" />\n</posts>'
)
BROKEN = {
    "cut in a row": (CONTENT[:-40], "is truncated: it ends at byte"),
    "cut after a row": (CONTENT.removesuffix(b"</posts>"), "is truncated"),
    "padded with NUL": (CONTENT + bytes(999), "is truncated"),
    "empty": (b"", "is not a Stack Exchange dump: expected <posts> at byte 0"),
    "html": (b"<html><body>Too many requests</body></html>", "expected <posts> at byte 0: '<html>"),
    "another table": (USERS, "expected <posts> at byte 41: '<users>"),
    "doctype": (DOCTYPE, "has a document type (<!DOCTYPE at byte 22)"),
    "doctype among the rows": (
        posts_xml(question(1), "<!DOCTYPE a>\n", answer(2, 1)),
        "has a document type",
    ),
    "utf-16": ("<posts></posts>".encode("utf-16"), "is UTF-16"),
    "latin-1": (b'<?xml version="1.0" encoding="iso-8859-1"?><posts></posts>', "iso-8859-1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_whole_dump_is_one_clear_error(tmp_path, name):
    content, message = BROKEN[name]
    folder = write_files(tmp_path / "dump", {"Posts.xml": content})

    with pytest.raises(SourceError) as error:
        collect(tmp_path, dump_source(folder))

    assert message in str(error.value)
    assert str(folder / "Posts.xml") in str(error.value)


def test_a_truncated_file_says_where_its_last_whole_row_ends(tmp_path):
    folder = write_files(tmp_path / "dump", {"Posts.xml": CONTENT[:-40]})
    last = CONTENT[:-40].rindex(b"/>") + 2

    with pytest.raises(SourceError) as error:
        collect(tmp_path, dump_source(folder))

    assert str(error.value) == (
        f"{folder / 'Posts.xml'} is truncated: it ends at byte {len(CONTENT) - 40} without "
        f"</posts> (its last whole row ends near byte {last}); download or unpack it again"
    )


def test_a_file_without_line_ends_is_refused_when_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(dump, "MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr(dump, "CHUNK_BYTES", 1000)
    folder = write_files(
        tmp_path / "dump", {"Posts.xml": posts_xml(question(1, Body="x" * 50_000))}
    )

    with pytest.raises(SourceError, match="no end of line within .* one <row .../> a line"):
        collect(tmp_path, dump_source(folder))


def test_an_empty_dump_gives_no_records(tmp_path):
    for name, content in {
        "a": "<posts />",
        "b": "<posts>\n</posts>\n",
        "c": "<posts></posts>",
    }.items():
        folder = write_files(tmp_path / name, {"Posts.xml": content})
        rows, manifest = collect(tmp_path, dump_source(folder), name=f"store {name}")
        assert (rows, manifest.counts) == ([], Counts())


def evil_archive(path, kind):
    files = {"Posts.xml": CONTENT}
    if kind == "link":
        link = path.parent / "Users.xml"
        link.symlink_to("/etc/passwd")
        with py7zr.SevenZipFile(path, "w") as archive:
            archive.write(link, "Users.xml")
            archive.writestr(CONTENT, "Posts.xml")
        link.unlink()
        return path
    if kind == "bomb":
        return pack_7z(path, {"Posts.xml": b"<posts>\n" + b" " * 3_000_000 + b"</posts>"})
    if kind == "twice":
        files["other/Posts.xml"] = CONTENT
    if kind == "no posts":
        files = {"Badges.xml": b"x"}
    pack_7z(path, files)
    if kind == "traversal":
        # The library refuses to write such a name: change it in an archive with a plain header.
        with py7zr.SevenZipFile(path, "w") as archive:
            archive.set_encoded_header_mode(False)
            archive.writestr(CONTENT, "xx/Posts.xml")
        old, new = "xx/".encode("utf-16-le"), "../".encode("utf-16-le")
        _replace_in_header(path, old, new)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    if kind == "changed":
        content = bytearray(path.read_bytes())
        content[60] ^= 0xFF
        path.write_bytes(content)
    if kind == "encrypted":
        with py7zr.SevenZipFile(path, "w", password="x") as archive:
            archive.writestr(CONTENT, "Posts.xml")
    if kind == "no archive":
        path.write_bytes(b"<html>not found</html>")
    return path


def _replace_in_header(path, old, new):
    """Change bytes in the header of an archive and mend the checksums that cover it."""
    content = bytearray(path.read_bytes())
    offset, size = struct.unpack_from("<QQ", content, 12)
    start = 32 + offset
    header = bytes(content[start : start + size]).replace(old, new)
    content[start : start + size] = header
    struct.pack_into("<I", content, 28, zlib.crc32(header))
    struct.pack_into("<I", content, 8, zlib.crc32(content[12:32]))
    path.write_bytes(content)


EVIL = {
    "link": "has an entry that is a link or device: 'Users.xml'",
    "bomb": "holds more than",
    "twice": "holds Posts.xml twice",
    "no posts": "holds no Posts.xml, but Badges.xml",
    "traversal": "has an entry that leads out of its folder: '../Posts.xml'",
    "truncated": "is damaged or truncated",
    "changed": "is damaged or truncated",
    "encrypted": "is encrypted",
    "no archive": "is damaged or truncated",
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_nobody_should_unpack_is_refused_before_a_byte_is_written(
    tmp_path, kind, monkeypatch
):
    monkeypatch.setattr(unpacking, "FREE_BYTES", 1_000_000)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = evil_archive(folder / "stats.stackexchange.com.7z", kind)
    before = sorted(p for p in tmp_path.rglob("*") if "store" not in p.parts)

    with pytest.raises(SourceError, match=EVIL[kind]) as error:
        collect(tmp_path, dump_source(path))

    assert str(path) in str(error.value)
    assert sorted(p for p in tmp_path.rglob("*") if "store" not in p.parts) == before


@pytest.mark.parametrize("damage", ["truncated", "changed", "bomb", "not gzip"])
def test_a_damaged_gzip_file_is_one_clear_error(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(unpacking, "FREE_BYTES", 1_000_000)
    content = gzip.compress(CONTENT)
    if damage == "truncated":
        content = content[:-20]
    elif damage == "changed":
        content = content[:-6] + b"\0" * 6
    elif damage == "bomb":
        content = gzip.compress(b"<posts>\n" + b" " * 3_000_000 + b"</posts>")
    else:
        content = b"<html>"
    folder = write_files(tmp_path / "dump", {"Posts.xml.gz": content})

    expected = "holds more than" if damage == "bomb" else "is damaged or truncated near byte"
    with pytest.raises(SourceError, match=expected):
        collect(tmp_path, dump_source(folder))


def test_the_site_comes_from_the_recipe_or_the_name_and_is_never_guessed(tmp_path):
    assert site_of(Path("dumps/cardano.stackexchange.com")) == "cardano.stackexchange.com"
    assert site_of(Path("d/stackoverflow.com-Posts.7z")) == "stackoverflow.com"
    assert site_of(Path("meta.mathoverflow.net/Posts.xml.gz")) == "meta.mathoverflow.net"
    assert site_of(Path("my.folder.com/Posts.xml")) is None

    nameless = write_files(tmp_path / "nameless", {"Posts.xml": CONTENT})
    named = write_files(tmp_path / "ai.stackexchange.com", {"Posts.xml": CONTENT})
    sources = [
        dump_source(nameless, site=None, id="a"),
        dump_source(named, id="b"),
        dump_source(tmp_path / "gone", id="c"),
        {"type": "stack-exchange", "id": "d"},
        dump_source(nameless, site=None, id="e", allow_unlicensed=True),
    ]

    with pytest.raises(PreflightError) as error:
        check_sources(Recipe.model_validate(curation_recipe(*sources).model_dump(mode="json")))

    problems = str(error.value).split("; sources.")
    assert len(problems) == 3
    assert "set `site:`, e.g. site: stats.stackexchange.com" in problems[0]
    assert "does not exist; expected a Stack Exchange dump" in problems[1]
    assert "name the `site:`" in problems[2]


def test_the_name_of_a_dump_decides_its_site_and_without_one_links_are_relative(tmp_path):
    named = write_files(tmp_path / "ai.stackexchange.com", {"Posts.xml": CONTENT})
    nameless = write_files(tmp_path / "nameless", {"Posts.xml": CONTENT})

    ours, manifest = collect(tmp_path / "1", dump_source(named))
    unknown, _ = collect(tmp_path / "2", dump_source(nameless, site=None, allow_unlicensed=True))

    assert ours[0]["url"].startswith("https://ai.stackexchange.com/a/")
    assert manifest.report["sources"]["se"]["site"] == "ai.stackexchange.com"
    assert unknown[0]["url"] == ours[0]["url"].removeprefix("https://ai.stackexchange.com")


def test_a_folder_or_file_without_posts_says_what_was_expected(tmp_path):
    empty = write_files(tmp_path / "empty", {"Users.xml": b""})
    two = write_files(tmp_path / "two", {"a.7z": b"", "b.7z": b""})
    other = write_files(tmp_path / "other", {"posts.json": b""})

    for path, message in {
        empty: "holds no Posts.xml, Posts.xml.gz or Posts.7z, and no archive",
        two: "and 2 archives; name the file",
        other / "posts.json": "is neither .xml, .xml.gz nor .7z",
    }.items():
        with pytest.raises(SourceError, match=message):
            locate_dump(path)
