"""Draw a guard's reliability curve: the share of safe responses for each score."""

from __future__ import annotations

from pathlib import Path

from star_dss_plugin.data.writing import writing
from star_dss_plugin.report.figures import check_ready
from star_dss_plugin.report.plotting import COLOURS, GUIDE, escape_mathtext
from star_dss_plugin.scoring.calibration import Calibration, Quality

__all__ = ["write_reliability"]


def write_reliability(calibration: Calibration, path: Path) -> None:
    """Draw the curve before and after calibration, with the area of a dot as its number of rows.

    Raises:
        ConfigError: matplotlib is missing.
    """
    check_ready(path.parent)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], **GUIDE)
    sets: tuple[tuple[str, Quality, str], ...] = (
        ("raw", calibration.raw, COLOURS[1]),
        ("calibrated, held out", calibration.calibrated, COLOURS[0]),
    )
    for label, quality, colour in sets:
        counts, scores, shares = zip(*quality.bins, strict=True)
        axes.plot(
            scores, shares, color=colour, linewidth=1.2, label=f"{label}: Brier {quality.brier:.3f}"
        )
        sizes = [max(8.0, 240 * count / calibration.rows) for count in counts]
        axes.scatter(scores, shares, s=sizes, color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="P(safe)", ylabel="share that is safe")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    warning = " (DEMONSTRATION ONLY)" if calibration.demonstration else ""
    figure.suptitle(
        escape_mathtext(f"guard: {calibration.guard}{warning}, {calibration.rows} rows"), fontsize=9
    )
    with writing(path):
        figure.savefig(path, dpi=150)
