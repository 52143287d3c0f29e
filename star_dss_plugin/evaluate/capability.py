"""Measure capability with lm-eval (the EleutherAI harness), used as a library.

Tasks are lm-eval's own, by name, whose data comes from the Hub, or local files of two formats, for
which `tasks/` has task definitions. lm-eval computes all numbers, standard errors included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from packaging.version import Version

from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.validation import nearest, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Measured", "Tasks", "check_lm_eval", "compared", "open_tasks", "run_tasks"]


# Prefix of tasks from files, so that no file can have the name of one of lm-eval's tasks.
_LOCAL = "file:"
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "n-samples",
    "n-shot",
    "versions",
    "higher_is_better",
    "lm_eval_version",
    "transformers_version",
)


@dataclass(frozen=True)
class Tasks:
    """Hold tasks that were checked and whose data is loaded."""

    names: tuple[str, ...]
    """Names of the tasks in lm-eval."""
    manager: Any
    """lm-eval's TaskManager, which also knows the tasks from files."""


@dataclass(frozen=True)
class Measured:
    """Hold one number of one task, for one or several models."""

    task: str
    metric: str
    """Includes lm-eval's filter, if there is one: "exact_match (strict-match)"."""
    shots: int | None
    rows: int | None
    """Number of evaluated rows; None for a group of tasks."""
    values: tuple[tuple[float, float | None] | None, ...]
    """For each model the value and lm-eval's standard error; None if the model has no value."""


def check_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    require("lm_eval", "evaluate", "Measuring capability")


@contextmanager
def open_tasks(
    names: Sequence[str] = (),
    data: Mapping[str, str | Path] | None = None,
    *,
    num_fewshot: int | None = None,
) -> Iterator[Tasks]:
    """Find, check and load tasks, before any model is loaded.

    It is a context manager, because lm-eval reads the tasks from temporary files.

    Args:
        names: Tasks, groups or tags of lm-eval; their data comes from the Hub.
        data: Maps a name to a .jsonl file with `prompt`, `choices`, `answer` (the index of the
            right choice), or with `prompt`, `response`, `answer` (the end of the response, after
            "####"). The task is called `file:NAME`.
        num_fewshot: Examples before each question, to check that the files have enough rows.

    Raises:
        ConfigError: A task is unknown, cannot be loaded or executes code that a model writes.
        DataError: A file does not have one of the two formats.
    """
    check_lm_eval()
    from lm_eval.tasks import TaskManager

    if not names and not data:
        raise ConfigError(
            "No task was given. Name lm-eval's with --tasks, or your files with --tasks-data "
            "NAME=FILE."
        )
    local = {f"{_LOCAL}{label}": Path(path) for label, path in (data or {}).items()}
    with TemporaryDirectory(prefix="star-dss-tasks-") as folder:
        for number, (name, path) in enumerate(local.items()):
            definition = _definition(name, path, num_fewshot)
            text = yaml.safe_dump(definition, allow_unicode=True)
            (Path(folder) / f"{number}.yaml").write_text(text, encoding="utf-8")
        # Indexing lm-eval's thousands of definitions takes seconds, and local files need none.
        manager = TaskManager(include_path=folder, include_defaults=bool(names))
        known = manager.all_tasks
        for name in names:
            if name not in known:
                near = nearest(name, known)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ConfigError(
                    f"lm-eval {version('lm-eval')} has no task {name!r}.{hint} All of them: "
                    "lm_eval ls tasks"
                )
        wanted = (*names, *local)
        for name in wanted:
            _check_loads(manager, name)
        yield Tasks(wanted, manager)


def _definition(name: str, path: Path, num_fewshot: int | None) -> dict[str, Any]:
    """Return a packaged task definition for lm-eval with the name and the file added."""
    if path.suffix not in (".jsonl", ".json") or not path.is_file():
        what = "is not a .jsonl file" if path.is_file() else "does not exist"
        raise DataError(f"{path}, the data of {name!r}, {what}. Give a file of JSON lines.")
    if set(str(path.resolve())) & set("*?[]") or "::" in str(path):
        raise DataError(
            f"{path}, the data of {name!r}, has a name that lm-eval would read as a pattern, which "
            "may match another file. Rename it."
        )
    rows = read_dataset(str(path)).to_list()
    shape = _shape(rows, path)
    source = files("star_dss_plugin.evaluate").joinpath("tasks", f"{shape}.yaml")
    found: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    shots = found.get("num_fewshot", 0) if num_fewshot is None else num_fewshot
    if len(rows) <= shots:
        raise DataError(
            f"{path} has {len(rows)} rows, too few for {shots} examples and a question. Give more "
            "rows, or fewer examples with --num-fewshot."
        )
    return {**found, "task": name, "dataset_kwargs": {"data_files": {"test": str(path.resolve())}}}


def _shape(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Return the name of the packaged definition that fits all rows, or raise a DataError."""
    if not rows:
        raise DataError(f"{path} has no rows, so there is nothing to ask. Give one or more.")
    shape = "choices" if rows[0].get("choices") is not None else "worked_answers"
    for number, row in enumerate(rows):
        wrong = None
        if not _text(row.get("prompt")):
            wrong = "'prompt' must be a text"
        elif shape == "choices":
            choices, answer = row.get("choices"), row.get("answer")
            if not (isinstance(choices, list) and len(choices) > 1 and all(map(_text, choices))):
                wrong = "'choices' must be two or more texts"
            elif type(answer) is not int or not 0 <= answer < len(choices):
                wrong = "'answer' must be the index of the right choice, counted from 0"
        elif not (_text(row.get("response")) and _text(row.get("answer"))):
            wrong = "it needs 'choices', or the texts 'response' and 'answer'"
        if wrong:
            raise DataError(f"{wrong}.").at(file=str(path), rows=(number,))
    return shape


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_loads(manager: Any, name: str) -> None:
    """Load a task once with its data, so that errors are raised before models are loaded."""
    try:
        if Version(version("lm-eval")) >= Version("0.4.12"):
            tasks = list(manager.load([name])["tasks"].values())
        else:  # Axolotl 0.19 pins lm-eval 0.4.11; remove this branch with it
            tasks = list(_leaves(manager.load_task_or_group([name])))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"The task {name!r} cannot be loaded: {type(error).__name__}: {error}. The data of "
            "lm-eval's tasks comes from the hub; without it, give files with --tasks-data."
        ) from error
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"The task {name!r} runs code that the model writes, on this machine, and this "
                "command never confirms that. Use lm_eval itself, in a container."
            )


def _leaves(nested: Mapping[Any, Any]) -> Iterator[Any]:
    for value in nested.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = False,
    seed: int = 1234,
) -> dict[str, Any]:
    """Run all tasks on one model.

    Args:
        model: The model, on the device where it runs; adapters must be merged.
        tokenizer: The model's tokenizer.
        tasks: Tasks from `open_tasks`, inside its context.
        limit: Largest number of rows per task; None is all.
        num_fewshot: Examples before each question; None is each task's default.
        batch_size: Requests per batch.
        chat_template: Whether questions become user turns.
        seed: Seed for drawing examples.

    Returns:
        lm-eval's result as JSON values, without samples and machine details.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    whole: Any = model
    found = simple_evaluate(
        model=HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        confirm_run_unsafe_code=False,
    )
    assert found is not None  # lm-eval returns None on ranks other than 0 only
    plain = _plain({key: found[key] for key in _KEPT if key in found})
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    """Convert to JSON values; a missing standard error ("N/A", NaN) becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return None if value == "N/A" else value
    number = float(value)
    return number if math.isfinite(number) else None


def compared(results: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """Return the numbers of the requested tasks side by side; a group counts as one task.

    Args:
        results: Results of `run_tasks` for each model, with the same tasks.
    """
    first = results[0]
    subtasks = {s for parts in first.get("group_subtasks", {}).values() for s in parts}
    rows = []
    for task, numbers in first["results"].items():
        if task in subtasks:
            continue
        for key in numbers:
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue  # "alias", "sample_len", …
            values = []
            for one in results:
                own = one["results"].get(task, {})
                value = own.get(key)
                error = own.get(f"{metric}_stderr,{kind}")
                values.append(None if value is None else (value, error))
            rows.append(
                Measured(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    shots=first.get("n-shot", {}).get(task),
                    rows=first.get("n-samples", {}).get(task, {}).get("effective"),
                    values=tuple(values),
                )
            )
    return rows
