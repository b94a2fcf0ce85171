"""Unpacks the tables of a dump from .7z and .xml.gz, within a budget and nowhere else.

Only the tables are written, each to a file whose name is ours; an archive with an entry that would
lead out of a folder, or with a link, is refused as a whole before anything is written.
"""

import errno
import gzip
import lzma
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipelines.engine import Outcome, Params
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.sources.stack_exchange.located import TABLES

MAX_RATIO = 100  # posts pack about 6 times with 7z, 4 with gzip
FREE_BYTES = 64 << 20  # a small archive may pack better
COPY_BYTES = 1 << 20
# What py7zr raises for headers that make no sense: it checks few of their values.
DAMAGES = (
    lzma.LZMAError, zlib.error, struct.error, EOFError, AssertionError, AttributeError, TypeError,
    ValueError, LookupError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip
DRIVE = re.compile(r"[A-Za-z]:")


def budget_of(packed: Path) -> int:
    """Return how many bytes may come out of a packed file."""
    return max(FREE_BYTES, packed.stat().st_size * MAX_RATIO)


def unpack(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write a table from a packed file as it was; other tables beside it as `params["others"]`.

    `params` holds table, and others: {table: file name in the folder of `output`}. Tables that an
    archive does not have are left out, but for the first. Raises SourceError.
    """
    [packed] = inputs
    wanted = {params["table"]: output}
    others = {table: output.with_name(f"{output.name}.{table}") for table in params["others"]}
    if packed.name.endswith(".gz"):
        _unpack_gzip(packed, output)
    else:
        _unpack_archive(packed, params["table"], {**wanted, **others})
    for table, part in others.items():
        if part.exists():
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(output.with_name(params["others"][table]))
    return Outcome(Counts())


def _unpack_gzip(packed: Path, output: Path) -> None:
    left = budget_of(packed)
    at = 0
    with packed.open("rb") as raw, output.open("wb") as file:
        try:
            with gzip.open(raw) as content:
                while block := content.read(COPY_BYTES):
                    at += file.write(block)
                    left -= len(block)
                    if left < 0:
                        _refuse_bomb(packed)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SourceError(
                f"{packed} is damaged or truncated near byte {raw.tell()} (after {at} bytes of "
                f"content: {error}); download it again"
            ) from error


def _refuse_bomb(packed: Path) -> None:
    raise SourceError(
        f"{packed} holds more than {budget_of(packed)} bytes, over {MAX_RATIO} times its own size; "
        "no dump packs like that, so it is not unpacked further"
    )


def _unpack_archive(packed: Path, table: str, wanted: Mapping[str, Path]) -> None:
    import py7zr

    try:
        # A file that is open already is unpacked in one thread, block by block.
        with packed.open("rb") as raw, py7zr.SevenZipFile(raw) as archive:
            members = _find_members(packed, archive)
            if table not in members:
                raise SourceError(
                    f"{packed} holds no {table}.xml, but {', '.join(archive.getnames()[:10])}"
                )
            targets = {members[name]: path for name, path in wanted.items() if name in members}
            archive.extract(targets=list(targets), factory=_make_factory(targets))
    except py7zr.exceptions.PasswordRequired as error:
        raise SourceError(f"{packed} is encrypted; dumps are not") from error
    except (py7zr.exceptions.ArchiveError, OSError, *DAMAGES) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place before the start
            raise
        raise SourceError(
            f"{packed} is damaged or truncated ({type(error).__name__}: {error}); download it again"
        ) from error


def _find_members(packed: Path, archive: Any) -> dict[str, str]:
    """Return the entries that are tables; SourceError for an archive that nobody should unpack."""
    found: dict[str, str] = {}
    size = 0
    for entry in archive.files:
        name = str(entry.filename)
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or DRIVE.match(name) or "\0" in name:
            raise SourceError(f"{packed} has an entry that leads out of its folder: {name!r}")
        if entry.is_symlink or entry.is_junction or entry.is_socket:
            raise SourceError(f"{packed} has an entry that is a link or device: {name!r}")
        table = path.name.removesuffix(".xml")
        if path.suffix == ".xml" and table in TABLES and not entry.is_directory:
            if table in found:
                raise SourceError(f"{packed} holds {path.name} twice: {found[table]!r}, {name!r}")
            found[table] = name
            size += entry.uncompressed
    if size > budget_of(packed):
        _refuse_bomb(packed)
    return found


def _make_factory(targets: Mapping[str, Path]) -> Any:
    from py7zr.io import Py7zIO, WriterFactory

    by_name = {PurePosixPath(entry).name: path for entry, path in targets.items()}

    class Output(Py7zIO):  # type: ignore[misc]
        """Writes one entry to its file and counts what all of them hold."""

        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def write(self, s: bytes | bytearray) -> int:
            return self._file.write(s)

        def read(self, size: int | None = None) -> bytes:
            return b""

        def seek(self, offset: int, whence: int = 0) -> int:
            return self._file.tell()

        def flush(self) -> None:
            self._file.flush()

        def size(self) -> int:
            return self._file.tell()

        def close(self) -> None:
            self._file.close()

    class Factory(WriterFactory):  # type: ignore[misc]
        """Opens our file for an entry, whatever path the archive gives it."""

        def create(self, filename: str) -> Output:
            return Output(by_name[PurePosixPath(filename).name].open("wb"))

    return Factory()
