"""Check a configuration file with the integration that claims it: `star-dss check`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from star_dss_plugin.errors import ConfigError, PluginError
from star_dss_plugin.hookspecs import Findings
from star_dss_plugin.plugins import Plugins, load_plugins
from star_dss_plugin.validation import unknown_name
from star_dss_plugin.visible import visible

__all__ = ["check", "check_config"]


def check(
    config: Annotated[Path, typer.Argument(help="A YAML for one of the host frameworks.")],
    data: Annotated[
        bool, typer.Option(help="Load the data too, to estimate the tokens that a guard reads.")
    ] = True,
    integration: Annotated[
        str | None,
        typer.Option(help="The integration that the file is for; default: the one that claims it."),
    ] = None,
) -> None:
    """Check a configuration before it costs anything; exit status 1 if a run would not work."""
    found = check_config(config, data=data, integration=integration)
    for note in found.notes:
        typer.echo(visible(note))
    for problem in found.problems:
        typer.echo(f"Problem: {visible(problem)}", err=True)
    if found.problems:
        raise typer.Exit(1)
    typer.echo(f"{config}: no problem found")


def check_config(path: Path, *, data: bool, integration: str | None = None) -> Findings:
    """Check a YAML file as its integration checks it.

    Args:
        path: The file.
        data: Whether to load and tokenize the data, to estimate the cost of scoring.
        integration: The name of the integration; None is the one that claims the file.

    Returns:
        Notes on a run, and problems that would stop it.

    Raises:
        ConfigError: The file cannot be read, or no integration or several claim it.
        PluginError: The host framework is not installed, or the integration's check does not
            return `Findings`.
    """
    raw = _read(path)
    plugins = load_plugins()
    name = _choose(path, raw, plugins) if integration is None else integration
    if name not in (known := plugins.names("integration")):
        raise unknown_name("integration", name, known)
    host = plugins.host(name)
    what = f"{path} is a configuration for {name} and"
    # Checked first, because a run cannot start without its trainer.
    plugins.import_target(name, host.integration.trainer, what)
    options = plugins.import_target(name, host.integration.options, what)
    checked = plugins.import_target(name, host.integration.check, what)(path, raw, data=data)
    if not isinstance(checked, Findings):
        raise PluginError(
            f"The check of the integration {name!r} returned {type(checked).__name__}, not "
            "Findings, so the file was not checked. Report it to the integration's authors."
        )
    if host.installed is not None and not host.supported:
        checked.notes.append(
            f"host: {host.integration.host} {host.installed} is installed, and the integration was "
            f"tested with {host.integration.versions}"
        )
    if missing := _missing_options(options):
        checked.notes.append(
            f"options: {name} cannot set {', '.join(missing)}, which keep their defaults"
        )
    return checked


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Bytes that are no UTF-8 and dates that are no dates are ValueErrors; brackets can be too deep.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give a YAML file.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}. Give a YAML file with options.")
    if strange := [key for key in raw if not isinstance(key, str)]:
        raise ConfigError(f"{path} has the key {strange[0]!r}; keys are the names of options.")
    return raw


def _choose(path: Path, raw: dict[str, Any], plugins: Plugins) -> str:
    """Return the integration that claims a configuration.

    Raises:
        ConfigError: None does, or several do.
    """
    claimants = plugins.claimants(raw)
    if len(claimants) == 1:
        return claimants[0]
    asked = claimants or plugins.names("integration")
    known = "\n".join(f"  {name}: {plugins.host(name).integration.configuration}" for name in asked)
    if claimants:
        raise ConfigError(
            f"{path} could be a configuration for each of {' and '.join(claimants)}:\n{known}\n"
            f"Remove what belongs to the others, or say which it is: --integration {claimants[0]}"
        )
    keys = f"the keys {', '.join(raw)}" if raw else "no keys"
    raise ConfigError(
        f"{path} has {keys}, and no integration recognizes it. Known are:\n{known}\n"
        "Correct its keys, name its integration with --integration NAME, or install the plugin "
        "that has it (`star-dss plugins` lists those that are installed)."
    )


def _missing_options(options: Any) -> list[str]:
    """Return the options of STAR-DSS that an integration's class of options does not take."""
    from star_dss_plugin.options import StarDSSOptions

    taken = inspect.signature(options).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return []
    return sorted(set(StarDSSOptions().star_dss_dict()) - {p.name for p in taken})
