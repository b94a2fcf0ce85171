"""An archive is unpacked whole or refused before a byte of it lies outside of its folder."""

import io
import struct
import tarfile
import zipfile

import pytest

from pipelines.errors import SourceError
from pipelines.plan import data_root
from pipelines.settings.sources import RepositorySource
from pipelines.sources.archive import Budget, is_archive, unpack
from pipelines.sources.repository import locate
from tests.assets.curation import curation_recipe, rows_of, run_stages

CODE = 'def one():\n    """One."""\n    return 1\n'
PKG_INFO = """\
Metadata-Version: 2.4
Name: demo
Version: 1.2.3
Author-email: Ada Lovelace <ada@example.org>
License-Expression: BSD-3-Clause
Project-URL: Source, https://github.com/demo/demo

"""
KINDS = {
    "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE, "pipe": tarfile.FIFOTYPE,
}  # fmt: skip


def write_tar(path, entries, mode="w:gz"):
    """Write a tar of (name, content or (kind, target))."""
    with tarfile.open(path, mode) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = KINDS[content[0]], content[1]
                archive.addfile(info)
            else:
                data = content if isinstance(content, bytes) else content.encode()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, entries):
    """Write a zip of (name, content or (kind, target))."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            data = content
            if isinstance(content, tuple):
                info.external_attr = {"symlink": 0o120777, "device": 0o020666}[content[0]] << 16
                data = content[1]
            archive.writestr(info, data)
    return path


def write(path, entries):
    return (write_zip if path.suffix in (".zip", ".whl") else write_tar)(path, entries)


def everything(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def wanted(name):
    return True


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
def test_files_are_unpacked_without_links_and_without_what_is_not_wanted(tmp_path, name):
    entries = [
        ("./x/a.py", CODE), ("x//b.py", b""), ("x/l.py", ("symlink", "../y/c.py")), ("y/c.py", "1"),
        ("y/n.txt", "no"),
    ]  # fmt: skip
    path = write(tmp_path / name, entries)

    counts = unpack(path, tmp_path / "out", lambda n: n.endswith(".py"))

    assert everything(tmp_path / "out") == {"x/a.py": CODE.encode(), "x/b.py": b"", "y/c.py": b"1"}
    assert counts == {"files": 3, "links": 1}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_packer_is_told_by_its_first_bytes(tmp_path, mode):
    path = write_tar(tmp_path / "a.tar", [("a.py", CODE)], mode)

    unpack(path, tmp_path / "out", wanted)

    assert everything(tmp_path / "out") == {"a.py": CODE.encode()}


@pytest.mark.parametrize("form", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("../evil.py", "1", "entry '../evil.py' would be written outside"),
        ("x/../../evil.py", "1", "would be written outside"),
        ("x/../evil.py", "1", "would be written outside"),
        ("/etc/evil.py", "1", "entry '/etc/evil.py' would be written outside"),
        ("C:/evil.py", "1", "would be written outside"),
        ("x\\..\\evil.py", "1", "would be written outside"),
        ("l.py", ("symlink", "/etc/passwd"), "is a link to '/etc/passwd', which is outside"),
        ("x/l.py", ("symlink", "../../evil"), "is a link to '../../evil', which is outside"),
        ("d.py", ("device", ""), "entry 'd.py' is a device, a pipe or a socket"),
        ("good.py/x.py", "1", "entry 'good.py/x.py' is a folder and a file"),
    ],
)
def test_an_entry_that_leads_out_refuses_the_whole_archive(tmp_path, form, name, content, why):
    inner = tmp_path / "in"
    inner.mkdir()
    path = write(inner / form, [("good.py", CODE), (name, content)])

    with pytest.raises(SourceError, match=f"archive {form}: .*{why.replace('.', '[.]')}"):
        unpack(path, inner / "deep" / "out", wanted)

    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [form]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (("hardlink", "/etc/passwd"), "which is outside"),
        (("hardlink", "../x"), "which is outside"),
        (("block", ""), "is a device"),
        (("pipe", ""), "is a device"),
    ],
)
def test_hard_links_that_lead_out_and_special_files_are_refused(tmp_path, content, why):
    path = write_tar(tmp_path / "a.tar", [("x/l.py", content)])

    with pytest.raises(SourceError, match=why):
        unpack(path, tmp_path / "out", wanted)


def test_a_hard_link_inside_is_passed_over_by_its_name_from_the_top(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x/a.py", CODE), ("x/l.py", ("hardlink", "x/a.py"))])

    assert unpack(path, tmp_path / "out", wanted) == {"files": 1, "links": 1}
    assert everything(tmp_path / "out") == {"x/a.py": CODE.encode()}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    ("budget", "why"),
    [
        (Budget(entries=2), "has more than 2 entries"),
        (Budget(total_bytes=100_000), "holds more than 100000 bytes"),
        (Budget(ratio=10, ratio_from=1000), "unpacks to more than 10 times its size"),
    ],
)
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, name, budget, why):
    path = write(tmp_path / name, [(f"{n}.py", b"\0" * 60_000) for n in range(3)])

    with pytest.raises(SourceError, match=why):
        unpack(path, tmp_path / "out", wanted, budget)

    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_bomb_behind_the_last_entry_or_in_a_header_goes_off_in_the_budget(tmp_path):
    import gzip

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.py"))
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(inner.getvalue() + b"\0" * 1_000_000))

    with pytest.raises(SourceError, match="unpacks to more than 10 times"):
        unpack(path, tmp_path / "out", wanted, Budget(ratio=10, ratio_from=100_000))


def test_a_zip_whose_entry_is_longer_than_it_says_is_damaged(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.py", "x" * 1000)])
    data = path.read_bytes()
    lied = data.replace(struct.pack("<I", 1000), struct.pack("<I", 10))
    assert lied != data
    path.write_bytes(lied)

    with pytest.raises(SourceError, match="is damaged"):
        unpack(path, tmp_path / "out", wanted)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.tar"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_off_archive_is_refused(tmp_path, name, share):
    import random

    noise = random.Random(1).randbytes(9000)
    path = tmp_path / name
    if name == "a.tar":
        write_tar(path, [("a.py", noise), ("b.py", noise)], "w")
    else:
        write(path, [("a.py", noise), ("b.py", noise)])
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    with pytest.raises(SourceError, match="archive a[.].*: is damaged or no archive"):
        unpack(path, tmp_path / "out", wanted)

    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path):
    for name in ("a.tar.gz", "a.zip"):
        path = write(tmp_path / name, [("a.py", bytes(range(256)) * 40)])
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(SourceError, match="is damaged|would be|is a "):
            unpack(path, tmp_path / f"{name}.out", wanted)


def test_an_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.py", CODE)])
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)

    with pytest.raises(SourceError, match="entry 'a.py' is encrypted"):
        unpack(path, tmp_path / "out", wanted)


def test_what_a_killed_unpacking_left_is_no_obstacle(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", [("a.py", CODE)])
    (tmp_path / ".out.part" / "old").mkdir(parents=True)

    unpack(path, tmp_path / "out", wanted)

    assert everything(tmp_path / "out") == {"a.py": CODE.encode()}
    assert not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("x.tar.gz", True), ("x.WHL", True), ("x.tgz", True), ("x.gz", False), ("x.7z", False)],
)
def test_archives_are_told_by_their_name(tmp_path, name, expected):
    assert is_archive(tmp_path / name) is expected


def collect(tmp_path, **keys):
    recipe = curation_recipe({"type": "repository", "id": "s", **keys})
    store, refs = run_stages(tmp_path / "store", recipe, until="collect")
    return rows_of(store, refs["collect"]), store.manifest(refs["collect"])


def test_an_sdist_is_read_with_the_provenance_of_its_metadata(tmp_path):
    path = write_tar(
        tmp_path / "demo-1.2.3.tar.gz",
        [
            ("demo-1.2.3/PKG-INFO", PKG_INFO), ("demo-1.2.3/src/demo/a.py", CODE),
            ("demo-1.2.3/src/demo/data.bin", b"\0" * 100), ("demo-1.2.3/setup.py", "import x\n"),
            ("demo-1.2.3/src/demo/vendored/LICENSE", "GNU GENERAL PUBLIC LICENSE Version 3"),
            ("demo-1.2.3/src/demo/vendored/v.py", CODE),
            ("demo-1.2.3/build/lib/a.py", CODE), ("demo-1.2.3/.gitignore", "/build/\n"),
        ],
    )  # fmt: skip

    rows, manifest = collect(tmp_path, path=str(path))

    blob = "https://github.com/demo/demo/blob/1.2.3"
    assert [(r["id"], r["revision"], r["author"], r["license"], r["url"]) for r in rows] == [
        ("s:setup.py", "1.2.3", "Ada Lovelace", "BSD-3-Clause", f"{blob}/setup.py"),
        ("s:src/demo/a.py", "1.2.3", "Ada Lovelace", "BSD-3-Clause", f"{blob}/src/demo/a.py"),
        (
            "s:src/demo/a.py::one", "1.2.3", "Ada Lovelace", "BSD-3-Clause",
            f"{blob}/src/demo/a.py#L1-L3",
        ),
    ]  # fmt: skip
    assert manifest.counts.dropped == {"vendored": 1}
    assert (manifest.counts.rows_in, manifest.counts.used) == (3, 2)
    [folder] = (data_root() / "raw").glob("archive-*")
    assert not list(folder.rglob("*.bin"))


def test_a_wheel_and_a_zip_of_a_commit_are_read(tmp_path):
    wheel = write_zip(
        tmp_path / "demo-1.2.3-py3-none-any.whl",
        [("demo/a.py", CODE), ("demo-1.2.3.dist-info/METADATA", PKG_INFO)],
    )
    commit = write_zip(
        tmp_path / "code-main.zip",
        [("c/LICENSE", "Permission is hereby granted, free of charge"), ("c/a.py", CODE)],
    )  # fmt: skip

    [whole, one], _ = collect(tmp_path, path=str(wheel), kinds=["file", "function"])
    [other], _ = collect(
        tmp_path, path=str(commit), kinds=["file"], repository="demo/code", revision="abc"
    )

    assert (whole["id"], one["revision"], one["license"]) == (
        "s:demo/a.py",
        "1.2.3",
        "BSD-3-Clause",
    )
    assert (other["license"], other["url"]) == (
        "MIT",
        "https://github.com/demo/code/blob/abc/a.py",
    )


def test_an_archive_is_unpacked_once_for_its_bytes_and_again_for_others(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", [("a.py", CODE)])
    source = RepositorySource(type="repository", id="s", path=str(path), license="MIT")
    first = locate(source)
    marked = first.root / "a.py"
    before = marked.stat().st_mtime_ns

    again = locate(source)
    write_tar(path, [("a.py", CODE + "\n")])
    other = locate(source)

    assert again == first
    assert marked.stat().st_mtime_ns == before
    assert other.root != first.root
    assert other.origin.revision != first.origin.revision


def test_an_archive_without_code_says_so(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", [("a.txt", "x")])

    with pytest.raises(SourceError, match=r"source 's': no .py files in .*a.tar.gz"):
        locate(RepositorySource(type="repository", id="s", path=str(path)))
