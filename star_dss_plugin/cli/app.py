"""The command line: `star-dss score`, `guards`, `report`, `evaluate`, `sft`, `check` and others.

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
from star_dss_plugin.cli import options as option
from star_dss_plugin.cli import report as report_commands
from star_dss_plugin.cli.capability import capability
from star_dss_plugin.cli.check import check
from star_dss_plugin.cli.evaluate import evaluate as evaluate_command
from star_dss_plugin.cli.landscape import landscape
from star_dss_plugin.cli.plugins import plugins
from star_dss_plugin.errors import ConfigError, PluginError, StarDSSError
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
    """Runs the command line; an error of ours is a message and exit status 2, not a traceback."""
    try:
        app()
    except StarDSSError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno in _NO_ROOM:
            # What we write says so in its own words; this is what libraries keep on the side.
            _stop(
                f"{error} while a library wrote a file of its own. Free space, or name other "
                "folders: HF_HOME, HF_DATASETS_CACHE, TMPDIR. Then start the same command again."
            )
        named = [word for word in sys.argv[1:] if not word.startswith("-")]
        if not str(error.filename).startswith(tuple(named)):
            raise  # nothing that the user has chosen: the traceback says more
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


@app.command()
def score(
    data: Annotated[str, typer.Argument(help="A .jsonl or .parquet file, or a data set folder.")],
    tokenizer: Annotated[str, typer.Option(help="Id or folder of the model to be trained.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new.")],
    guard: Annotated[
        str | None, typer.Option(help="A registered guard, or a JSON mapping (see the docs).")
    ] = None,
    segmenter: Annotated[str, typer.Option(help="tokens, words, sentences or whole.")] = "tokens",
    chunk_size: Annotated[int, typer.Option(min=1, help="M: units per chunk.")] = 5,
    trajectory: Annotated[
        str, typer.Option(help="exact, or adaptive: fewer prefixes, the others interpolated.")
    ] = "exact",
    trajectory_epsilon: Annotated[float, typer.Option(min=0, max=1, help="ε of adaptive.")] = 0.02,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Cut rows to this many tokens (as in training).")
    ] = None,
    split: option.Split = "train",
    guard_device: option.GuardDevice = None,
    guard_dtype: option.GuardDtype = "auto",
    score_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per guard batch.")] = 16384,
    engine: Annotated[
        str, typer.Option(help="local, vllm, or a server's address: http://host:port.")
    ] = "local",
    engine_options: Annotated[
        str | None, typer.Option(help="Options of that engine, as a JSON mapping.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Write parquet shards of so many rows (resumable).")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Make the shards on a Ray cluster.")] = False,
    address: Annotated[
        str | None, typer.Option(help="The cluster's address; none starts one here.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Workers on the cluster.")] = 1,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Default: 1 where the cluster has GPUs.")
    ] = None,
    score_cache_dir: Annotated[Path | None, typer.Option(help="Folder of the score cache.")] = None,
    on_guard_error: Annotated[
        str, typer.Option(help="raise, or unsafe: what cannot be scored gets the score 0.")
    ] = "raise",
    per_guard: Annotated[
        bool, typer.Option("--per-guard", help="A column for each guard of several, too.")
    ] = False,
    quiet: option.Quiet = False,
) -> None:
    """Scores every prefix of every response and writes a data set with `star_scores`."""
    from star_dss_plugin.guards.base import announced
    from star_dss_plugin.scoring.notes import remarks

    options = {
        "guard": guard,
        "segmenter": segmenter,
        "chunk_size": chunk_size,
        "trajectory": trajectory,
        "trajectory_epsilon": trajectory_epsilon,
        "max_length": max_length,
        "guard_device": guard_device,
        "guard_dtype": guard_dtype,
        "engine": engine,
        "engine_options": engine_options,
        "score_batch_tokens": score_batch_tokens,
        "on_guard_error": on_guard_error,
        "per_guard": per_guard,
    }
    on_cluster = {
        "--address": address,
        "--gpus-per-worker": gpus_per_worker,
        "--num-workers": None if num_workers == 1 else num_workers,
    }
    if not ray and (unused := [name for name, value in on_cluster.items() if value is not None]):
        raise ConfigError(f"{', '.join(unused)} is for a Ray cluster. Add --ray, or leave it out.")
    if ray or shard_rows is not None:
        if score_cache_dir is not None:
            raise ConfigError(
                "--score-cache-dir is given, but shards keep what they have begun beside the "
                "output, and share no cache. Leave it out."
            )
        from star_dss_plugin.data.reading import in_file
        from star_dss_plugin.scoring import on_ray, shards

        job = shards.begin(
            data, tokenizer, output, split=split, shard_rows=shard_rows or 1000, **options
        )
        with in_file(data):
            if ray:
                on_ray.score_on_ray(
                    job,
                    num_workers=num_workers,
                    address=address,
                    gpus_per_worker=gpus_per_worker,
                    progress=not quiet,
                )
            else:
                shards.score_shards(job, progress=not quiet)
        found = shards.finish(job)
    else:
        found = _score_at_once(
            data,
            split,
            tokenizer,
            output,
            {
                **options,
                "score_cache_dir": score_cache_dir,
                "progress": not quiet,
            },
        )
    typer.echo(
        f"{output}: {found['responses']} responses, {found['prefixes']} prefixes, "
        f"{found['trained_tokens']} trained tokens, mean prefix score "
        f"{found['mean_prefix_score']:.3f}, guard "
        + announced(found["guard"], found["demonstration_guard"])
    )
    for line in remarks(found):
        typer.echo(line)


def _score_at_once(
    data: str, split: str, tokenizer: str, output: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Scores and writes a data set in this process; returns its provenance."""
    from star_dss_plugin.data.provenance import provenance_of
    from star_dss_plugin.data.reading import in_file, read_dataset
    from star_dss_plugin.data.writing import check_writable, write_dataset
    from star_dss_plugin.models import load_tokenizer
    from star_dss_plugin.scoring.scorer import score_dataset

    if output.exists():
        raise ConfigError(f"{output} exists. Name a new folder, or remove it first.")
    check_writable(output)
    rows, words = read_dataset(data, split), load_tokenizer(tokenizer)
    with in_file(data):
        scored = score_dataset(rows, words, **options)
    write_dataset(scored, output)
    found = provenance_of(scored)
    assert found is not None
    return found


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
    """Finetunes with TRL: the flags and the YAML (--config) of `trl sft`, and those of STAR-DSS.

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
    """Scores a small data set, finetunes SmolLM2-135M with and without STAR-DSS, and compares."""
    _host_command("demo")(output, steps=steps, prompt_count=prompts)


def _host_command(name: str) -> Callable[..., Any]:
    """Import what runs a command of an integration.

    Raises:
        PluginError: Its host cannot be imported; the message says how to install it.
    """
    from star_dss_plugin.plugins import load_plugins

    plugins = load_plugins()
    host = plugins.host_of_command(name)
    if host is None:
        raise PluginError(
            f"No integration runs `star-dss {name}`. `star-dss plugins` lists those installed."
        )
    commands = plugins.host(host).integration.commands
    return plugins.of_host(host, commands[name], f"`star-dss {name}`")
