"""What a path and the top of a file say: the language, and whether a program wrote the file.

The folders and the markers are those that GitHub's linguist and the protocols of code generators
use; .gitattributes (linguist-vendored, linguist-generated) overrules them.
"""

import codecs
import re
from pathlib import Path, PurePosixPath

from pipelines.records import clean_text

LANGUAGES = {
    ".bash": "Shell", ".c": "C", ".cc": "C++", ".clj": "Clojure", ".cpp": "C++", ".cs": "C#",
    ".css": "CSS", ".cu": "CUDA", ".cuh": "CUDA", ".cxx": "C++", ".dart": "Dart",
    ".erl": "Erlang", ".ex": "Elixir", ".exs": "Elixir", ".f": "Fortran", ".f90": "Fortran",
    ".go": "Go", ".groovy": "Groovy", ".h": "C", ".hh": "C++", ".hpp": "C++", ".hs": "Haskell",
    ".html": "HTML", ".hxx": "C++", ".ipynb": "Jupyter Notebook", ".java": "Java",
    ".jl": "Julia", ".js": "JavaScript",
    ".json": "JSON", ".jsx": "JavaScript", ".kt": "Kotlin", ".kts": "Kotlin", ".lua": "Lua",
    ".m": "MATLAB", ".md": "Markdown", ".mjs": "JavaScript", ".ml": "OCaml", ".mli": "OCaml",
    ".nim": "Nim", ".php": "PHP", ".pl": "Perl", ".pm": "Perl", ".proto": "Protocol Buffer",
    ".ps1": "PowerShell", ".pxd": "Cython", ".pxi": "Cython", ".py": "Python", ".pyi": "Python",
    ".pyx": "Cython", ".r": "R", ".rb": "Ruby", ".rs": "Rust", ".rst": "reStructuredText",
    ".scala": "Scala", ".scss": "SCSS", ".sh": "Shell", ".sql": "SQL", ".swift": "Swift",
    ".tex": "TeX", ".toml": "TOML", ".ts": "TypeScript", ".tsx": "TypeScript", ".vue": "Vue",
    ".xml": "XML", ".yaml": "YAML", ".yml": "YAML", ".zig": "Zig",
}  # fmt: skip
PYTHON = (".py",)

VENDORED_FOLDER = re.compile(
    r"(?:^|/)(?:node_modules|bower_components|jspm_packages|site-packages|dist-packages"
    r"|_?vendors?|_?vendored|_?externs?|_?externals?|(?:3rd|third)[-_]?party"
    r"|Pods|Carthage|Godeps|\.yarn|\.venv|venv)/",
    re.IGNORECASE,
)
GENERATED_NAME = re.compile(
    r"(?:_pb2(?:_grpc)?\.pyi?|\.pb(?:\.gw)?\.(?:go|cc|h)|\.pb\.\w+|\.g\.(?:dart|cs)|\.designer\.cs"
    r"|\.generated\.\w+|[._-]min\.(?:js|css|mjs)|\.map|\.lock|(?:^|/)(?:package-lock\.json"
    r"|npm-shrinkwrap\.json|pnpm-lock\.yaml|go\.sum|\.?pnp\.c?js))$",
    re.IGNORECASE,
)
MARKER_WITHIN = 30  # lines at the top of a file
COMMENT = re.compile(r"\s*(?:#|//|/\*|\*|--|;|<!--|%|\(\*|\"\"\"|''')")
MARKER = re.compile(
    r"\bdo not (?:edit|modify)\b|@generated\b|\b(?:code|file) (?:is )?generated\b"
    r"|\b(?:auto-?|automatically )generated\b|(?:^|[^\w\s]\s*)generated (?:by|from|with|using)\b",
    re.IGNORECASE,
)
SHOUTED = re.compile(r"\bDO NOT (?:EDIT|MODIFY)\b")
MINIFIABLE = (".js", ".mjs", ".cjs", ".css")
MINIFIED_MEAN = 110  # characters a line, as linguist has it

COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
# Encodings of text alone: Python has codecs that unpack or execute escapes, too.
ENCODINGS = re.compile(r"(?:iso8859|cp125|cp866|cp437|koi8|shift_jis|euc_|gb|big5|mac_)\w*")


class Unusable(ValueError):
    """A file that yields nothing; `reason` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


def read_source(path: Path, max_bytes: int) -> str:
    """Return a file's text without byte order mark and with Unix line ends; raises Unusable.

    A file above `max_bytes` is not read at all. UTF-8 goes before what a coding line says, which
    is asked only where the bytes are not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise Unusable("too_large", f"{size} bytes, at most {max_bytes}")
        data = path.read_bytes()
    except OSError as error:
        raise Unusable("unreadable", error.strerror or str(error)) from error
    if not data.strip():
        raise Unusable("empty")
    if b"\0" in data:
        raise Unusable("nul_bytes", f"at byte {data.index(0)}")
    return _decode(data).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = _named_encoding(data)
        if encoding is None:
            raise Unusable("not_utf8", f"{error.reason} at byte {error.start}") from error
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unusable("not_utf8", f"nor {encoding}: {error.reason} at {error.start}") from error
    if clean_text(text) is None:
        raise Unusable("not_utf8", f"not text as {encoding} either")
    return text


def _named_encoding(data: bytes) -> str | None:
    """Return the encoding of text that one of the first two lines names (PEP 263), or None."""
    for line in data.splitlines()[:2]:
        found = COOKIE.match(line)
        if found:
            with_name = found[1].decode("ascii", "replace")
            try:
                name = codecs.lookup(with_name).name.replace("-", "_")
            except LookupError:
                return None
            return name if ENCODINGS.fullmatch(name) else None
    return None


def suffix_of(name: str) -> str:
    """Return the last suffix of a path in lower case, with its dot."""
    return PurePosixPath(name).suffix.lower()


def language_of(name: str) -> str:
    """Return the programming language of a path, "unknown" for a suffix nobody told us of."""
    return LANGUAGES.get(suffix_of(name), "unknown")


def is_vendored(name: str) -> bool:
    """Say whether a path lies in a folder that by convention holds other projects' code."""
    return VENDORED_FOLDER.search(name) is not None


def is_generated_name(name: str) -> bool:
    """Say whether a path is one that a generator, a packer or a package tool writes."""
    return GENERATED_NAME.search(name) is not None


def is_generated(name: str, text: str) -> bool:
    """Say whether a text is minified or declares at its top that a program wrote it."""
    if suffix_of(name) in MINIFIABLE:
        # A license above minified code must not lower the mean of what follows it.
        lines = [line for line in text.split("\n") if line.strip() and not COMMENT.match(line)]
        if lines and sum(map(len, lines)) / len(lines) > MINIFIED_MEAN:
            return True
    top = text[:20_000].split("\n")[:MARKER_WITHIN]
    return any(
        SHOUTED.search(line) or (COMMENT.match(line) and MARKER.search(line)) for line in top
    )
