"""Describe a run at its start and its end, and record it in `star_dss.json` and the model card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_dss_plugin._version import __version__
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.plugins import load_plugins
from star_dss_plugin.tables import Sheet
from star_dss_plugin.training.rows.summary import DatasetSummary
from star_dss_plugin.visible import as_code, visible_line

if TYPE_CHECKING:
    from star_dss_plugin.training.state import StarDSSState

__all__ = [
    "add_section",
    "changed_options",
    "check_reference",
    "run_record",
    "startup_line",
    "stream_line",
    "summary_table",
]

_PREFIX = "star_dss/"


def summary_table(
    log_history: Sequence[Mapping[str, Any]], train: DatasetSummary, loss_type: str
) -> Sheet | None:
    """Return a table of the loss and every `star_dss/` metric at the first and last logged step.

    Args:
        log_history: The trainer's log (`trainer.state.log_history`).
        train: Summary of the training set.
        loss_type: The run's loss type.

    Returns:
        The table; None if no training step with these metrics was logged.
    """
    lines = [
        line
        for line in log_history
        if "loss" in line and any(name.startswith(_PREFIX) for name in line)
    ]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(_PREFIX))
    return Sheet(
        ("metric", *(f"step {line.get('step', '?')}" for line in (first, last))),
        [
            (name, *("-" if v is None else f"{v:.4g}" for v in (first.get(name), last.get(name))))
            for name in ("loss", *names)
        ],
        title=f"STAR-DSS: loss_type={loss_type}, guard={visible_line(train.guard)}, "
        f"{train.responses} responses, {train.below_threshold} of "
        f"{train.trained_tokens} tokens below the threshold",
    )


_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft")


def startup_line(active: StarDSSState) -> str:
    """Return the line that every run with an active loss prints at its start."""
    options, train = active.options, active.summaries["train"]
    share = train.below_threshold / train.trained_tokens
    # Correct for data that is all safe, but also the sign of a broken guard or a made-up column.
    so_far = " so far" if train.streamed else ""
    plain = (
        f" Every score{so_far} is 1, so this is plain finetuning: check the guard, or where the "
        "star_scores column comes from."
    )
    return (
        f"STAR-DSS is active: loss_type={options.loss_type} (kl_coef={options.kl_coef}, "
        f"kl_estimator={options.kl_estimator}), guard={visible_line(train.guard)}, "
        f"reference={active.reference.description}; {_streamed(active)}{train.responses} responses "
        f"scored, {train.below_threshold} of {train.trained_tokens} trained tokens ({share:.1%}) "
        f"below {options.threshold}, mean score {train.mean_score:.3f}."
        + (plain if active.shaping.needs_scores and train.mean_score == 1 else "")
    )


def _streamed(active: StarDSSState) -> str:
    """Return the words of the start-up line on a training stream; "" for a data set."""
    train = active.summaries["train"]
    if not train.streamed:
        return ""
    said = "the training data is a stream"
    if active.kept_guard is not None and active.kept_guard.loaded:
        said += (
            f", scored {active.options.stream_buffer} rows at a time: training waits for that, and "
            "the guard stays in memory (not if the data is scored beforehand)"
        )
    return f"{said}; of its first {train.rows} rows: "


def stream_line(train: DatasetSummary, seconds: float, of: float) -> str:
    """Return the line on the rows that a run has read from a stream.

    Args:
        train: Summary of these rows.
        seconds: Seconds that reading and scoring took in this process.
        of: Seconds that training took.
    """
    return (
        f"STAR-DSS has read {train.rows} rows of the stream: {train.responses} responses scored, "
        f"{train.below_threshold} of {train.trained_tokens} trained tokens "
        f"({train.below_threshold / train.trained_tokens:.1%}) below the threshold, mean score "
        f"{train.mean_score:.3f}. Training waited {seconds:.1f} s of {of:.1f} s for that "
        f"({seconds / of:.0%})."
    )


def run_record(active: StarDSSState) -> dict[str, Any]:
    """Return the contents of `star_dss.json`: options, reference, data, versions."""
    hosts = (host.integration.host for host in load_plugins().hosts())
    return {
        "options": active.options.star_dss_dict(),
        "reference": active.reference.description,
        "reference_fingerprint": active.reference.fingerprint,
        "data": {name: asdict(summary) for name, summary in active.summaries.items()},
        "versions": {"star-dss-plugin": __version__, **dict(_installed([*_PACKAGES, *hosts]))},
    }


def changed_options(active: StarDSSState, output_dir: str | Path) -> str:
    """Return the options that differ from the record in an output folder; "" if none differs."""
    path = Path(output_dir) / "star_dss.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["options"]
        return ", ".join(
            f"{name}={value!r} (was {before[name]!r})"
            for name, value in json.loads(json.dumps(active.options.star_dss_dict())).items()
            if name in before and before[name] != value and name != "score_cache_dir"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # no record, or not one of this package


def check_reference(active: StarDSSState, output_dir: str | Path) -> None:
    """Check that a resumed run has the reference that it began with.

    Raises:
        ConfigError: The record in the output folder has the fingerprint of other weights.
    """
    try:
        record = json.loads((Path(output_dir) / "star_dss.json").read_text(encoding="utf-8"))
        before, named = record["reference_fingerprint"], record["options"]["reference"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no record, or not one of this package
    now = active.reference.fingerprint
    if before and now and before != now and named == active.options.reference:
        raise ConfigError(
            "The reference is another model than the one that this run began with: the model that "
            "was given starts with other weights, such as those of a checkpoint. Give the model "
            "that the run began with, and the checkpoint as resume_from_checkpoint, which loads "
            "its weights; or name a new output_dir to go on from here with a new reference."
        )


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def add_section(output_dir: Path) -> None:
    """Add a section on STAR-DSS to the README.md in the output folder, or replace it there."""
    card, record = output_dir / "README.md", output_dir / "star_dss.json"
    if not card.is_file() or not record.is_file():
        return
    section = _section(json.loads(record.read_text(encoding="utf-8")))
    before, heading, after = card.read_text(encoding="utf-8").partition(f"{_HEADING}\n")
    _, other, rest = after.partition("\n## ") if heading else ("", "", "")
    write_text(card, f"{before.rstrip()}\n\n{section}{other}{rest}")


_HEADING = "## STAR-DSS"


_SHAPED = {
    "star_dss": "the safer a token, the more it was learned, and the less it was held to a frozen "
    "reference",
    "static": "the safer a response was as a whole, the more it was learned, and the less it was "
    "held to a frozen reference",
    "hard": "tokens with a score of τ or more were learned, the others held to a frozen reference",
    "rejection": "responses whose last score is below τ were not learned; nothing was held to a "
    "reference",
    "kl_only": "nothing was learned, and every token held to a frozen reference",
    "sft": "every token was learned, whatever its score",
}


def _section(run: dict[str, Any]) -> str:
    options, train = run["options"], run["data"]["train"]
    shaped = _SHAPED.get(options["loss_type"], "a plugin decides what a score does to the loss")
    share = train["below_threshold"] / train["trained_tokens"]
    stream = f" in {train['rows']} rows of a stream" if train.get("streamed") else ""
    return f"""{_HEADING}

Finetuned with star-dss-plugin ([STAR-DSS](https://arxiv.org/abs/2505.17196)), for which a guard
model scores every prefix of every response. With `{options["loss_type"]}`, {shaped}.

| | |
|---|---|
| loss | `{options["loss_type"]}`, λ = {options["kl_coef"]}, estimator `{options["kl_estimator"]}` |
| guard | {as_code(train["guard"])}, one score per {options["chunk_size"]} {options["segmenter"]} |
| reference | {as_code(run["reference"])} |
| data | {train["responses"]} responses, {train["trained_tokens"]} trained tokens{stream} |
| below τ = {options["threshold"]} | {share:.1%} of the trained tokens (mean score \
{train["mean_score"]:.3f}) |
"""
