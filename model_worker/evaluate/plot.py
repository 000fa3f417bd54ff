"""A line plot as SVG, so that figures in the docs come from a command without a plotting library."""

from collections.abc import Mapping, Sequence

_COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#b279a2",
    "#9d755d",
    "#bab0ac",
    "#eeca3b",
    "#ff9da6",
)
_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 420, 60, 60


def lines(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]], level: dict[str, float]
) -> str:
    """One line a series of `(x, y)`, points marked; `level`: named horizontal lines."""
    right, bottom = _WIDTH - 230, _HEIGHT - 50
    xs = [x for points in series.values() for x, _ in points]
    ys = [*(y for points in series.values() for _, y in points), *level.values()]
    low, high = min(ys), max(ys)
    margin = 0.05 * (high - low or 1.0)
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / (max(xs) - min(xs) or 1.0)
        return _LEFT + across * (right - _LEFT), bottom - (y - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"',
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{title}</text>',
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{x_label}</text>',
        f'<text x="14" y="{_TOP - 8}">{y_label}</text>',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    for x in sorted(set(xs)):
        parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for step in range(6):
        y = low + (high - low) * step / 5
        parts.append(f'<text x="{_LEFT - 6}" y="{at(min(xs), y)[1] + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    for name, y in level.items():
        height = at(min(xs), y)[1]
        parts.append(f'<path d="M{_LEFT} {height:.1f}H{right}" stroke="grey" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{right - 4}" y="{height - 4:.1f}" text-anchor="end" fill="grey">{name}</text>')
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        places = [at(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts.append(f'<text x="{right + 14}" y="{_TOP + 16 + 16 * index}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
