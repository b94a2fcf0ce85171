"""Handlers of tables: a grid of inline content becomes a GFM table, any other its blocks."""

import re
from dataclasses import dataclass, field

from pipelines.sources.html_walk import Handler, Walker, attributes, block

# A table that holds one of these lays out a page; in a GFM cell it would lose its form.
_NOT_IN_CELLS = frozenset(
    "table pre blockquote h1 h2 h3 h4 h5 h6 dl details hr script style iframe template".split()
)
_ALIGN = re.compile(r"text-align\s*:\s*(left|center|right)", re.IGNORECASE)
_RULES = {"left": ":---", "center": ":---:", "right": "---:", "": "---"}
# Cells that spans may add to a table, so that attributes cannot grow it without bound.
_NOTHING: dict[str, str] = {}
_MAX_FILLERS = 500


@dataclass(slots=True)
class Grid:
    """The rows of an open table and the state of the writer around it."""

    floor: int
    rows: list[list[str]] = field(default_factory=list)
    aligns: list[str] = field(default_factory=list)
    spans: dict[int, int] = field(default_factory=dict)  # column -> rows still covered
    fillers: int = _MAX_FILLERS
    outer: tuple[list[str], str, str, str, str] | None = None
    given: str = ""

    def start_row(self) -> None:
        """Begin a row."""
        self.rows.append([])

    def add(self, text: str) -> None:
        """Put a cell into the last row, behind what spans from above cover."""
        if not self.rows:
            self.start_row()
        row = self.rows[-1]
        self.fill(row)
        given = attributes(self.given) if self.given else _NOTHING
        if len(self.aligns) == len(row):
            style = _ALIGN.search(given.get("style", ""))
            align = style[1] if style else given.get("align", "")
            self.aligns.append(align.lower())
        if "span" not in self.given:
            row.append(text)
            return
        wide, high = _span(given, "colspan"), _span(given, "rowspan")
        for column in range(wide):
            if column and not self.take():
                break
            if high > 1:
                self.spans[len(row)] = high - 1
            row.append("" if column else text)

    def fill(self, row: list[str]) -> None:
        """Fill the columns that cells of rows above cover."""
        while self.spans.get(len(row)) and self.take():
            self.spans[len(row)] -= 1
            row.append("")

    def take(self) -> bool:
        """Return whether one more filler is allowed, and count it."""
        self.fillers -= 1
        return self.fillers >= 0

    def render(self) -> str:
        """Return the table; the first row is its header."""
        rows = [row for row in self.rows if any(row)]
        if not rows:
            return ""
        width = max(len(row) for row in rows)
        aligns = self.aligns[:width] + [""] * (width - len(self.aligns))
        head = rows[0] + [""] * (width - len(rows[0]))
        lines = [f"| {' | '.join(row)} |" for row in (head, *rows[1:])]
        lines.insert(1, f"| {' | '.join(_RULES.get(align, '---') for align in aligns)} |")
        return "\n".join(lines)


def _span(given: dict[str, str], name: str) -> int:
    text = given.get(name, "").strip()
    return min(int(text), 1000) or 1 if text.isascii() and text.isdigit() and len(text) < 5 else 1


def is_grid(names: list[str], i: int) -> bool:
    """Return whether the table at tag i ends and holds only what fits into GFM cells."""
    cells = False
    for at in range(i + 1, len(names)):
        name = names[at].lower()
        if name == "/table":
            return cells
        if name in _NOT_IN_CELLS:
            return False
        cells = cells or name in ("td", "th")
    return False


def _start_table(walker: Walker, i: int) -> int:
    walker.flush()
    if walker.grid is None and is_grid(walker.names, i):
        walker.grid = Grid(walker.floor)
        walker.floor = len(walker.stack)
    walker.tail(walker.texts[i])
    return i + 1


def _end_table(walker: Walker, i: int) -> int:
    walker.flush()
    grid = walker.grid
    if isinstance(grid, Grid):
        _leave_cell(walker, grid)
        walker.close_down_to(walker.floor)
        walker.floor, walker.grid = grid.floor, None
        table = grid.render()
        if table:
            walker.emit(table)
    walker.tail(walker.texts[i])
    return i + 1


def _start_row(walker: Walker, i: int) -> int:
    walker.flush()
    grid = walker.grid
    if isinstance(grid, Grid):
        _leave_cell(walker, grid)
        grid.start_row()
    walker.tail(walker.texts[i])
    return i + 1


def _start_cell(walker: Walker, i: int) -> int:
    walker.flush()
    grid = walker.grid
    if isinstance(grid, Grid):
        _leave_cell(walker, grid)
        walker.close_down_to(walker.floor)
        grid.outer = (walker.out, walker.gap, walker.first, walker.rest, walker.blank)
        grid.given = walker.rests[i]
        walker.out, walker.gap, walker.first, walker.rest = [], "", "", ""
        walker.blank, walker.cells, walker.special = "\n\n", True, True
    walker.tail(walker.texts[i])
    return i + 1


def _end_cell(walker: Walker, i: int) -> int:
    walker.flush()
    if isinstance(walker.grid, Grid):
        _leave_cell(walker, walker.grid)
    walker.tail(walker.texts[i])
    return i + 1


def _leave_cell(walker: Walker, grid: Grid) -> None:
    if grid.outer is None:
        return
    if len(walker.stack) > walker.floor:
        walker.close_down_to(walker.floor)
    text = "".join(walker.out).replace("|", "\\|")
    if "\n" in text:
        text = re.sub(r"\n+", "<br>", text)
    walker.out, walker.gap, walker.first, walker.rest, walker.blank = grid.outer
    grid.outer, walker.cells = None, False
    walker.set_heading("")
    grid.add(text)


HANDLERS: dict[str, Handler] = {
    "table": _start_table,
    "/table": _end_table,
    "tr": _start_row,
    "/tr": _end_cell,
    "td": _start_cell,
    "th": _start_cell,
    "/td": _end_cell,
    "/th": _end_cell,
    "caption": block,
}
