"""Whatever becomes of an archive on its way, it is unpacked as it was or refused."""

import gzip
import io
import struct
import zlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import py7zr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.sources.stack_exchange.unpacking import unpack

CONTENT = b"<posts>\r\n" + b"".join(b'<row Id="%d" />\r\n' % n for n in range(50)) + b"</posts>"
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3)
CUTS = st.one_of(st.none(), st.integers(0, 10_000))


@cache
def archive(encoded):
    packed = io.BytesIO()
    with py7zr.SevenZipFile(packed, "w") as file:
        file.set_encoded_header_mode(encoded)
        file.writestr(b"<users></users>", "Users.xml")
        file.writestr(CONTENT, "Posts.xml")
    return packed.getvalue()


def damage(packed, changes, cut, first):
    content = bytearray(packed)
    for place, value in changes:
        content[first + place % (len(content) - first)] = value
    return content[: len(content) if cut is None else cut % len(content)]


def mend(content):
    """Make the checksums of the headers right again, so that their values are looked at."""
    if len(content) > 32:
        offset, size = struct.unpack_from("<QQ", content, 12)
        header = bytes(content[32 + offset : 32 + offset + size])
        struct.pack_into("<I", content, 28, zlib.crc32(header))
        struct.pack_into("<I", content, 8, zlib.crc32(content[12:32]))
    return content


def unpack_bytes(name, content):
    """Return what comes out of a packed file, None where it is refused, and the files left."""
    with TemporaryDirectory() as folder:
        packed = Path(folder, "in", name)
        packed.parent.mkdir()
        packed.write_bytes(content)
        output = Path(folder, "out", "Posts.part")
        output.parent.mkdir()
        message = None
        try:
            unpack([packed], output, {"table": "Posts", "others": {"Users": "Users.xml"}})
        except SourceError as error:
            message = str(error)
        written = {p.name for p in Path(folder).rglob("*") if p.is_file()}
        assert written <= {name, "Posts.part", "Posts.part.Users", "Users.xml"}
        assert message is None or str(packed) in message
        return output.read_bytes() if message is None else None


@settings(max_examples=200, deadline=None)
@given(st.booleans(), CHANGES, CUTS, st.booleans())
def test_a_changed_archive_is_unpacked_as_it_was_or_refused(encoded, changes, cut, mended):
    content = damage(archive(encoded), changes, cut, 12)

    found = unpack_bytes("site.7z", mend(content) if mended else content)

    assert found in (None, CONTENT) or mended
    if not changes and cut is None:
        assert found == CONTENT


@settings(max_examples=100, deadline=None)
@given(CHANGES, CUTS)
def test_a_changed_gzip_file_is_unpacked_as_it_was_or_refused(changes, cut):
    content = damage(gzip.compress(CONTENT), changes, cut, 10)

    found = unpack_bytes("Posts.xml.gz", content)

    # Nothing at all is an empty file, which has no posts: that is said when it is read.
    assert found in (None, CONTENT) or (not content and found == b"")
