"""Draw figures of scored data for papers and slides, with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from star_dss_plugin.data.writing import writing
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.report import palette
from star_dss_plugin.report.plotting import (
    COLOURS,
    GUIDE,
    QUIET,
    escape_mathtext,
    line_style,
    require_matplotlib,
)
from star_dss_plugin.report.reading import ScoredData, ScoredResponse
from star_dss_plugin.report.summary import BINS, grouped, histogram, mean_trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_ready", "write_figures"]

_TRAJECTORIES = 6


def check_ready(folder: Path) -> None:
    """Check that figures can be drawn and written to a folder, which need not exist.

    Raises:
        ConfigError: matplotlib is missing, or the folder is a file.
    """
    require_matplotlib("The HTML report works without it.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Give --png a folder for the figures.")


def write_figures(
    data: ScoredData, folder: Path, *, threshold: float = 0.5, rows: Sequence[int] | None = None
) -> list[Path]:
    """Write `trajectories.png`, `histogram.png` and, if rows have sources, `by_source.png`.

    Args:
        data: The scored data to draw.
        folder: Created if it does not exist; figures in it are replaced.
        threshold: τ, drawn as a line.
        rows: Rows whose trajectories are drawn; None: the six responses with the largest falls.

    Returns:
        The paths of the written files.

    Raises:
        ConfigError: matplotlib is missing, or the folder is a file.
        DataError: A row has no response.
    """
    check_ready(folder)
    chosen = _chosen(data, rows)
    drawn = {
        "trajectories.png": _trajectories(chosen, threshold),
        "histogram.png": _histogram(data, threshold),
    }
    if sources := grouped(data.responses):
        drawn["by_source.png"] = _by_source(sources, threshold)
    paths = []
    for name, figure in drawn.items():
        _mark_guard(figure, data)
        path = folder / name
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def _chosen(data: ScoredData, rows: Sequence[int] | None) -> list[ScoredResponse]:
    if rows is None:
        return sorted(data.responses, key=lambda r: -r.largest_fall)[:_TRAJECTORIES]
    chosen = [r for row in rows for r in data.responses if r.row == row]
    if absent := sorted(set(rows) - {r.row for r in chosen}):
        raise DataError(
            f"Row {absent[0]} has no response to draw; rows count from 0 to "
            f"{max(r.row for r in data.responses)}."
        )
    return chosen


def _axes(height: float = 3.4) -> tuple[Figure, Axes]:
    # Unlike pyplot, this opens no window and changes no global state of matplotlib.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    return figure, axes


def _score_axis(axes: Axes, threshold: float) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("STAR score")
    axes.axhline(threshold, **GUIDE)


def _trajectories(chosen: Sequence[ScoredResponse], threshold: float) -> Figure:
    figure, axes = _axes()
    for k, response in enumerate(chosen):
        label = f"row {response.row}" + (f", response {response.turn + 1}" if response.turn else "")
        edges = [0, *response.token_ends]
        axes.stairs(
            response.scores, edges, baseline=None, label=label, linewidth=1.5, **line_style(k)
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("token of the response")
    _score_axis(axes, threshold)
    _legend(axes)
    return figure


def _histogram(data: ScoredData, threshold: float) -> Figure:
    figure, axes = _axes(3.0)
    centres = [(k + 0.5) / BINS for k in range(BINS)]
    colours = [palette.LIGHT[palette.colour_level(centre)] for centre in centres]
    axes.bar(
        centres,
        histogram(data.responses),
        0.92 / BINS,
        color=colours,
        edgecolor=QUIET,
        linewidth=0.6,
    )
    axes.axvline(threshold, **GUIDE)
    axes.set_xlim(0, 1)
    axes.set_xlabel("STAR score")
    axes.set_ylabel("tokens")
    return figure


def _by_source(sources: dict[str, list[ScoredResponse]], threshold: float) -> Figure:
    figure, axes = _axes()
    for k, (name, responses) in enumerate(list(sources.items())[: len(COLOURS)]):
        share, mean = mean_trajectory(responses)
        label = f"{escape_mathtext(name)[:40]} ({len(responses)})"
        axes.plot(100 * share, mean, label=label, linewidth=1.5, **line_style(k))
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the response, %")
    _score_axis(axes, threshold)
    axes.set_ylabel("mean STAR score")
    _legend(axes)
    return figure


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _mark_guard(figure: Figure, data: ScoredData) -> None:
    text = f"guard: {data.guard}"
    if data.demonstration:
        text = "DEMONSTRATION SCORES: the guard protects nobody"
    figure.suptitle(escape_mathtext(text), fontsize=9, color=QUIET, x=0.01, ha="left")
