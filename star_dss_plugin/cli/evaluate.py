"""Define the command `star-dss evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star_dss_plugin.cli import options as option

if TYPE_CHECKING:
    from star_dss_plugin.evaluate.verdicts import Comparison

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Ids or folders of models or adapters, or smollm2; the first is the baseline."
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(help="Prompts a safe model declines: file, folder, hub id, or demo."),
    ],
    benign: Annotated[
        str | None, typer.Option(help="Prompts a useful model answers, for over-refusal.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; an interrupted run resumes from it.")
    ] = Path("runs/evaluation"),
    guard: Annotated[
        str | None, typer.Option(help="A judge beside refusal phrases, as in scoring.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="τ: an answer with P(safe) >= τ is safe.")
    ] = 0.5,
    prefill_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens given by the prefilling attack; 0: no attack.")
    ] = 5,
    max_new_tokens: option.MaxNewTokens = 64,
    batch_size: option.AnswerBatch = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most prompts of each kind; default: all.")
    ] = None,
    base: option.Base = None,
    split: option.Split = "train",
    device: option.Device = None,
    dtype: option.Dtype = "auto",
    engine: Annotated[str, typer.Option(help="local or vllm: generates the answers.")] = "local",
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Leave prompts and answers out of the page.")
    ] = False,
    quiet: option.Quiet = False,
    as_json: option.Json = False,
) -> None:
    """Compare models: harmful prompts declined, prefilled attacks survived, benign ones answered.

    Writes results.json, answers.html (side by side) and the answers themselves.
    """
    from star_dss_plugin.data.writing import write_text
    from star_dss_plugin.evaluate.comparison import compare
    from star_dss_plugin.evaluate.page import render_comparison
    from star_dss_plugin.evaluate.prompts import BENIGN, HARMFUL, load_prompts

    asked = load_prompts(prompts, HARMFUL, split=split, limit=limit)
    if benign is not None:
        asked += load_prompts(benign, BENIGN, split=split, limit=limit)
    found = compare(
        models,
        asked,
        output=output,
        guard=guard,
        threshold=threshold,
        prefill_tokens=prefill_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        base=base,
        device=device,
        dtype=dtype,
        engine=engine,
        progress=not quiet,
    )
    text = json.dumps(found.as_json(), indent=2, sort_keys=True)
    write_text(output / "results.json", text + "\n")
    write_text(output / "answers.html", render_comparison(found, text=not no_text))
    if as_json:
        typer.echo(text)
        return
    _print(found)
    typer.echo(f"{output / 'results.json'}\n{output / 'answers.html'}")


def _print(comparison: Comparison) -> None:
    from star_dss_plugin.evaluate.page import HEADINGS, percent
    from star_dss_plugin.evaluate.verdicts import differences, measures
    from star_dss_plugin.tables import Sheet, terminal
    from star_dss_plugin.visible import visible, visible_line

    first = comparison.models[0]
    names = [n for n in measures(first, comparison.guard) if not n.endswith("attack_success")]
    rows = []
    for model in comparison.models:
        shares = measures(model, comparison.guard)
        cells = (percent(shares[name]).replace(" [", "\n[") for name in names)
        rows.append((visible_line(model.name), *cells))
        if model is not first:
            apart = differences(model, first, comparison.guard)
            rows.append(
                (
                    "vs first",
                    *(
                        f"{100 * apart[n].value:+.0f}\n"
                        f"[{100 * apart[n].low:+.0f}, {100 * apart[n].high:+.0f}]"
                        for n in names
                    ),
                )
            )
    console = terminal()
    headings = ("model", *(HEADINGS[name] for name in names))
    console.print(Sheet(headings, rows, title="95 % intervals over prompts"))
    for warning in comparison.warnings():
        console.print(f"\nNote: {visible(warning)}")
