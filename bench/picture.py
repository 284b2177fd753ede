"""A bar chart as SVG: medians as bars, the range as a line through the end of each, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from xml.sax.saxutils import escape

_WIDTH = 960
_LABELS = 300
"""Where the bars begin."""
_VALUES = 110
"""Room for the number behind the longest bar."""
_TOP, _ROW, _BAR, _BOTTOM = 64, 30, 16, 44
_LETTER = 7.2
"""At least the mean width of a letter at 13 px: a label that is longer than its room is cut."""
_STEPS = (1, 2, 5)

_STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 }
.faint { fill: #59636e; font-size: 12px }
.paper { fill: #ffffff }
.grid { stroke: #d1d9e0 }
.bar { fill: #8fa3b8 }
.ours { fill: #2f81c7 }
.range { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  .paper { fill: #0d1117 }
  .grid { stroke: #30363d }
  .bar { fill: #57687a }
  .ours { fill: #388bd6 }
  .range { stroke: #f0f6fc }
}"""


@dataclass(frozen=True)
class Bar:
    """One line of the chart."""

    label: str
    seconds: tuple[float, ...]
    why_not: str = ""
    """Shown instead of a bar when there are no times."""

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True)
class Scale:
    """Seconds to pixels, logarithmically, from `low` to `high`."""

    low: float
    high: float

    def x(self, seconds: float) -> float:
        part = math.log(seconds / self.low) / math.log(self.high / self.low)
        return _LABELS + part * (_WIDTH - _VALUES - _LABELS)

    def ticks(self) -> list[float]:
        """1, 2 and 5 in each power of ten between the ends, those included."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = [step * 10.0**power for power in powers for step in _STEPS]
        return [step for step in steps if self.low <= step * 1.001 and step <= self.high * 1.001]


def choose_scale(times: Sequence[float]) -> Scale:
    """From a step of 1-2-5 well below the shortest time, so that its bar is seen, to one that is not below the longest."""
    shortest, longest = (min(times), max(times)) if times else (1.0, 10.0)
    return Scale(low=_step(shortest / 2, up=False), high=_step(longest, up=True))


def _step(seconds: float, *, up: bool) -> float:
    power = math.floor(math.log10(seconds))
    steps = [step * 10.0 ** (power + more) for more in (0, 1) for step in _STEPS]
    return min(step for step in steps if step >= seconds) if up else max(step for step in steps if step <= seconds)


def draw(title: str, bars: Sequence[Bar]) -> str:
    """The SVG document."""
    scale = choose_scale([second for bar in bars for second in bar.seconds])
    height = _TOP + _ROW * len(bars) + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        f'<text class="title" x="16" y="28">{escape(title)}</text>',
        '<text class="faint" x="16" y="48">seconds, logarithmic; bar: median, line: range</text>',
        *_grid(scale, _TOP + _ROW * len(bars)),
    ]
    for number, bar in enumerate(bars):
        parts += _bar(bar, scale, _TOP + _ROW * number)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(scale: Scale, bottom: int) -> list[str]:
    parts = []
    for tick in scale.ticks():
        x = f"{scale.x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{bottom}"/>')
        parts.append(f'<text class="faint" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    return parts


def _bar(bar: Bar, scale: Scale, top: int) -> list[str]:
    middle = top + _ROW / 2
    parts = [_text(_LABELS - 10, middle, _cut(bar.label, _LABELS - 26), anchor="end")]
    if not bar.seconds:
        text = _cut(f"not measured: {bar.why_not}", _WIDTH - _LABELS - 16)
        return [*parts, _text(_LABELS + 6, middle, text, style="faint")]
    low, high = scale.x(min(bar.seconds)), scale.x(max(bar.seconds))
    width = scale.x(bar.median) - _LABELS
    style = "ours" if bar.label.startswith("our ") else "bar"
    parts += [
        f'<rect class="{style}" x="{_LABELS}" y="{middle - _BAR / 2:g}" width="{width:.1f}" height="{_BAR}" rx="2"/>',
        f'<line class="range" x1="{low:.1f}" y1="{middle:g}" x2="{high:.1f}" y2="{middle:g}"/>',
        _text(high + 8, middle, f"{bar.median:.2f} s"),
    ]
    return parts


def _text(x: float, middle: float, text: str, *, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{middle + 4.5:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(text: str, room: float) -> str:
    most = int(room / _LETTER)
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
