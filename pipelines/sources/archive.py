"""Takes files out of zip and tar archives (wheels and sdists among them) that nobody vouches for.

All entries are looked at before the first byte is written: one that would land outside (absolute,
`..`, a drive, a link that leads out), a device, or more than the budget refuses the whole archive.
Links inside are passed over. Nothing is executed, and no permission is taken over.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NoReturn, cast

from pipelines.errors import SourceError
from pipelines.store import sync_folder

ARCHIVES = (
    ".zip", ".whl", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz",
)  # fmt: skip
PACKERS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
)
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
COPY_BYTES = 1 << 20
DAMAGES = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
    RuntimeError, UnicodeError, ValueError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that an archive may hold: entries, bytes in all, and bytes per byte packed.

    Source code packs 3 to 10 times; the ratio counts from `ratio_from` bytes on, as an empty table
    packs well, too.
    """

    entries: int = 500_000
    total_bytes: int = 4_000_000_000
    ratio: int = 200
    ratio_from: int = 50_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: the name it is known by, its size, and what it is a link to, if it is one."""

    name: str
    size: int
    kind: str  # "file", "folder", "link", "special"
    target: str = ""


def is_archive(path: Path) -> bool:
    """Say whether a file's name is that of an archive that can be read."""
    return path.name.lower().endswith(ARCHIVES)


def unpack(
    path: Path, folder: Path, wanted: Callable[[str], bool], budget: Budget | None = None
) -> dict[str, int]:
    """Write the wanted files of an archive below a new folder, all of them or none.

    One process at a time unpacks into a folder.

    Returns {"files": n, "links": n}. Raises SourceError for an archive that is damaged, encrypted,
    would write outside of the folder or is over the budget: nothing is written then.
    """
    limits = budget or Budget()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        entries = [entry for entry, _ in _entries(path, limits)]
        names = _check(path, entries)
        part.mkdir(parents=True)
        for entry, opened in _entries(path, limits):
            name = names.get(entry.name, "")
            if entry.kind == "file" and name and wanted(name):
                _write(opened(), part / name, entry.size)
        sync_folder(part)
        part.replace(folder)
    except DAMAGES as error:
        _refuse(path, f"is damaged or no archive ({error})")
    except OSError as error:
        if error.errno is not None:
            raise SourceError(f"{path}: cannot be unpacked ({error})") from error
        _refuse(path, f"is damaged or no archive ({error})")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    links = sum(entry.kind == "link" for entry in entries)
    return {"files": sum(map(wanted, set(names.values()))), "links": links}


def digest_archive(path: Path) -> str:
    """Return the sha256 of an archive's bytes; raises SourceError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def _refuse(path: Path, why: str) -> NoReturn:
    raise SourceError(
        f"archive {path.name}: {why}; nothing of it was unpacked, get it again from where it is "
        "published or unpack what you trust of it yourself and give the folder as `path:`"
    ) from None


def _check(path: Path, entries: list[Entry]) -> dict[str, str]:
    """Return {name in the archive: path below the folder} of all files; raises SourceError."""
    names: dict[str, str] = {}
    for entry in entries:
        shown = f"{entry.name!a}"
        clean = _inside(entry.name)
        if clean is None:
            _refuse(path, f"entry {shown} would be written outside of the folder")
        if entry.kind == "special":
            _refuse(path, f"entry {shown} is a device, a pipe or a socket")
        if entry.kind == "link":
            base = "" if entry.target.startswith("\0") else str(PurePosixPath(clean).parent)
            target = entry.target.lstrip("\0")
            if _inside(target, base) is None:
                _refuse(path, f"entry {shown} is a link to {target!a}, which is outside")
        if entry.kind == "file":
            names[entry.name] = clean
    files = set(names.values())
    for name in files:
        parents = {str(parent) for parent in PurePosixPath(name).parents}
        if name == "." or parents & files:
            _refuse(path, f"entry {name!a} is a folder and a file")
    return names


def _inside(name: str, base: str = "") -> str | None:
    """Return a path below the root with "." and ".." taken out, or None where it leads out."""
    if not name or "\0" in name or "\\" in name or name.startswith("/") or name[1:2] == ":":
        return None
    parts = [] if base in ("", ".") else base.split("/")
    for part in name.split("/"):
        if part == "..":
            # Climbing is for links: a file's name has no business with it, even inside.
            if not parts or not base:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or "."


def _write(stream: IO[bytes], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with path.open("wb") as file:
        while chunk := stream.read(min(COPY_BYTES, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise EOFError(f"{path.name} is longer than its entry says")
            file.write(chunk)
        if left:
            raise EOFError(f"{path.name} is {left} bytes shorter than its entry says")
        file.flush()
        os.fsync(file.fileno())


Opened = Callable[[], IO[bytes]]


def _entries(path: Path, budget: Budget) -> Iterator[tuple[Entry, Opened]]:
    """Yield every entry of an archive with a way to read it before the next one is asked for."""
    packed = path.stat().st_size
    count = total = 0
    with path.open("rb") as file:
        zipped = file.read(4) in ZIP
    found = _zip_entries(path) if zipped else _tar_entries(path, packed, budget)
    for entry, opened in found:
        count, total = count + 1, total + entry.size
        if count > budget.entries:
            _refuse(path, f"has more than {budget.entries} entries")
        _check_size(path, total, packed, budget)
        yield entry, opened


def _check_size(path: Path, total: int, packed: int, budget: Budget) -> None:
    if total > budget.total_bytes:
        _refuse(path, f"holds more than {budget.total_bytes} bytes")
    if total > budget.ratio_from and total > packed * budget.ratio:
        _refuse(path, f"unpacks to more than {budget.ratio} times its size")


def _zip_entries(path: Path) -> Iterator[tuple[Entry, Opened]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                _refuse(path, f"entry {info.filename!a} is encrypted")
            mode = info.external_attr >> 16
            kind, target = "file", ""
            if info.is_dir():
                kind = "folder"
            elif stat.S_ISLNK(mode):
                kind, target = "link", archive.read(info)[:4096].decode(errors="replace")
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                kind = "special"
            # `orig_filename` is the name as stored, with the NUL that zipfile cuts off.
            name = info.orig_filename if "\0" in info.orig_filename else info.filename
            entry = Entry(name, 0 if kind == "folder" else info.file_size, kind, target)
            yield entry, lambda info=info: archive.open(info)  # type: ignore[misc]


def _tar_entries(path: Path, packed: int, budget: Budget) -> Iterator[tuple[Entry, Opened]]:
    with _decompressed(path) as stream:
        counted = _Counted(stream, lambda total: _check_size(path, total, packed, budget))
        with tarfile.open(fileobj=cast(BinaryIO, counted), mode="r|") as archive:
            for info in archive:
                name = info.name or "/"  # tarfile takes trailing slashes off
                kind, target = _kind_of(info)
                entry = Entry(name, info.size if kind == "file" else 0, kind, target)
                yield entry, _reader(archive, info)
        # What follows the last entry is read as well: only then are its checksums checked.
        while counted.read(COPY_BYTES):
            pass


def _kind_of(info: tarfile.TarInfo) -> tuple[str, str]:
    """Return an entry's kind, and for a link its target, a NUL before a name in the archive."""
    if info.issparse():  # a few bytes can stand for any number of zeros
        return "special", ""
    if info.isreg():
        return "file", ""
    if info.isdir():
        return "folder", ""
    if info.issym() or info.islnk():
        return "link", ("\0" if info.islnk() else "") + info.linkname
    return "special", ""


def _reader(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Opened:
    def opened() -> IO[bytes]:
        found = archive.extractfile(info)
        if found is None:
            raise tarfile.TarError(f"{info.name} has no content")
        return found

    return opened


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        found = [opened for start, opened in PACKERS if magic.startswith(start)]
        yield found[0](file) if found else file


class _Counted(io.RawIOBase):
    """Counts what is read of a decompressed stream, so that a bomb stops while it goes off."""

    def __init__(self, stream: IO[bytes], check: Callable[[int], None]) -> None:
        super().__init__()
        self._stream = stream
        self._check = check
        self._total = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._total += len(data)
        self._check(self._total)
        return data
