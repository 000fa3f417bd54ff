"""Draw docs/scale.svg, which shows who calls whom where several services share a database and a bucket.

    python docs/draw_scale.py            draw
    python docs/draw_scale.py --check    fail where the committed picture is another one

Its colours are those of the pictures of the rooms (`draw_house`).
"""

import argparse
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

from draw_house import STYLE

PATH = Path(__file__).with_name("scale.svg")
WIDTH, HEIGHT, TITLE = 1080, 560, "Several services on one store"
OWN = """
  .kept { fill: #fff8c5; stroke: #9a6700; fill-opacity: 0.85; }
  .said { font-size: 12px; fill: #59636e; }
  .plate { fill: #ffffff; }
  @media (prefers-color-scheme: dark) {
    .kept { fill: #272115; stroke: #d29922; }
    .said { fill: #9198a1; }
    .plate { fill: #0d1117; }
  }
"""


class Box(NamedTuple):
    """A rectangle with lines of text, the first one larger; `kind` is the class of its look."""

    kind: str
    x: int
    y: int
    width: int
    height: int
    lines: tuple[str, ...]

    def draw(self) -> list[str]:
        """Return the elements of the box."""
        middle, top = self.x + self.width // 2, self.y + self.height // 2 - 8 * len(self.lines) + 13
        shape = (
            f'<rect class="{self.kind}" x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}" rx="6"/>'
        )
        texts = [
            f'<text{" class=" + chr(34) + "files" + chr(34) if number else ""} x="{middle}" y="{top + 17 * number}"'
            f' text-anchor="middle">{escape(line)}</text>'
            for number, line in enumerate(self.lines)
        ]
        return [shape, *texts]


class Arrow(NamedTuple):
    """A line from one point to another, with words at its middle, or at `at`."""

    start: tuple[int, int]
    end: tuple[int, int]
    words: str = ""
    at: tuple[int, int] | None = None
    kind: str = "arrow next"

    def draw(self) -> list[str]:
        """Return the elements of the line."""
        (x, y), (to_x, to_y) = self.start, self.end
        bend = (to_y - y) // 2
        curve = f"M{x} {y} C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}" if bend else f"M{x} {y} L{to_x} {to_y}"
        return [f'<path class="{self.kind}" d="{curve}"/>']

    def label(self) -> list[str]:
        """Return the words, on a plate that hides the lines behind them."""
        if not self.words:
            return []
        x, y = self.at or ((self.start[0] + self.end[0]) // 2, (self.start[1] + self.end[1]) // 2)
        wide = 6.3 * len(self.words) + 8
        return [
            f'<rect class="plate" x="{x - wide / 2:.0f}" y="{y - 13}" width="{wide:.0f}" height="18"/>',
            f'<text class="said" x="{x}" y="{y}" text-anchor="middle">{escape(self.words)}</text>',
        ]


CALLERS = [Box("room", 60 + 270 * n, 60, 210, 46, (name,)) for n, name in enumerate(("worker", "worker", "client"))]
BALANCER = Box("room", 60, 166, 750, 46, ("balancer", "each call to the service with the fewest"))
SERVICES = [
    Box("folder", 60 + 270 * n, 272, 210, 70, ("service", "answers any call", "indexes of banks in use"))
    for n in range(3)
]
CACHES = [Box("room", 95 + 270 * n, 352, 140, 32, ("cache on its disk",)) for n in range(3)]
DATABASE = Box("kept", 60, 464, 345, 70, ("PostgreSQL", "all rows, embeddings, the log of changes", "with a standby"))
BUCKET = Box("kept", 465, 464, 345, 70, ("bucket", "the K-V of each chunk, an object", "made once, read by ranges"))
WATCHING = [
    Box("room", 880, 284, 160, 46, ("Prometheus", "figures and alerts")),
    Box("room", 880, 60, 160, 46, ("Grafana", "the dashboard")),
]
BOXES = [*CALLERS, BALANCER, *SERVICES, *CACHES, DATABASE, BUCKET, *WATCHING]
CENTRES = [165 + 270 * n for n in range(3)]
ARROWS = [
    *(Arrow((x, 106), (x, 166)) for x in CENTRES),
    *(Arrow((x, 212), (x, 272)) for x in CENTRES),
    *(Arrow((x - 85, 342), (110 + 120 * n, 464)) for n, x in enumerate(CENTRES)),
    *(Arrow((x + 85, 342), (520 + 120 * n, 464)) for n, x in enumerate(CENTRES)),
    Arrow((880, 307), (810, 307), kind="arrow"),
    Arrow((960, 106), (960, 284), kind="arrow"),
]
LABELS = [
    Arrow((0, 0), (0, 0), "gRPC over TLS, each caller with its key", (435, 141)),
    Arrow((0, 0), (0, 0), "gRPC over TLS; /readyz says who is well", (435, 247)),
    Arrow((0, 0), (0, 0), "a write locks the row of its bank", (200, 432)),
    Arrow((0, 0), (0, 0), "the object first, then the row", (680, 432)),
]


def picture() -> str:
    """Return the picture as SVG."""
    about = (
        "Workers and clients call a balancer, which gives each call to one of three services. All services read and"
        " write the same PostgreSQL database and the same bucket; each has a cache on its own disk. Prometheus reads"
        " the figures of each service, and Grafana shows them."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(TITLE)}</title>',
            f'<desc id="d">{escape(about)}</desc>',
            f"<style>{STYLE}{OWN}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            # The ground is drawn, because a page may be dark where the browser's colour scheme is light.
            f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
            f'<text class="title" x="16" y="28">{escape(TITLE)}</text>',
            *(line for arrow in ARROWS for line in arrow.draw()),
            *(line for label in LABELS for line in label.label()),
            *(line for box in BOXES for line in box.draw()),
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Draw or check the picture, and return the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail where the picture is another one")
    drawn = picture()
    if not options.parse_args().check:
        PATH.write_text(drawn, encoding="utf-8")
    elif PATH.read_text(encoding="utf-8") != drawn:
        print("docs/scale.svg is not what is drawn now; run: python docs/draw_scale.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
