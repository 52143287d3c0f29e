"""Write a first run: `star-dss init`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.tables import terminal
from star_dss_plugin.visible import visible

if TYPE_CHECKING:
    from star_dss_plugin.plugins import Plugins

__all__ = ["init"]

T = TypeVar("T")
_DEFAULT_GUARD = "qwen3guard-gen-0.6b"


def init(
    host: Annotated[
        str | None, typer.Option(help="What to write: trl, script or axolotl, or a plugin's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Id or folder of the model to train, or smollm2.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A .jsonl or .parquet file, a folder, an id, or demo.")
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="A registered guard, or a JSON mapping, as in scoring.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; must be new.")
    ] = None,
) -> None:
    """Write a first run for TRL or Axolotl, from four answers; asks for those not given."""
    from star_dss_plugin.cli import first_rows
    from star_dss_plugin.plugins import load_plugins

    plugins = load_plugins()
    ask = _Asker({"--host": host, "--model": model, "--data": data})
    chosen = ask("--host", "Write it for", lambda name: _host(plugins, name), _installed(plugins))
    starter = plugins.host(chosen[0]).integration.starters[chosen[1]]
    path = output or Path(starter.file)
    if os.path.lexists(path):
        raise _exists(path)
    write = plugins.import_target(chosen[0], starter.write, f"`star-dss init --host {chosen[1]}`")
    trained = ask(
        "--model", "Model to train (an id, a folder, or smollm2)", first_rows.checked_model
    )
    rows = ask("--data", "Data (a file, a folder, an id, or demo)", first_rows.describe_rows)
    mapping: str | Mapping[str, Any] | None = None
    if rows.form != "scored":
        ask.given["--guard"] = guard
        question = "Guard (`star-dss guards` lists them)"
        mapping = ask("--guard", question, _guard, _DEFAULT_GUARD)
    elif guard is not None:
        raise ConfigError(
            f"{rows.data} is scored already, and --guard is {guard!r}. Leave the guard out, or "
            "name the data without scores."
        )
    start = first_rows.start_from(trained, rows, mapping)
    _write_new(path, write(start))
    console = terminal()
    console.print(visible(f"{rows.data}: {rows.description}"))
    console.print(visible(f"Wrote {path}. Next:"), soft_wrap=True)
    for command in starter.then:
        said = command.replace("{file}", shlex.quote(str(path)))
        console.print(visible(f"    {said}"), soft_wrap=True)


class _Asker:
    """Return values given as flags, and prompt for missing ones if there is a terminal."""

    def __init__(self, given: dict[str, str | None]) -> None:
        self.given = given

    def __call__(
        self, flag: str, question: str, check: Callable[[str], T], default: str | None = None
    ) -> T:
        """Return a checked answer.

        Raises:
            StarDSSError: The flag's value is invalid, or it is missing and there is no terminal.
        """
        value = self.given[flag]
        if value is not None:
            return check(value)
        if not sys.stdin.isatty():
            missing = ", ".join(name for name, one in self.given.items() if one is None)
            raise ConfigError(
                f"{missing}: not given, and there is no terminal to ask on. For example: star-dss "
                "init --host trl --model smollm2 --data demo --guard demo"
            )
        while True:
            try:
                return check(typer.prompt(question, default=default))
            except StarDSSError as error:
                terminal(stderr=True).print(visible(str(error)))


def _installed(plugins: Plugins) -> str | None:
    """Return the first value of `--host` whose framework is installed; None without one."""
    return next((n for n, h in plugins.starters().items() if plugins.host(h).installed), None)


def _host(plugins: Plugins, name: str) -> tuple[str, str]:
    from star_dss_plugin.validation import unknown_name

    known = plugins.starters()
    if name not in known:
        raise unknown_name("--host", name, known)
    return known[name], name


def _guard(given: str) -> str | Mapping[str, Any]:
    from star_dss_plugin.guards.spec import parse_guard
    from star_dss_plugin.validation import json_mapping

    if not given.lstrip().startswith("{"):
        parse_guard(given)
        return given
    from star_dss_plugin.guards.loading import load_guard

    guard: Mapping[str, Any] = json_mapping("guard", given)
    load_guard(guard).close()  # reads no weights, but checks what the mapping describes
    return guard


def _exists(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists, and nothing was written. Name another file: --output FILE")


def _write_new(path: Path, text: str) -> None:
    """Write a new file; remove it again if it cannot be written completely.

    Raises:
        ConfigError: The file exists.
        OutputError: The file cannot be written.
    """
    from star_dss_plugin.data.writing import writing

    with writing(path):
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError as error:
            raise _exists(path) from error
        try:
            with file:
                file.write(text)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
