"""Define the command `star-dss capability`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star_dss_plugin.cli import options as option
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.tables import Sheet, terminal
from star_dss_plugin.visible import visible_line

if TYPE_CHECKING:
    from star_dss_plugin.evaluate.capability import Measured

__all__ = ["capability"]


def capability(
    models: Annotated[
        list[str], typer.Argument(help="Ids or folders of models or adapters, or smollm2.")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval: mmlu,arc_challenge,gsm8k. Data: from the hub."),
    ] = None,
    tasks_data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE.jsonl: rows of prompt and choices, or prompt and response."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The JSON file; replaced if it exists.")
    ] = Path("capability.json"),
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most rows of each task; default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before a question; default: the task's.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Questions become user turns.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed for drawing the examples.")] = 1234,
    base: option.Base = None,
    device: option.Device = None,
    dtype: option.Dtype = "auto",
    as_json: option.Json = False,
) -> None:
    """Compare what models can do, with lm-eval: MMLU, ARC, GSM8K by name, or files of yours.

    See docs/capability.md.
    """
    from star_dss_plugin.data.writing import check_writable, write_text
    from star_dss_plugin.evaluate.capability import compared, open_tasks, run_tasks
    from star_dss_plugin.evaluate.models import load_whole_model
    from star_dss_plugin.models.devices import find_device, free_memory

    if output.is_dir():
        raise ConfigError(f"{output} is a folder. Name a file: {output}/capability.json")
    if len(set(models)) < len(models):
        raise ConfigError("A model is given twice. Name each once.")
    check_writable(output)  # before hours of work
    names = [name for part in tasks or [] for name in part.split(",") if name]
    place = find_device(device)
    found = {}
    with open_tasks(names, _named_files(tasks_data or []), num_fewshot=num_fewshot) as opened:
        for model in models:
            loaded, tokenizer = load_whole_model(model, dtype=dtype, base=base)
            loaded.to(place)  # type: ignore[arg-type]
            found[model] = run_tasks(
                loaded,
                tokenizer,
                opened,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                chat_template=chat_template,
                seed=seed,
            )
            del loaded
            free_memory()
    said = {
        "tasks": names,
        "tasks_data": tasks_data or [],
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "batch_size": batch_size,
        "seed": seed,
        "dtype": dtype,
    }
    text = json.dumps({"options": said, "models": found}, indent=2, ensure_ascii=False)
    write_text(output, text + "\n")
    if as_json:
        typer.echo(text)
        return
    _show(models, compared(list(found.values())))
    if limit is not None:
        typer.echo(f"only the first {limit} rows of each task: not a benchmark result")
    typer.echo(f"results in {output}")


def _named_files(given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path) or name in found:
            raise ConfigError(
                f"--tasks-data is {one!r}; give each file a name of its own: NAME=FILE.jsonl"
            )
        found[name] = path
    return found


def _show(models: Sequence[str], rows: Sequence[Measured]) -> None:
    cells = []
    for row in rows:
        counts = ("-" if n is None else str(n) for n in (row.shots, row.rows))
        values = ("-" if v is None else _with_error(*v) for v in row.values)
        cells.append((visible_line(row.task), row.metric, *counts, *values))
    console = terminal()
    names = [visible_line(Path(model).name) for model in models]
    console.print(Sheet(("task", "metric", "shots", "rows", *names), cells, keys=2))
    console.print("±: lm-eval's standard error")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
