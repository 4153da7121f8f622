"""The picture and the tables of docs/architecture.md, from the code: `python docs/draw_rooms.py`, or with --check.

Rooms are the packages of the import contract in pyproject.toml, arrows the imports that grimp finds in build/rooms
(`make rooms`). The stops of the two ways are named here; that they exist, and what they do, is read from the sources.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp
from importlinter import api

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "splaser_plugin"
SOURCES = ROOT / "build" / "rooms"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "architecture.svg"
BEGIN, END = "<!-- drawn by docs/draw_rooms.py -->\n", "<!-- end of what is drawn -->\n"

WAYS = {
    "matrix": (
        "read_weights",
        "singular_values",
        "fit_edges",
        "matrix_scan",
        "choose_candidates",
        "Weights.reduce",
        "Judge.judge",
        "Recipe",
    ),
    "pair": (
        "open_source",
        "pairs_from_rows",
        "split_by_prompt",
        "Prompter.tokens",
        "Generator.answer",
        "SentenceEmbedder",
        "SemanticScorer",
        "verdict.compare",
        "write_report",
    ),
}
"""What a matrix and a pair come past in `splaser laser`, in this order. Where each is found out from the sources."""
COLOURS = {"matrix": "#1565c0", "pair": "#c2410c"}

WIDTH, MARGIN, GAP = 980, 14, 24
TITLE, STOP, PADDING = 22, 24, 10


@dataclass(frozen=True)
class Stop:
    """A class or function on a way. place: its dotted name inside the package; does: its docstring's first sentence."""

    way: str
    number: int
    name: str
    place: str
    does: str


@dataclass
class Box:
    """A room's place in the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def end(self) -> float:
        return self.x + self.width


def layers() -> list[list[str]]:
    """Rooms from the top down, as the import contract has them; the adapters are one room."""
    contract = api.read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"][0]
    found = []
    for layer in contract["layers"]:
        names = [name.strip(" ()") for name in layer.replace("|", ":").split(":")]
        rooms = [name if name == "integrations.configs" else name.split(".")[0] for name in names]
        found.append(list(dict.fromkeys(rooms)))
    return found


def imports(rooms: list[str]) -> set[tuple[str, str]]:
    """(importer, imported) of the rooms, without what follows from others."""
    sys.path.insert(0, str(SOURCES))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    by_length = sorted(rooms, key=len, reverse=True)

    def room_of(module: str) -> str | None:
        inside = module.removeprefix(f"{PACKAGE}.")
        return next((room for room in by_length if f"{inside}.".startswith(f"{room}.")), None)

    direct: dict[str, set[str]] = {room: set() for room in rooms}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = room_of(module), room_of(imported)
            if importer and target and importer != target:
                direct[importer].add(target)

    def reached(room: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in direct[room]))

    followed = {room: set().union(*map(reached, direct[room])) for room in rooms}
    return {(room, other) for room in rooms for other in direct[room] - followed[room]}


def source_of(module: str) -> Path:
    """The file of a module, or of a package's __init__."""
    path = SOURCES / PACKAGE / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules_of(room: str) -> list[str]:
    """Names of a room's modules."""
    folder = source_of(room)
    if folder.name != "__init__.py":
        return []
    return sorted(file.stem for file in folder.parent.glob("*.py") if file.stem != "__init__")


def first_sentence(name: str, docstring: str | None) -> str:
    if not docstring:
        raise LookupError(f"{name} has no docstring for docs/architecture.md")
    first = " ".join(docstring.split("\n\n")[0].split())
    return first if first.endswith(".") else f"{first}."


def definitions(rooms: list[str]) -> dict[str, str | None]:
    """The docstrings of all classes, functions and methods, by dotted name."""
    found = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found[f"{name}.{child.name}"] = ast.get_docstring(child)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{name}.{child.name}")

    for room in rooms:
        for module in modules_of(room):
            name = f"{room}.{module}"
            visit(ast.parse(source_of(name).read_text(encoding="utf-8")), name)
    return found


def stops(rooms: list[str]) -> dict[str, list[Stop]]:
    """The stops in each room. Raises LookupError when one isn't there, or is there twice."""
    known = definitions(rooms)
    found: dict[str, list[Stop]] = {room: [] for room in rooms}
    for way, names in WAYS.items():
        for number, name in enumerate(names, 1):
            places = [place for place in known if place.endswith(f".{name}")]
            if len(places) != 1:
                raise LookupError(f"WAYS of docs/draw_rooms.py has {name}, and the code {places or 'nothing of it'}")
            [place] = places
            room = max((room for room in rooms if place.startswith(f"{room}.")), key=len)
            found[room].append(Stop(way, number, name, place, first_sentence(place, known[place])))
    return found


def place(rows: list[list[str]], inside: dict[str, list[Stop]]) -> tuple[dict[str, Box], float]:
    """A box for each room, and the height of the whole picture."""
    boxes, y = {}, float(MARGIN)
    for row in rows:
        width = min(226.0, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row))
        x = (WIDTH - len(row) * width - (len(row) - 1) * GAP) / 2
        height = PADDING * 2 + TITLE + max(len(inside[room]) for room in row) * STOP
        for room in row:
            boxes[room] = Box(x, y, width, height)
            x += width + GAP
        y += height + GAP + 8
    return boxes, y - GAP - 8 + MARGIN


def draw(rows: list[list[str]], inside: dict[str, list[Stop]]) -> str:
    """The picture as SVG."""
    boxes, height = place(rows, inside)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        "<defs>",
        *[arrow_head(name, colour) for name, colour in {"import": "#9aa5b1", **COLOURS}.items()],
        "</defs>",
        *draw_legend(),
    ]
    for importer, imported in sorted(imports(list(boxes))):
        a, b = boxes[importer], boxes[imported]
        y, end = a.y + a.height, b.y - 2
        lines.append(
            f'<path d="M{a.middle:.0f} {y:.0f} C{a.middle:.0f} {(y + end) / 2:.0f} {b.middle:.0f} {(y + end) / 2:.0f} '
            f'{b.middle:.0f} {end:.0f}" fill="none" stroke="#9aa5b1" marker-end="url(#import)"/>'
        )
    places: dict[tuple[str, int], tuple[Box, float]] = {}
    for room, box in boxes.items():
        lines += draw_room(room, box)
        for line_number, stop in enumerate(inside[room]):
            y = box.y + PADDING + TITLE + line_number * STOP + STOP / 2
            places[stop.way, stop.number] = box, y
            lines += draw_stop(box, y, stop)
    for way, names in WAYS.items():
        for number in range(1, len(names)):
            lines.append(draw_step(places[way, number], places[way, number + 1], way))
    return "\n".join([*lines, "</svg>", ""])


def arrow_head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
    )


def draw_room(room: str, box: Box) -> list[str]:
    return [
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" '
        'fill="#f4f6f8" stroke="#52606d"/>',
        f'<text x="{box.middle:.0f}" y="{box.y + PADDING + 11:.0f}" text-anchor="middle" font-weight="bold" '
        f'fill="#1f2933">{escape(room)}</text>',
    ]


def draw_stop(box: Box, y: float, stop: Stop) -> list[str]:
    """A matrix's at the room's left side, a pair's at the right."""
    left = stop.way == "matrix"
    x, text_x, anchor = (box.x + 20, box.x + 36, "start") if left else (box.end - 20, box.end - 36, "end")
    return [
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="9" fill="{COLOURS[stop.way]}"/>',
        f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" font-size="11" fill="#ffffff">{stop.number}</text>',
        f'<text x="{text_x:.0f}" y="{y + 4:.0f}" text-anchor="{anchor}" font-size="12" fill="#1f2933">'
        f"{escape(stop.name)}</text>",
    ]


def draw_step(start: tuple[Box, float], end: tuple[Box, float], way: str) -> str:
    """From one stop to the next: straight to a neighbour, else round the rooms on the way's own side."""
    (a, y), (b, target) = start, end
    outward = -1 if way == "matrix" else 1
    if a is not b and a.y == b.y:
        from_x, to_x = (a.x, b.end) if a.x > b.x else (a.end, b.x)
        bend = 0.0
    else:
        from_x, to_x = (box.x + 11 if outward < 0 else box.end - 11 for box in (a, b))
        bend = outward * (22 + 0.22 * abs(target - y))
    return (
        f'<path d="M{from_x:.0f} {y:.0f} C{from_x + bend:.0f} {y:.0f} {to_x + bend:.0f} {target:.0f} '
        f'{to_x + outward:.0f} {target:.0f}" fill="none" stroke="{COLOURS[way]}" stroke-width="1.6" '
        f'stroke-opacity="0.8" marker-end="url(#{way})"/>'
    )


def draw_legend() -> list[str]:
    meanings = {f"the way of a {way}": colour for way, colour in COLOURS.items()} | {"imports": "#9aa5b1"}
    return [
        line
        for number, (meaning, colour) in enumerate(meanings.items())
        for line in (
            f'<line x1="{MARGIN}" x2="{MARGIN + 28}" y1="{24 + 20 * number}" y2="{24 + 20 * number}" '
            f'stroke="{colour}" stroke-width="2"/>',
            f'<text x="{MARGIN + 38}" y="{28 + 20 * number}" font-size="12" fill="#1f2933">{meaning}</text>',
        )
    ]


def tables(rows: list[list[str]], inside: dict[str, list[Stop]]) -> Iterator[str]:
    """The Markdown under the picture: the ways' stops, and every room."""
    for way in WAYS:
        yield f"\n## The way of a {way}\n\n| | where | what happens |\n| --- | --- | --- |\n"
        passed = [stop for stops_there in inside.values() for stop in stops_there if stop.way == way]
        for stop in sorted(passed, key=lambda stop: stop.number):
            yield f"| {stop.number} | `{stop.place}` | {stop.does} |\n"
    yield "\n## The rooms\n\n| room | what is in it |\n| --- | --- |\n"
    for room in inside:
        docstring = ast.get_docstring(ast.parse(source_of(room).read_text(encoding="utf-8")))
        yield f"| `{room}` | {first_sentence(room, docstring)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the files are out of date")
    arguments = parser.parse_args()
    rows = layers()
    inside = stops([room for row in rows for room in row])
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    drawn = {PICTURE: draw(rows, inside), PAGE: before + BEGIN + "".join(tables(rows, inside)) + "\n" + END + after}
    for path, text in drawn.items():
        if arguments.check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path.relative_to(ROOT)} isn't what the code says. Draw it anew: make fix")
        if not arguments.check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
