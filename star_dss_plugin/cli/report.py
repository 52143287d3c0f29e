"""Define the commands `star-dss report` and `star-dss inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from star_dss_plugin.cli import options as option
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.validation import probability

__all__ = ["inspect", "report"]

_Scored = Annotated[
    str, typer.Argument(help="Output of `star-dss score`: a folder, or a .parquet or .jsonl file.")
]
_Tokenizer = Annotated[
    str | None,
    typer.Option(help="Id or folder of the model it was scored for; default: from the data."),
]
_Threshold = Annotated[float, typer.Option(help="τ in [0, 1]: scores below it count as unsafe.")]

_DIGITS = 12  # Python refuses to read numbers of thousands of digits


def report(
    scored: _Scored,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML file; replaced if it exists.")
    ] = Path("report.html"),
    threshold: _Threshold = 0.5,
    source: Annotated[
        str | None,
        typer.Option(help="Column with the source of each row; default: 'source', if any."),
    ] = None,
    blur: Annotated[bool, typer.Option("--blur", help="Blur text until it is revealed.")] = False,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Leave all text of the data out of the file.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(help="Folder for figures; needs the extra 'report'.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Rows of the trajectory figure: 3,17,40; default: the most mixed."),
    ] = None,
    tokenizer: _Tokenizer = None,
    split: option.Split = "train",
    quiet: option.Quiet = False,
) -> None:
    """Write scored data as one HTML page that needs no network, and figures with --png."""
    from star_dss_plugin.data.reading import read_dataset, with_file_name
    from star_dss_plugin.data.writing import write_text
    from star_dss_plugin.guards.base import display_name
    from star_dss_plugin.report import figures
    from star_dss_plugin.report.page import render_page
    from star_dss_plugin.report.reading import read_scored, tokenizer_of
    from star_dss_plugin.report.summary import summarise

    if output.is_dir():
        raise ConfigError(f"{output} is a folder. Name a file for the report: {output}/report.html")
    probability("--threshold", threshold)
    wanted = _numbers(rows)
    if rows is not None and png is None:
        raise ConfigError("--rows chooses rows for the figures. Give a folder for them with --png.")
    if png is not None:
        figures.check_ready(png)  # before the work, not after it
    dataset = read_dataset(scored, split)
    words = tokenizer_of(dataset, tokenizer)
    with with_file_name(scored):
        data = read_scored(dataset, words, source=source, progress=not quiet)
    name = Path(scored).name or scored
    page = render_page(data, name=name, threshold=threshold, blur=blur, text=not no_text)
    write_text(output, page)
    total = summarise(data.responses, threshold)
    typer.echo(
        f"{output}: {total.responses} responses, {total.tokens} tokens, {total.share_below:.1%} "
        f"below {threshold}, guard {display_name(data.guard, data.demonstration)}"
    )
    if png is not None:
        for path in figures.write_figures(data, png, threshold=threshold, rows=wanted):
            typer.echo(str(path))


def inspect(
    scored: _Scored,
    row: Annotated[int, typer.Option(min=0, help="The row to show, from 0.")],
    threshold: _Threshold = 0.5,
    tokenizer: _Tokenizer = None,
    split: option.Split = "train",
) -> None:
    """Show one scored row: its responses coloured by score, and their trajectories."""
    from rich.console import Console

    from star_dss_plugin.data.reading import read_dataset, with_file_name
    from star_dss_plugin.report.inspection import inspect_row

    probability("--threshold", threshold)
    dataset = read_dataset(scored, split)
    with with_file_name(scored):
        shown = inspect_row(dataset, row, tokenizer=tokenizer, threshold=threshold)
    Console().print(shown)


def _numbers(rows: str | None) -> list[int] | None:
    if rows is None:
        return None
    parts = [part.strip() for part in rows.split(",")]
    if not all(part.isdecimal() and len(part) <= _DIGITS for part in parts):
        raise ConfigError(f"--rows is {rows!r}; give row numbers with commas between: 3,17,40")
    return [int(part) for part in parts]
