"""List, check and calibrate guards: `star-dss guards`, `guards check`, `guards calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from star_dss_plugin.cli import options as option
from star_dss_plugin.tables import Sheet, terminal
from star_dss_plugin.visible import visible

__all__ = ["app"]

app = typer.Typer(help="List guards; check or calibrate one.", invoke_without_command=True)
_Guard = Annotated[
    str, typer.Argument(help="A registered guard, or a JSON mapping as the option guard takes it.")
]


@app.callback()
def guards(context: typer.Context, as_json: option.Json = False) -> None:
    """List guards: licence, gating, size, published F1 and what each prefix costs."""
    if context.invoked_subcommand is not None:
        return
    from star_dss_plugin.plugins import load_plugins

    entries = load_plugins().entries("guard")
    if as_json:
        found = [
            {"name": entry.name, "summary": entry.summary, **asdict(entry.info)}
            for entry in entries
        ]
        typer.echo(json.dumps(found, indent=2))
        return
    rows = []
    for entry in entries:
        info = entry.info
        rows.append(
            (
                entry.name,
                info.licence or "-",
                "gated" if info.gated else "no" if info.licence else "-",
                "-" if info.billions is None else f"{info.billions:g} B",
                info.cost,
                "-" if info.f1 is None else f"{info.f1}",
            )
        )
    console = terminal()
    console.print(Sheet(("guard", "licence", "gated", "size", "per prefix", "F1"), rows))
    console.print(
        "\nper prefix: tokens of the guard's own prompt after the response, computed again for "
        "each prefix; tokens that prefixes share are computed once. F1: of harmful whole "
        "responses, as published (arXiv 2510.14276).\n"
    )
    for entry in entries:
        console.print(visible(f"{entry.name}: {entry.summary}"))


@app.command()
def check(
    guard: _Guard,
    guard_device: option.GuardDevice = None,
    guard_dtype: option.GuardDtype = "auto",
    weights: Annotated[
        bool, typer.Option(help="Load the weights and score the two probes.")
    ] = True,
) -> None:
    """Show a guard's prompt, and check its scores of a safe and an unsafe probe."""
    from star_dss_plugin.data.requests import PrefixRequest
    from star_dss_plugin.guards.base import display_name
    from star_dss_plugin.guards.combined import single_guards
    from star_dss_plugin.guards.loading import load_guard
    from star_dss_plugin.guards.self_check import UNSAFE_PROBE, check_probes

    text = UNSAFE_PROBE[-1]["content"]
    request = PrefixRequest(UNSAFE_PROBE[:-1], text, (len(text),))
    for one in single_guards(load_guard(guard, device=guard_device, dtype=guard_dtype)):
        typer.echo(f"guard: {display_name(one.name, one.demonstration)}")
        for what, shown in one.explained(request).items():
            typer.echo(f"{what}: {visible(shown)}")
        if not weights:
            continue
        safe, unsafe = check_probes(one)
        one.close()
        for what, found in (("safe", safe), ("unsafe", unsafe)):
            mass = "" if found.label_mass is None else f", label mass {found.label_mass[0]:.4f}"
            typer.echo(f"{what} probe: P(safe) = {found.scores[0]:.4f}{mass}")
        typer.echo(f"{one.name}: rates the safe probe above the unsafe one")


@app.command()
def calibrate(
    guard: _Guard,
    data: Annotated[
        str,
        typer.Argument(help="Rows with prompt, response (or messages) and label: 1 safe, 0 not."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for calibration.json and reliability.png."),
    ],
    split: option.Split = "train",
    guard_device: option.GuardDevice = None,
    guard_dtype: option.GuardDtype = "auto",
    as_json: option.Json = False,
) -> None:
    """Fit a temperature and a threshold on labelled responses, and report how good they are."""
    from star_dss_plugin.data.reading import read_dataset
    from star_dss_plugin.data.writing import write_text
    from star_dss_plugin.guards.base import display_name
    from star_dss_plugin.guards.loading import load_guard
    from star_dss_plugin.report.figures import check_ready
    from star_dss_plugin.report.reliability import write_reliability
    from star_dss_plugin.scoring.calibration import fit_guard, labelled_rows

    check_ready(output)  # before hours of scoring
    conversations, labels = labelled_rows(read_dataset(data, split))
    asked = load_guard(guard, device=guard_device, dtype=guard_dtype)
    found, _ = fit_guard(asked, conversations, labels)
    asked.close()
    write_text(output / "calibration.json", json.dumps(found.as_dict(), indent=2) + "\n")
    write_reliability(found, output / "reliability.png")
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    rows = [
        (name, *(f"{v:.3f}" for v in (values.brier, values.auroc, values.f1)))
        for name, values in (("raw", found.raw), ("calibrated, held out", found.calibrated))
    ]
    headings = ("", "Brier", "AUROC", "F1 of harmful")
    terminal().print(Sheet(headings, rows, title=display_name(found.guard, found.demonstration)))
    typer.echo("calibration:\n" + json.dumps(found.as_dict()["calibration"]))
