"""Draw the rooms of the three packages, and the imports between them, as docs/house-<package>.svg.

    python docs/draw_house.py            draw
    python docs/draw_house.py --check    fail where a committed picture is not what the code imports

A room is a file or a folder directly below its package. An arrow goes from a room to each room that it imports; the
arrows come from the code (grimp reads the imports of every file), so a picture shows the imports of today. An import of
a room that is also reached through another room is counted and named in the alternative text, and not drawn. Rooms
stand above all that they import: a room's floor is one more than the highest floor below it. An arrow that would run up
means a circle of imports, and ends the program.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

HERE = Path(__file__).parent
# The package, what its picture is called, and the folder whose rooms are shown.
PICTURES = {
    "memory_service": "The memory service",
    "memory_service.storage.local": "The local engine, inside the memory service",
    "model_worker": "The model worker",
    "kvbank": "The client SDK",
}
# Rooms that say nothing of the structure: generated stubs and the start of a module run as a program.
LEFT_OUT = frozenset({"v1", "__main__", "py.typed"})
WIDTH, ROOM_HEIGHT, GAP, FLOOR_HEIGHT, TOP = 1080, 46, 16, 104, 56
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; }
  .ground { fill: #ffffff; }
  .title { font-size: 18px; font-weight: 600; }
  .files { font-size: 11px; fill: #59636e; }
  .room, .folder { fill-opacity: 0.85; }
  .room { fill: #f6f8fa; stroke: #59636e; }
  .folder { fill: #ddf4ff; stroke: #0969da; }
  .arrow { fill: none; stroke: #8c959f; stroke-width: 1.2; marker-end: url(#head); }
  .next { stroke: #0969da; stroke-width: 1.8; }
  .head { fill: #8c959f; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; }
    text { fill: #e6edf3; }
    .files { fill: #9198a1; }
    .room { fill: #212830; stroke: #9198a1; }
    .folder { fill: #121d2f; stroke: #4493f8; }
    .arrow { stroke: #656c76; }
    .next { stroke: #4493f8; }
    .head { fill: #656c76; }
  }
"""


@dataclass(frozen=True)
class House:
    """The rooms of one package: how many files each has, which rooms each imports, and on which floor each stands."""

    files: Mapping[str, int]
    imports: Mapping[str, frozenset[str]]
    floors: Mapping[str, int]


def house(graph: grimp.ImportGraph, package: str) -> House:
    """Read the rooms of a package from the imports of its files. Errors: SystemExit for a circle of rooms."""
    rooms = sorted(child for child in graph.find_children(package) if _name(child) not in LEFT_OUT)
    inside = {room: {room, *graph.find_descendants(room)} for room in rooms}
    owner = {module: room for room, modules in inside.items() for module in modules}
    imports: dict[str, frozenset[str]] = {}
    for room in rooms:
        seen = {
            owner.get(other) for module in inside[room] for other in graph.find_modules_directly_imported_by(module)
        }
        imports[room] = frozenset(other for other in seen if other is not None and other != room)
    return House({room: len(inside[room]) for room in rooms}, imports, _floors(imports))


def _floors(imports: Mapping[str, frozenset[str]]) -> dict[str, int]:
    floors: dict[str, int] = {}
    left = dict(imports)
    while left:
        ready = [room for room, below in left.items() if below <= floors.keys()]
        if not ready:
            sys.exit(f"these rooms import each other in a circle: {', '.join(left)}")
        for room in ready:
            floors[room] = 1 + max((floors[other] for other in left[room]), default=-1)
        for room in ready:
            del left[room]
    return floors


def _rows(house: House) -> list[list[str]]:
    """Return the rooms of each floor, highest first, ordered so that rooms stand near those that they import."""
    rows = [
        [room for room in house.files if house.floors[room] == floor] for floor in range(max(house.floors.values()) + 1)
    ]
    place = {room: index / max(len(row) - 1, 1) for row in rows for index, room in enumerate(row)}
    users = {room: [other for other, below in house.imports.items() if room in below] for room in house.files}
    for _ in range(8):
        for near, order in ((house.imports, rows), (users, rows[::-1])):
            for row in order:
                wanted = {room: _mean([place[other] for other in near[room]], place[room]) for room in row}
                row.sort(key=lambda room: (wanted[room], room))
                for index, room in enumerate(row):
                    place[room] = (index + 1) / (len(row) + 1)
    return rows[::-1]


def _mean(values: list[float], otherwise: float) -> float:
    # Exact, so that a picture does not vary with the order of a set, which is another one in each process.
    return math.fsum(values) / len(values) if values else otherwise


def picture(title: str, house: House) -> str:
    """Return an SVG with a row a floor; arrows to the floor directly below are drawn stronger than longer ones."""
    rows = _rows(house)
    height = TOP + len(rows) * FLOOR_HEIGHT
    boxes: dict[str, tuple[float, float, float]] = {}  # middle, top, width
    for index, row in enumerate(rows):
        wide = min(210.0, WIDTH / (len(row) + 1) - GAP)
        for place, room in enumerate(row):
            boxes[room] = ((place + 1) * WIDTH / (len(row) + 1), TOP + index * FLOOR_HEIGHT, wide)
    direct = _direct(house.imports)
    arrows, drawn = (sum(map(len, some.values())) for some in (house.imports, direct))
    about = f"{len(boxes)} rooms, {len(rows)} floors; {arrows} imports, all downwards; "
    about += f"{drawn} drawn, without those also reached through others."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">',
        f'<title id="t">{escape(title)}</title>',
        f'<desc id="d">{escape(about + " " + _in_words(house))}</desc>',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        # The ground is drawn, because a page may be dark where the browser's colour scheme is light.
        f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{GAP}" y="28">{escape(title)}</text>',
        f'<text class="files" x="{WIDTH - GAP}" y="28" text-anchor="end">{escape(about)}</text>',
    ]
    for room, below in direct.items():
        lines += [
            _arrow(boxes[room], boxes[other], house.floors[room] - house.floors[other]) for other in sorted(below)
        ]
    lines += [_box(room, house.files[room], boxes[room]) for room in boxes]
    return "\n".join([*lines, "</svg>", ""])


def _direct(imports: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Leave out each import of a room that the room reaches through another one as well."""
    reached: dict[str, frozenset[str]] = {}

    def below(room: str) -> frozenset[str]:
        if room not in reached:
            reached[room] = imports[room].union(*map(below, imports[room]))
        return reached[room]

    return {room: some - frozenset().union(*map(below, some)) for room, some in imports.items()}


def _in_words(house: House) -> str:
    said = [
        f"{_name(room)} imports {', '.join(map(_name, sorted(below)))}."
        for room, below in sorted(house.imports.items())
        if below
    ]
    return " ".join(said)


def _name(room: str) -> str:
    return room.rpartition(".")[2]


def _arrow(start: tuple[float, float, float], end: tuple[float, float, float], floors: int) -> str:
    x, y, to_x, to_y = start[0], start[1] + ROOM_HEIGHT, end[0], end[1]
    bend = (to_y - y) / 2
    kind = "arrow next" if floors == 1 else "arrow"
    curve = f"M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
    return f'<path class="{kind}" d="{curve}"/>'


def _box(room: str, files: int, box: tuple[float, float, float]) -> str:
    middle, top, wide = box
    folder = files > 1
    name = escape(_name(room)) + ("/" if folder else "")
    said = f"{files} files" if folder else "one file"
    return (
        f'<rect class="{"folder" if folder else "room"}" x="{middle - wide / 2:.0f}" y="{top:.0f}" width="{wide:.0f}" '
        f'height="{ROOM_HEIGHT}" rx="6"/>'
        f'<text x="{middle:.0f}" y="{top + 20:.0f}" text-anchor="middle">{name}</text>'
        f'<text class="files" x="{middle:.0f}" y="{top + 36:.0f}" text-anchor="middle">{said}</text>'
    )


def main() -> int:
    """Draw or check all pictures, and return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail where a picture is out of date")
    check = options.parse_args().check
    graph = grimp.build_graph("memory_service", "model_worker", "kvbank", cache_dir=None)
    stale = []
    for package, title in PICTURES.items():
        path = HERE / f"house-{package.replace('.', '-')}.svg"
        drawn = picture(title, house(graph, package))
        if check:
            stale += [path.name] if not path.exists() or path.read_text(encoding="utf-8") != drawn else []
        else:
            path.write_text(drawn, encoding="utf-8")
    if stale:
        print(f"not what the code imports now: {', '.join(stale)}; run: python docs/draw_house.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
