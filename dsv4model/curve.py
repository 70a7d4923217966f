"""A run's losses as a picture: SVG, by hand.  Knows nothing of training but lines of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 70, 150, 40, 50
_SERIES = (
    ("loss", "loss", "#1f6feb"),
    ("mtp_loss", "MTP loss", "#d29922"),
    ("eval_loss", "loss, unseen", "#2da44e"),
    ("indexer", "indexer KL", "#8250df"),
    ("indexer_uniform", "uniform KL", "#8c959f"),
)
_MOST_POINTS = 1000


def svg(lines: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Losses over steps. lines: of metrics.jsonl, at least one"""
    series = [
        (label, color, [(line["step"], line[key]) for line in lines if _is_number(line.get(key))])
        for key, label, color in _SERIES
    ]
    series = [
        (label, color, _thinned(points)) for label, color, points in series if any(y for _, y in points)
    ]
    most_x = max([line["step"] for line in lines] + [1])
    values = [y for _, _, points in series for _, y in points] or [0.0, 1.0]
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _RIGHT) * (x - 1) / max(1, most_x - 1)
        up = (_HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="16">{_escaped(title)}</text>',
    ]
    for tick in ticks:
        x, y = at(1, tick)
        made.append(f'<line x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        made.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in sorted({1, most_x, *(round(most_x * part / 4) or 1 for part in (1, 2, 3))}):
        x, y = at(tick, low)
        made.append(f'<text x="{x}" y="{y + 20}" text-anchor="middle">{tick:,}</text>')
    made.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">step</text>'
    )
    for number, (label, color, points) in enumerate(series):
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in points))
        made.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(points) == 1:
            x, y = at(*points[0])
            made.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        y = _TOP + 20 * number + 10
        made.append(
            f'<text x="{_WIDTH - _RIGHT + 12}" y="{y}" fill="{color}">{label} {points[-1][1]:.4g}</text>'
        )
    return "\n".join([*made, "</svg>\n"]).encode()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points; the last one stays."""
    every = max(1, len(points) // _MOST_POINTS)
    return points[::every] + ([points[-1]] if points and (len(points) - 1) % every else [])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below the lowest to above the highest."""
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
