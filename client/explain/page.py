"""The page: one HTML file that runs nothing, loads nothing, and shows every text as text."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from client.explain.facts import Curve, Found
from client.explain.image import ImageExplanation, overlay
from client.explain.numbers import NumbersExplanation
from client.explain.series import SeriesExplanation
from client.explain.text import TextExplanation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Case", "Explanation", "page"]

Explanation = TextExplanation | NumbersExplanation | ImageExplanation | SeriesExplanation

_LEVELS: Final = 8
_FAINT: Final = 0.04
_ANSWERS: Final = 12
_WORDS: Final = 12
_ROWS: Final = 40
_HOURS: Final = 168
_UNREAD: Final = 2000

# Okabe and Ito (2008): told apart by the colour-blind; a line under the word says it once more.
_RAISES, _LOWERS = (213, 94, 0), (0, 114, 178)

# What HTML forbids, and what changes the direction of the text around it.
_UNPRINTABLE: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Case:
    """One record of the file and its explanation."""

    line: int
    patient: str | None
    explanation: Explanation


def page(cases: Iterable[Case]) -> Iterator[str]:
    """The page, piece by piece; it holds patients' data.

    Guarantee: no script, no address, no style but its own (its policy forbids the browser to run
        or load any other); whatever stands in a record, a name or a label is text.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Why the model answers so</title>\n<style>{style}</style>\n</head>\n<body>\n"
        "<h1>Why the model answers so</h1>\n"
        '<p class="keep">This page holds patients\' data. It was made on this machine and sent '
        "nowhere; keep it as you keep the records.</p>\n"
        '<p>Parts that <span class="p6">raise</span> the explained score are orange and '
        'underlined, parts that <span class="n6">lower</span> it blue and dotted; the darker, the '
        "more, within one record.</p>\n"
    )
    gains, gaps, count = [], 0, 0
    for case in cases:
        count += 1
        gains.append(case.explanation.found.curve.gain)
        gaps += not case.explanation.found.balance.complete
        yield _section(case)
    yield _summary(count, gains, gaps) + _NOT + "</body>\n</html>\n"


_NOT: Final = """\
<section id="not"><h2>What an explanation is not</h2>
<ul>
<li>It tells what this model used, not what is true of the patient, and not what caused it.</li>
<li>It does not say that the answer is right. A wrong answer has an explanation, too, and it may
look convincing.</li>
<li>It compares the record with a blank one, named above; another blank gives other figures.</li>
<li>Parts act together ("no" and "fever"): dividing an effect among them is a convention.</li>
<li>A part without colour may matter where another one is missing.</li>
<li>The faithfulness curve blanks parts, which makes records that nobody would write; it shows
that the order is better than chance, not that it is the best.</li>
</ul></section>
"""


def _summary(count: int, gains: Sequence[float], gaps: int) -> str:
    mean = sum(gains) / max(len(gains), 1)
    better = sum(gain > 0 for gain in gains)
    return (
        f'<section id="all"><h2>All {count} records</h2><p>The order of the attributions beat '
        f"random orders in {better} of {count} records, on average by {mean:.3f}. The attributions "
        f"of {gaps} records do not add up.</p></section>\n"
    )


# ------------------------------------------------------------------------ one record


def _section(case: Case) -> str:
    found = case.explanation.found
    patient = "" if case.patient is None else f", patient {_text(case.patient)}"
    return (
        f'<section id="line-{case.line}"><h2>Line {case.line}{patient}</h2>\n'
        + _answer(found)
        + _body(case.explanation)
        + _balance(found)
        + _curve(found.curve, found.explained)
        + "</section>\n"
    )


def _body(explanation: Explanation) -> str:
    if isinstance(explanation, TextExplanation):
        return _note(explanation)
    if isinstance(explanation, NumbersExplanation):
        return _numbers(explanation)
    if isinstance(explanation, ImageExplanation):
        return _images(explanation)
    return _series(explanation)


def _answer(found: Found) -> str:
    rows: list[tuple[str, str]] = []
    for name, told in found.answer.items():
        if isinstance(told, dict):
            ranked = sorted(told.items(), key=lambda item: -item[1])
            shown = ranked if name == "survival" else ranked[:_ANSWERS]
            rows += [(label, f"{share:.3f}") for label, share in shown]
            if len(shown) < len(ranked):
                rest = sum(share for _, share in ranked[len(shown) :])
                rows.append((f"{len(ranked) - len(shown)} others together", f"{rest:.3f}"))
        elif isinstance(told, float):
            rows.append((name, f"{told:.4g}"))
    cells = "".join(
        f'<tr{" class=this" if label == found.explained else ""}><th scope="row">{_text(label)}'
        f"</th><td>{share}</td></tr>"
        for label, share in rows
    )
    return (
        f"<p>Explained: <strong>{_text(found.explained)}</strong>, in {_text(found.unit)}.</p>\n"
        f'<table class="answer"><caption>Answer</caption>{cells}</table>\n'
    )


def _balance(found: Found) -> str:
    sums = found.balance
    verdict = "they add up" if sums.complete else "they do NOT add up: do not rely on them"
    return (
        f'<p class="method">Method: {_text(sums.method)} {sums.steps}, compared with '
        f"{_text(found.blank)}. Score {sums.score:+.3f}, of the blank {sums.baseline:+.3f}, "
        f"difference {sums.difference:+.3f}; attributions together {sums.total:+.3f}, gap "
        f"{sums.gap:.3f}: {verdict}.</p>\n"
    )


# ------------------------------------------------------------------------ text


def _note(explanation: TextExplanation) -> str:
    note = explanation.note
    level = _levels(explanation.values)
    pieces, at = [], 0
    for (first, last), value, shade in zip(
        note.words.tolist(), explanation.values, level, strict=True
    ):
        if last > note.end:
            break
        if not shade:
            continue
        pieces.append(_text(note.text[at:first]))
        word = _text(note.text[first:last])
        pieces.append(f'<mark class="{shade}" title="{value:+.3f}">{word}</mark>')
        at = last
    pieces.append(_text(note.text[at : note.end]))
    unread = note.text[note.end :]
    if unread.strip():
        pieces.append(f'<span class="unread">{_text(unread[:_UNREAD])}</span>')
    more = len(unread) - _UNREAD
    tail = f"<p>{more} further characters are not shown.</p>\n" if more > 0 else ""
    if unread.strip():
        tail += "<p>What is gray and struck out lies beyond what the model reads.</p>\n"
    if len(note.rows) > 1:
        tail += f"<p>Read in {len(note.rows)} windows.</p>\n"
    rows = [
        (word if times == 1 else f"{word} ({times} times)", value)
        for word, times, value in explanation.strongest(_WORDS)
    ]
    return f'<p class="note" dir="auto">{"".join(pieces)}</p>\n{tail}{_bars("Words", rows)}'


# ------------------------------------------------------------------------ numbers


def _numbers(explanation: NumbersExplanation) -> str:
    order = abs(explanation.values).argsort(kind="stable")[::-1]
    rows = [
        (f"{explanation.names[at]}: {explanation.shown[at]}", float(explanation.values[at]))
        for at in order[:_ROWS]
    ]
    left = len(order) - len(rows)
    tail = f"<p>{left} features with smaller attributions are not shown.</p>\n" if left else ""
    notes = "".join(f"<li>{_text(note)}</li>" for note in explanation.notes)
    if notes:
        tail += f"<ul>{notes}</ul>\n"
    return _bars("Features", rows) + tail


def _bars(caption: str, rows: Sequence[tuple[str, float]]) -> str:
    most = max((abs(value) for _, value in rows), default=0.0) or 1.0
    lines = []
    for name, value in rows:
        wide = 50 * abs(value) / most
        left = 50 if value > 0 else 50 - wide
        fill = _hex(_RAISES if value > 0 else _LOWERS)
        lines.append(
            f'<tr><th scope="row">{_text(name)}</th><td>{value:+.3f}</td><td>'
            '<svg viewBox="0 0 100 6" width="200" height="12" aria-hidden="true">'
            f'<rect x="{left:.1f}" y="0" width="{wide:.1f}" height="6" fill="{fill}"/>'
            '<rect x="49.8" y="0" width="0.4" height="6" fill="#444"/></svg></td></tr>'
        )
    body = "".join(lines)
    return f'<table class="bars"><caption>{_text(caption)}</caption>{body}</table>\n'


# ------------------------------------------------------------------------ images


def _images(explanation: ImageExplanation) -> str:
    shown: list[tuple[str, NDArray[np.float64] | None]] = [
        ("the image as the model is given it", None),
        ("integrated gradients: orange raises, blue lowers", explanation.values),
    ]
    if explanation.cam is not None:
        shown.append(("Grad-CAM: where the last maps raise the score", explanation.cam))
    figures = "".join(
        f'<figure><img alt="{told}" src="data:image/png;base64,'
        f'{base64.b64encode(overlay(explanation.picture, heat)).decode()}">'
        f"<figcaption>{told}</figcaption></figure>"
        for told, heat in shown
    )
    tail = ""
    if explanation.cam_curve is not None:
        gain = explanation.cam_curve.gain
        tail = f"<p>Grad-CAM's order against random ones: {gain:+.3f} (above 0 is better).</p>\n"
    return f'<div class="images">{figures}</div>\n{tail}'


# ------------------------------------------------------------------------ series


def _series(explanation: SeriesExplanation) -> str:
    grid, values = explanation.grid, explanation.values
    names = grid.names
    total = explanation.by_measurement
    strength = abs(values).sum(axis=0)
    order = [int(at) for at in strength.argsort(kind="stable")[::-1][:_ROWS] if strength[at] > 0]
    hours = min(len(values), _HOURS)
    level = _levels(values.reshape(-1))
    wide = values.shape[1]
    head = "".join(f'<th scope="col">{hour}</th>' for hour in range(hours))
    lines = []
    for feature in order:
        cells = []
        for hour in range(hours):
            measured = grid.values[hour, feature]
            if measured != measured:  # noqa: PLR0124 - NaN: nothing was measured
                cells.append("<td></td>")
                continue
            shade = level[hour * wide + feature]
            told = f"{measured:.5g}; {values[hour, feature]:+.3f}"
            cells.append(f'<td class="m {shade}" title="{told}"></td>')
        lines.append(
            f'<tr><th scope="row">{_text(names[feature])} {total[feature]:+.3f}</th>'
            f"{''.join(cells)}</tr>"
        )
    by_hour = explanation.by_hour
    strongest = [int(at) for at in abs(by_hour).argsort(kind="stable")[::-1][:_WORDS]]
    rows = [(f"hour {hour}", float(by_hour[hour])) for hour in sorted(strongest) if by_hour[hour]]
    cut = f"<p>Hours from {hours} on are not shown.</p>\n" if hours < len(values) else ""
    return (
        '<div class="wide"><table class="grid"><caption>Measurements by hour; a value counts at '
        "the hour in which it was measured, also where it is carried forward</caption>"
        f'<thead><tr><th scope="col">measurement</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n{cut}{_bars('Hours', rows)}"
    )


# ------------------------------------------------------------------------ parts


def _curve(curve: Curve, explained: str) -> str:
    low = min(0.0, *curve.ours, *curve.random)
    high = max(1.0 if low == 0 else 0.0, *curve.ours, *curve.random)
    span = (high - low) or 1.0

    def line(heights: Sequence[float]) -> str:
        return " ".join(
            f"{40 + 250 * x:.1f},{130 - 115 * (y - low) / span:.1f}"
            for x, y in zip(curve.removed, heights, strict=True)
        )

    told = (
        f"{explained} while parts are blanked: area {curve.area:.3f} in the order of the "
        f"attributions, {curve.random_area:.3f} in random order"
    )
    verdict = "better than chance" if curve.gain > 0 else "NOT better than chance"
    return (
        f'<figure><svg viewBox="0 0 310 165" width="420" role="img" aria-label="{_text(told)}">'
        '<path d="M40 15V130H290" fill="none" stroke="#444"/>'
        f'<text x="36" y="19" text-anchor="end">{high:.3g}</text>'
        f'<text x="36" y="133" text-anchor="end">{low:.3g}</text>'
        '<text x="40" y="145">0 %</text><text x="290" y="145" text-anchor="end">100 % blanked'
        "</text>"
        f'<polyline points="{line(curve.random)}" fill="none" stroke="#666" '
        'stroke-dasharray="4 3" stroke-width="1.5"/>'
        f'<polyline points="{line(curve.ours)}" fill="none" stroke="{_hex(_LOWERS)}" '
        'stroke-width="2"/></svg>'
        f"<figcaption>Faithfulness. {_text(told)} (dashed): {verdict}.</figcaption></figure>\n"
    )


def _levels(values: NDArray[np.float64]) -> list[str]:
    """A class for each value: p1 to p8 where it raises, n1 to n8 where it lowers, or none."""
    most = float(abs(values).max()) if len(values) else 0.0
    found = []
    for value in values.tolist():
        part = abs(value) / most if most > 0 else 0.0
        level = max(1, min(_LEVELS, round(part * _LEVELS)))
        found.append("" if part < _FAINT else f"{'p' if value > 0 else 'n'}{level}")
    return found


def _text(value: str) -> str:
    """A stranger's text as text, whatever it says."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", value), quote=True)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _style() -> str:
    rules = [
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;",
        "color:#111;background:#fff;color-scheme:light;print-color-adjust:exact}",
        "section{border-top:1px solid #bbb;margin-top:2rem}",
        ".keep{border-left:4px solid #d55e00;padding-left:.7rem}",
        ".note{white-space:pre-wrap;overflow-wrap:anywhere;background:#fafafa;padding:.7rem}",
        ".unread{color:#666;text-decoration:line-through}",
        "mark{color:inherit;background:none;border-radius:2px}",
        "table{border-collapse:collapse;margin:.7rem 0}caption{text-align:left;font-weight:600}",
        "th{text-align:left;font-weight:400;padding:0 .7rem 0 0}",
        "td{text-align:right;padding:0 .4rem;font-variant-numeric:tabular-nums}",
        ".this{font-weight:700}.this th{font-weight:700}",
        ".method,figcaption{color:#333;font-size:.9rem}figure{margin:1rem 0}",
        "svg text{font-size:9px;fill:#333}",
        ".images{display:flex;flex-wrap:wrap;gap:1rem}.images figure{margin:0}",
        ".wide{overflow-x:auto}.grid th{font-size:.75rem;white-space:nowrap;padding:0 .2rem}",
        ".grid td{min-width:.9rem;height:1.1rem;padding:0}.grid .m{border:1px solid #ccc}",
    ]
    for level in range(1, _LEVELS + 1):
        share = 0.7 * level / _LEVELS
        for mark, colour, line in (("p", _RAISES, "solid"), ("n", _LOWERS, "dotted")):
            mixed = _hex(_mix(colour, share))
            rules.append(
                f".{mark}{level}{{background:{mixed};border-bottom:2px {line} {_hex(colour)}}}"
            )
    return "\n".join(rules)


def _mix(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 - share * (255 - part)) for part in colour)
    return red, green, blue
