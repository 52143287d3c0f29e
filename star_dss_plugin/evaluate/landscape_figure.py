"""Draw a safety landscape with matplotlib: curves, or a plane as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from star_dss_plugin.data.writing import writing
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.evaluate.landscape import S_MAX
from star_dss_plugin.evaluate.landscape_points import Curve, Landscape
from star_dss_plugin.report.plotting import GUIDE, escape_mathtext, line_style, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_figures", "write_landscape"]


def check_figures() -> None:
    """Check that figures can be drawn.

    Raises:
        ConfigError: matplotlib is missing.
    """
    require_matplotlib("Or leave the figure out with --no-figure.")


def write_landscape(landscapes: Mapping[str, Landscape], path: Path) -> None:
    """Draw the landscapes of one or several models: S(α) in percent, or S(α, β) as colours.

    Args:
        landscapes: Maps a label to a landscape. A plane must be the only one. Of one model, each
            curve is drawn; of several models, the mean over directions with their range as a band.
        path: The PNG file; replaced if it exists.

    Raises:
        ConfigError: matplotlib is missing, or there are several planes.
    """
    check_figures()
    planes = [one for one in landscapes.values() if len(one.curves[0].points[0].at) > 1]
    if planes and len(landscapes) > 1:
        raise ConfigError("A plane fills a figure. Draw one landscape at a time.")
    figure = _plane(planes[0].curves[0]) if planes else _lines(landscapes)
    title = ", ".join(_title(label, one) for label, one in landscapes.items())
    figure.suptitle(escape_mathtext(title), fontsize=9)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _title(label: str, one: Landscape) -> str:
    return label if one.visage is None else f"{label}: VISAGE {one.visage:.1f}"


def _lines(landscapes: Mapping[str, Landscape]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    if len(landscapes) == 1:
        _each_curve(axes, next(iter(landscapes.values())))
    else:
        _mean_curves(axes, landscapes)
    toward = any(one.visage is None for one in landscapes.values())
    for end in (0, 1) if toward else (0,):
        axes.axvline(end, **GUIDE)
    axes.set_ylim(-2, S_MAX + 2)
    axes.set_xlabel("α: the model is 0, the other 1" if toward else "α, of each weight's norm")
    axes.set_ylabel("attack success rate, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _each_curve(axes: Axes, landscape: Landscape) -> None:
    for k, curve in enumerate(landscape.curves):
        alphas = [point.at[0] for point in curve.points]
        rates = [point.attack_success for point in curve.points]
        axes.plot(alphas, rates, label=curve.name, linewidth=1.4, **line_style(k))


def _mean_curves(axes: Axes, landscapes: Mapping[str, Landscape]) -> None:
    for k, (label, landscape) in enumerate(landscapes.items()):
        alphas = [point.at[0] for point in landscape.curves[0].points]
        of_curves = [[p.attack_success for p in curve.points] for curve in landscape.curves]
        at_each = list(zip(*of_curves, strict=True))
        style = line_style(k)
        mean = [sum(rates) / len(rates) for rates in at_each]
        axes.plot(alphas, mean, label=escape_mathtext(label), linewidth=1.6, **style)
        low, high = [min(r) for r in at_each], [max(r) for r in at_each]
        axes.fill_between(alphas, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _plane(curve: Curve) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    alphas = sorted({point.at[0] for point in curve.points})
    betas = sorted({point.at[1] for point in curve.points})
    rates = {point.at: point.attack_success for point in curve.points}
    mesh = axes.pcolormesh(
        alphas,
        betas,
        [[rates[a, b] for a in alphas] for b in betas],
        cmap="viridis",
        vmin=0,
        vmax=S_MAX,
        shading="nearest",
    )
    figure.colorbar(mesh, ax=axes, label="attack success rate, %")
    axes.plot([0], [0], marker="+", color="white", markersize=9)
    axes.set(xlabel="α", ylabel="β")
    return figure
