"""Charts of a report as inline SVG: no script, colours by class, text in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from lora_edge.reports.words import Case, number

_WIDTH, _HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 14, 50
_LANE = 84  # for cases without an effect, such as those without an adapter
_GAP = 22  # from there to the first decade, so that the labels below do not touch
_DECADES = 6  # labelled ones, at most, beside the first
_NAMED, _LONGEST, _APART = 3, 16, 17  # names in the chart: how many, characters, units apart
_SIDES = {True: "end", False: "start"}


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis over whole decades; every ``step``-th is labelled, with both ends."""

    low: int
    high: int
    step: int
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        high = max(high, low + 1)
        step = math.ceil((high - low) / _DECADES)
        return _Axis(low, low + step * math.ceil((high - low) / step), step, start, end)

    def at(self, value: float) -> float:
        return self.at_power(math.log10(value))

    def at_power(self, power: float) -> float:
        """The place of ten to this power, which may be no float."""
        return self.start + (power - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def decades(self) -> list[int]:
        return list(range(self.low, self.high + 1, self.step))


def effect_chart(cases: Sequence[Case]) -> str:
    """Error (upwards) against effect (to the right), with each case's floor and limit; or nothing.

    Args:
        cases: of a report; those without finite figures are left out.
    """
    shown = [case for case in cases if drawn(case)]
    if not shown:
        return ""
    errors = [value for case in shown for value in _heights(case)]
    effects = [case["figures"]["effect_max"] for case in shown if case["figures"]["effect_max"] > 0]
    foot, lane = _HEIGHT - _BOTTOM, _LEFT + _LANE / 2
    y = _Axis.over(errors, foot, _TOP)
    x = _Axis.over(effects or [1.0], _LEFT + _LANE + _GAP, _WIDTH - _RIGHT)
    bad = sum(case["status"] != "passed" for case in shown)
    lines = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="effect-title '
        'effect-desc"><title id="effect-title">Error of a logit against the effect of the adapter, '
        "on logarithmic axes</title>",
        f'<desc id="effect-desc">{len(shown)} cases, each with its noise floor and its limit: '
        f"{len(shown) - bad} passed, {bad} did not. Largest errors from "
        f"{number(min(c['figures']['logit_error'] for c in shown))} to "
        f"{number(max(c['figures']['logit_error'] for c in shown))}. The figures are in the table "
        "of every case.</desc>",
        f'<rect class="lane" x="{_LEFT}" y="{_TOP}" width="{_LANE}" height="{foot - _TOP}"/>',
    ]
    for decade in y.decades:
        at = y.at_power(decade)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_level(at)}/>')
        lines.append(_text("tick", _LEFT - 7, at + 4, _power(decade), "end"))
    for decade in x.decades if effects else []:
        at = x.at_power(decade)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{foot}"/>')
        anchor = "end" if at > _WIDTH - 2 * _RIGHT else "middle"
        lines.append(_text("tick", at, foot + 18, _power(decade), anchor))
    lines += [
        _text("tick", lane, foot + 18, "no effect", "middle"),
        _text("axis", (x.start + x.end) / 2, _HEIGHT - 8, "largest effect on a logit", "middle"),
        f'<text class="axis" transform="translate(17 {(_TOP + foot) / 2:.1f}) rotate(-90)" '
        'text-anchor="middle">largest error of a logit</text>',
    ]
    spread = _spread(len(shown) - len(effects))
    named: dict[str, list[tuple[float, float]]] = {}
    # What did not pass is drawn last, on top.
    for case in sorted(shown, key=lambda case: case["status"] != "passed"):
        effect = case["figures"]["effect_max"]
        at = x.at(effect) if effect > 0 else lane + next(spread)
        lines += _stem(case, at, y)
        if case["status"] != "passed" and len(case["adapters"]) == 1:
            named.setdefault(case["adapters"][0], []).append((at, y.at(_heights(case)[0])))
    return "".join([*lines, *_names(named), "</svg>"])


def drawn(case: Case) -> bool:
    """Whether a case has a place in the chart: it has figures, and they are finite."""
    figures, limits = case["figures"], case["limits"]
    if not figures or not limits:
        return False
    values = (figures["logit_error"], figures["effect_max"], limits["logit_floor"], limits["logit"])
    return None not in values and limits["logit_floor"] > 0


def _names(marks: dict[str, list[tuple[float, float]]]) -> Iterator[str]:
    """Who did not pass, beside their marks, none on top of another; nothing where it is many."""
    if len(marks) > _NAMED:
        return
    level = 0.0
    for name, places in sorted(marks.items(), key=lambda item: min(y for _, y in item[1])):
        left = min(places)[0] > _WIDTH / 2
        at, height = min(places) if left else max(places)
        level = max(height + 4, level + _APART)
        short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
        yield _text("name", at - 11 if left else at + 11, level, escape(short), _SIDES[left])


def _text(style: str, x: float, y: float, inner: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{inner}</text>'


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


def _level(at: float) -> str:
    return f'y1="{at:.1f}" y2="{at:.1f}"'


def _power(decade: int) -> str:
    if -2 <= decade <= 3:
        return f"{10.0**decade:g}"
    return f'10<tspan dy="-.4em" font-size="75%">{decade}</tspan>'.replace(">-", ">−")
