"""Define `star-dss score`: score every prefix of every response, locally, in shards or on Ray."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from star_dss_plugin.cli import options as option
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.options import ScoringOptions
from star_dss_plugin.visible import visible

__all__ = ["score"]


@option.flags_of(ScoringOptions)
def score(
    data: Annotated[str, typer.Argument(help="A .jsonl or .parquet file, a folder, or demo.")],
    tokenizer: Annotated[str, typer.Option(help="Id or folder of the trained model, or smollm2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must be new.")],
    options: ScoringOptions,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Cut rows to this many tokens (as in training).")
    ] = None,
    split: option.Split = "train",
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Write parquet shards of this many rows (resumable).")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Make the shards on a Ray cluster.")] = False,
    address: Annotated[
        str | None, typer.Option(help="The cluster's address; none starts one here.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Workers on the cluster.")] = 1,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Default: 1 where the cluster has GPUs.")
    ] = None,
    assistant_only_loss: Annotated[
        bool,
        typer.Option(
            "--assistant-only-loss",
            help="Train the tokens that the chat template marks as generated, as in TRL.",
        ),
    ] = False,
    num_proc: Annotated[
        int, typer.Option(min=1, help="Processes that render and tokenize rows.")
    ] = 1,
    per_guard: Annotated[
        bool, typer.Option("--per-guard", help="Also write a column for each guard of an ensemble.")
    ] = False,
    quiet: option.Quiet = False,
) -> None:
    """Score every prefix of every response and write a data set with `star_scores`."""
    from star_dss_plugin.guards.base import display_name
    from star_dss_plugin.scoring.guard_statistics import remarks

    on_cluster = {
        "--address": address,
        "--gpus-per-worker": gpus_per_worker,
        "--num-workers": None if num_workers == 1 else num_workers,
    }
    if not ray and (unused := [name for name, value in on_cluster.items() if value is not None]):
        raise ConfigError(f"{', '.join(unused)} is for a Ray cluster. Add --ray, or leave it out.")
    how: dict[str, Any] = {
        "max_length": max_length,
        "per_guard": per_guard,
        "assistant_only_loss": assistant_only_loss,
        "num_proc": num_proc,
    }
    if ray or shard_rows is not None:
        from star_dss_plugin.data.reading import with_file_name
        from star_dss_plugin.scoring import jobs, on_ray, shards

        how["chat_template"] = _training_template(tokenizer) if assistant_only_loss else None
        job = jobs.begin(
            data, tokenizer, output, options, split=split, shard_rows=shard_rows or 1000, **how
        )
        with with_file_name(data):
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
        found = jobs.finish(job)
    else:
        found = _score_at_once(data, split, tokenizer, output, options, progress=not quiet, **how)
    typer.echo(
        f"{output}: {found['responses']} responses, {found['prefixes']} prefixes, "
        f"{found['trained_tokens']} trained tokens, mean prefix score "
        f"{found['mean_prefix_score']:.3f}, guard "
        + display_name(found["guard"], found["demonstration_guard"])
    )
    for line in remarks(found):
        typer.echo(visible(line))


def _score_at_once(
    data: str, split: str, tokenizer: str, output: Path, options: ScoringOptions, **how: Any
) -> dict[str, Any]:
    """Score and write a data set in this process; return its provenance."""
    from star_dss_plugin.data.provenance import provenance_of
    from star_dss_plugin.data.reading import read_dataset, with_file_name
    from star_dss_plugin.data.writing import check_writable, write_dataset
    from star_dss_plugin.models.loading import load_tokenizer
    from star_dss_plugin.scoring.scorer import score_dataset

    if output.exists():
        raise ConfigError(f"{output} exists. Name a new folder, or remove it first.")
    check_writable(output)
    rows, trained = read_dataset(data, split), load_tokenizer(tokenizer)
    how["chat_template"] = _training_template(tokenizer) if how["assistant_only_loss"] else None
    with with_file_name(data):
        scored = score_dataset(rows, trained, options, **how)
    write_dataset(scored, output)
    found = provenance_of(scored)
    assert found is not None
    return found


def _training_template(tokenizer: str) -> str | None:
    """Return the template that TRL trains a tokenizer's model with, where TRL is installed."""
    from star_dss_plugin.models.loading import load_tokenizer

    try:
        trl: Any = importlib.import_module("star_dss_trl.templates")
    except (ImportError, RuntimeError):
        return None
    template: str | None = trl.training_template(load_tokenizer(tokenizer))
    return template
