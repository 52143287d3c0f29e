"""Assemble the command line: `star-dss score`, `guards`, `report`, `evaluate`, `sft` and others.

Heavy imports stay inside the commands, so that `--help` and `plugins` answer at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from star_dss_plugin._version import __version__
from star_dss_plugin.cli import guards as guard_commands
from star_dss_plugin.cli import report as report_commands
from star_dss_plugin.cli.capability import capability
from star_dss_plugin.cli.check import check
from star_dss_plugin.cli.evaluate import evaluate as evaluate_command
from star_dss_plugin.cli.init import init
from star_dss_plugin.cli.landscape import landscape
from star_dss_plugin.cli.plugins import plugins
from star_dss_plugin.cli.score import score
from star_dss_plugin.errors import PluginError, StarDSSError
from star_dss_plugin.visible import visible

__all__ = ["app", "main"]

app = typer.Typer(
    name="star-dss",
    no_args_is_help=True,
    add_completion=False,
    help="Safety-shaped finetuning: score data with a guard, finetune with the scores.",
)
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_RAW = {"allow_extra_args": True, "ignore_unknown_options": True}


def main() -> None:
    """Run the command line; a StarDSSError is a message and exit status 2, not a traceback."""
    try:
        app()
    except StarDSSError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno in _NO_ROOM:
            # Our own files raise an OutputError, so this is a cache or temporary file of a library.
            _stop(
                f"{error} while a library wrote a cache or temporary file. Free space, or set "
                "other folders: HF_HOME, HF_DATASETS_CACHE, TMPDIR. Then start the same command "
                "again."
            )
        named = [word for word in sys.argv[1:] if not word.startswith("-")]
        if not str(error.filename).startswith(tuple(named)):
            raise  # the user has not named this file, so the traceback says more
        _stop(f"{error.filename}: {error.strerror}. Name another file or folder.")


def _stop(message: str) -> NoReturn:
    Console(stderr=True).print(
        "Error:", visible(message), style="red", markup=False, soft_wrap=True
    )
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command()(init)
app.command()(score)
app.add_typer(guard_commands.app, name="guards")
app.command()(report_commands.report)
app.command()(report_commands.inspect)
app.command()(evaluate_command)
app.command()(landscape)
app.command()(capability)
app.command()(check)
app.command()(plugins)


@app.command(context_settings={**_RAW, "help_option_names": []})
def sft(context: typer.Context) -> None:
    """Finetune with TRL: the flags and the YAML (--config) of `trl sft`, and those of STAR-DSS.

    On several devices: accelerate launch -m star_dss_trl.sft --config run.yaml
    """
    _host_command("sft")(context.args)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 13,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of each kind that each model answers, at most.")
    ] = 20,
) -> None:
    """Score a small data set, finetune SmolLM2-135M with and without STAR-DSS, and compare."""
    _host_command("demo")(output, steps=steps, prompt_count=prompts)


def _host_command(name: str) -> Callable[..., Any]:
    """Import the function that runs a command of an integration.

    Raises:
        PluginError: No integration has the command, or its host cannot be imported.
    """
    from star_dss_plugin.plugins import load_plugins

    plugins = load_plugins()
    host = plugins.host_of_command(name)
    if host is None:
        raise PluginError(
            f"No integration runs `star-dss {name}`. `star-dss plugins` lists those installed."
        )
    commands = plugins.host(host).integration.commands
    return plugins.import_target(host, commands[name], f"`star-dss {name}`")
