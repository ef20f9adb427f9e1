"""Charts of a report as inline SVG: no script, colours by class, text in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lora_edge.reports.words import Case, number

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 14, 46
_LANE = 82  # for cases without an adapter, which have no effect


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis over whole decades."""

    low: int
    high: int
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return _Axis(low, max(high, low + 1), start, end)

    def at(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    @property
    def decades(self) -> list[int]:
        step = max(1, math.ceil((self.high - self.low) / 6))
        return list(range(self.low, self.high + 1, step))


def effect_chart(cases: Sequence[Case]) -> str:
    """Error (upwards) against effect (to the right), with each case's floor and limit; or nothing.

    Args:
        cases: of a report; those without finite figures are left out.
    """
    shown = [case for case in cases if case["figures"] and case["limits"] and _finite(case)]
    if not shown:
        return ""
    errors = [value for case in shown for value in _heights(case)]
    effects = [case["figures"]["effect_max"] for case in shown if case["figures"]["effect_max"] > 0]
    y = _Axis.over(errors, _HEIGHT - _BOTTOM, _TOP)
    x = _Axis.over(effects or [1.0], _LEFT + _LANE, _WIDTH - _RIGHT)
    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="effect-title">',
        '<title id="effect-title">Logit error against the effect of the adapter, each case with '
        "its noise floor and its limit, on logarithmic axes</title>",
    ]
    for decade in y.decades:
        at = y.at(10.0**decade)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_level(at)}/>')
        lines.append(f'<text class="tick" x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">')
        lines.append(f"{_power(decade)}</text>")
    foot = _HEIGHT - _BOTTOM
    if effects:
        for decade in x.decades:
            at = x.at(10.0**decade)
            lines.append(
                f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{foot}"/>'
            )
            lines.append(f'<text class="tick" x="{at:.1f}" y="{foot + 17}" text-anchor="middle">')
            lines.append(f"{_power(decade)}</text>")
    lane = _LEFT + _LANE / 2
    lines += [
        f'<text class="tick" x="{lane:.1f}" y="{foot + 17}" text-anchor="middle">no adapter</text>',
        f'<text class="axis" x="{(x.start + x.end) / 2:.1f}" y="{_HEIGHT - 8}" '
        'text-anchor="middle">largest effect on a logit</text>',
        f'<text class="axis" transform="translate(13 {(_TOP + foot) / 2:.1f}) rotate(-90)" '
        'text-anchor="middle">largest error of a logit</text>',
    ]
    # What did not pass is drawn last, on top.
    order = sorted(shown, key=lambda case: case["status"] != "passed")
    spread = _spread(len([c for c in shown if not c["figures"]["effect_max"] > 0]))
    for case in order:
        effect = case["figures"]["effect_max"]
        at = x.at(effect) if effect > 0 else lane + next(spread)
        lines += _stem(case, at, y)
    return "".join([*lines, "</svg>"])


def _stem(case: Case, at: float, y: _Axis) -> list[str]:
    error, floor, limit = _heights(case)
    top, bottom, dot = y.at(limit), y.at(floor), y.at(error)
    label = (
        f"{case['name']}, {case['session']}: error {number(case['figures']['logit_error'])}, floor "
        f"{number(floor)}, limit {number(limit)}, effect {case['figures']['effect_max']:.3g}"
    )
    shape = f'<circle cx="{at:.1f}" cy="{dot:.1f}" r="4"/>'
    if case["status"] != "passed":  # not by colour alone
        shape = f'<path d="M{at - 5:.1f} {dot - 5:.1f}l10 10m0 -10l-10 10" class="cross"/>'
    return [
        f'<g class="{case["status"]}"><title>{escape(label)}</title>',
        f'<line class="stem" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>',
        f'<line class="limit" x1="{at - 6:.1f}" x2="{at + 6:.1f}" {_level(top)}/>',
        f'<line class="floor" x1="{at - 4:.1f}" x2="{at + 4:.1f}" {_level(bottom)}/>',
        f"{shape}</g>",
    ]


def _spread(count: int) -> Iterator[float]:
    """Places within the lane, so that cases without an effect do not hide each other."""
    step = min(8.0, (_LANE - 18) / max(1, count - 1))
    yield from ((index - (count - 1) / 2) * step for index in range(count))


def _heights(case: Case) -> tuple[float, float, float]:
    """Error, floor, limit; an error of zero is drawn at a tenth of the floor."""
    floor, limit = case["limits"]["logit_floor"], case["limits"]["logit"]
    return max(case["figures"]["logit_error"], floor / 10), floor, limit


def _finite(case: Case) -> bool:
    figures, limits = case["figures"], case["limits"]
    values = (figures["logit_error"], figures["effect_max"], limits["logit_floor"], limits["logit"])
    return None not in values and limits["logit_floor"] > 0


def _level(at: float) -> str:
    return f'y1="{at:.1f}" y2="{at:.1f}"'


def _power(decade: int) -> str:
    if -2 <= decade <= 3:
        return f"{10.0**decade:g}"
    return f'10<tspan dy="-5" font-size="9">{decade}</tspan>'.replace(">-", ">−")
