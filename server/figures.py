"""The report's pictures, as PNG bytes; matplotlib is loaded only here, without a window.

Colours are Okabe and Ito's (2008), which colour-blind people tell apart; marks differ in
shape as well.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

from common.metrics import FALLING, TITLES, Interval

if TYPE_CHECKING:
    from server.report import RoundResult, RunResult, SiteResult

__all__ = ["learning_curve", "sites"]

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
_DPI = 150
_CURVES: Final = 2
_MAX_MARKED = 40


def learning_curve(result: RunResult) -> bytes:
    """Accuracy and macro F1 by round, above the privacy spent; aborted rounds are marked."""
    private = any(entry.epsilon is not None for entry in result.rounds)
    figure = _figure(7.2, 5.2 if private else 3.8)
    axes = figure.subplots(
        2 if private else 1,
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [2.6, 1] if private else [1]},
    )[:, 0]
    _draw_quality(axes[0], result)
    if private:
        _draw_epsilon(axes[1], result)
    axes[-1].set_xlabel("round")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlim(0.5, max(result.rounds_planned, 1) + 0.5)
    noised = result.privacy.evaluation_noise is not None
    kind = "released with privacy noise" if noised else "exact sums"
    axes[0].set_title(f"{result.study}: quality on held-out patients ({kind})", **_TITLE)
    return _png(figure)


def sites(result: RunResult) -> bytes | None:
    """Each hospital's own model against the federated one; None where no site table exists."""
    rows = [site for site in result.sites if site.together is not None]
    if not result.simulated or not rows:
        return None
    rows.sort(key=_gain)
    figure = _figure(7.2, 1.6 + 0.36 * len(rows))
    axes = figure.subplots()
    for place, site in enumerate(rows):
        _draw_site(axes, place, site)
    if result.everywhere is not None and result.everywhere.primary is not None:
        axes.axvline(
            result.everywhere.primary,
            color=_BLUE,
            linewidth=1.2,
            linestyle=":",
            label="together, on all",
        )
    axes.set_yticks(range(len(rows)), [_site_label(site) for site in rows])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlabel(f"{result.score} on held-out patients (its own, unless said), 95 % interval")
    _tidy(axes, grid="x")
    axes.set_title(f"{result.study}: alone and together (simulation only)", **_TITLE)
    _legend(axes)
    return _png(figure)


_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 10.5, "fontweight": "bold", "pad": 28}


def _draw_quality(axes: Any, result: RunResult) -> None:
    measured = [r for r in result.completed if r.metrics is not None]
    shown = result.scoring.names[:_CURVES]
    if result.scoring.names[0] in FALLING:
        shown = shown[:1]
    styles = ((_BLUE, "o", "-"), (_ORANGE, "s", "--"))
    for name, (colour, mark, line) in zip(shown, styles, strict=False):
        told = [(r.turn, r.metrics.scores[name]) for r in measured if r.metrics is not None]
        points = [(number, value) for number, value in told if value is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=mark if len(points) <= _MAX_MARKED else "",
                markersize=4.5 if mark == "o" else 6.5,
                markerfacecolor=colour if mark == "o" else "none",
                linewidth=1.6,
                linestyle=line,
                label=TITLES[name],
            )
    if result.central is not None and result.central.primary is not None:
        axes.axhline(
            result.central.primary,
            color=_GREEN,
            linewidth=1.2,
            linestyle=":",
            label=f"{result.score}, trained centrally",
        )
    _draw_aborted(axes, [r for r in result.rounds if r.code is not None])
    axes.set_ylabel(", ".join(TITLES[name] for name in shown))
    axes.set_ylim(0, None if result.scoring.names[0] in FALLING else 1)
    _tidy(axes, grid="y")
    _legend(axes)


def _draw_aborted(axes: Any, aborted: list[RoundResult]) -> None:
    for index, entry in enumerate(aborted):
        label = "round aborted" if index == 0 else None
        axes.axvline(entry.turn, color=_RED, alpha=0.18, linewidth=5, label=label)


def _draw_epsilon(axes: Any, result: RunResult) -> None:
    points = [(r.turn, r.epsilon) for r in result.completed if r.epsilon is not None]
    if not points:
        return
    axes.step(
        *zip(*points, strict=True), where="mid", color=_GREEN, linewidth=1.6, label="ε reserved"
    )
    target = result.privacy.epsilon
    if target is not None:
        axes.axhline(target, color=_GREY, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"budget {target:g}",
            (0.012, target),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            color=_GREY,
            fontsize=8.5,
        )
    axes.set_ylim(0, 1.12 * max([value for _, value in points] + [target or 0.0]))
    axes.set_ylabel("ε, largest site")
    _tidy(axes, grid="y")


def _draw_site(axes: Any, place: int, site: SiteResult) -> None:
    pair = [found.primary for found in (site.alone, site.together) if found is not None]
    if len(pair) == 2 and None not in pair:  # noqa: PLR2004 - both were measured
        axes.plot(pair, [place + 0.13, place - 0.13], color="#BDBDBD", linewidth=2, zorder=1)
    for found, colour, mark, shift, name in (
        (site.alone, _ORANGE, "s", 0.13, "alone"),
        (site.together, _BLUE, "o", -0.13, "together"),
        (site.alone_everywhere, _RED, "^", 0.32, "alone, on all"),
    ):
        if found is not None and found.primary is not None:
            axes.errorbar(
                found.primary,
                place + shift,
                xerr=_errors(found.primary, found.ends),
                fmt=mark,
                color=colour,
                markersize=6,
                elinewidth=1.1,
                capsize=2,
                zorder=2,
                label=name if place == 0 else None,
            )


def _errors(value: float, ends: Interval) -> list[list[float]]:
    low, high = ends
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _gain(site: SiteResult) -> float:
    alone = None if site.alone is None else site.alone.primary
    together = None if site.together is None else site.together.primary
    return 0.0 if alone is None or together is None else together - alone


def _site_label(site: SiteResult) -> str:
    return f"{site.site} (n={site.together.n})" if site.together is not None else site.site


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Any, *, grid: str) -> None:
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=4,
            frameon=False,
            fontsize=9,
            borderaxespad=0.2,
            handlelength=1.8,
        )


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": "Wardround"})
    return target.getvalue()
