"""Check Axolotl's YAML for `star-dss check`, including errors that Axolotl itself ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import load_plugin
from datasets import IterableDataset

from star_dss_axolotl.args import PLUGIN, StarDSSBlock, is_listed, options_of
from star_dss_axolotl.conflicts import conflicts
from star_dss_axolotl.media import make_media_rows, strategy_of
from star_dss_axolotl.scoring import chat_of
from star_dss_axolotl.streams import load_stream
from star_dss_plugin.errors import StarDSSError
from star_dss_plugin.guards.spec import missing_guard
from star_dss_plugin.hookspecs import Findings
from star_dss_plugin.training.preflight import (
    check_options,
    describe_stream,
    estimate,
    estimate_of_media,
    lacks_guard,
)
from star_dss_plugin.training.rows.stream_checks import check_stream
from star_dss_plugin.validation import nearest

__all__ = ["check"]


def check(path: Path, raw: dict[str, Any], *, data: bool) -> Findings:
    """Check a configuration as written, then as Axolotl validates it.

    Args:
        path: The configuration's file.
        raw: Its contents.
        data: Whether to load the data.

    Returns:
        Notes on the run, and problems that would stop it or make it plain finetuning.
    """
    found = Findings(problems=[*_plugin_problems(raw), *conflicts(raw)])
    block = raw.get("star_dss")
    if block is not None:
        try:
            StarDSSBlock.model_validate(block)
        except ValueError as error:
            found.problems.append(f"The star_dss block is not valid: {error}")
        else:
            options = options_of({"star_dss": block})
            assert options is not None
            looked_up = check_options(options)
            found.notes += looked_up.notes
            found.problems += looked_up.problems
    if not found.problems:
        _check_with_axolotl(raw, found, data=data)
    return found


def _plugin_problems(raw: dict[str, Any]) -> list[str]:
    """Find why Axolotl would ignore the plugin or its block, and train without STAR-DSS."""
    problems = []
    plugins = [str(name) for name in raw.get("plugins") or ()]
    for name in plugins:
        try:
            load_plugin(name)
        except Exception as error:  # a plugin may raise anything while it is imported
            hint = f" Did you mean {PLUGIN}?" if _nearest_name(PLUGIN, [name]) else ""
            problems.append(
                f"The plugin {name} cannot be loaded ({type(error).__name__}: {error}). Axolotl "
                f"may only log that and train without it.{hint}"
            )
    if raw.get("star_dss") is None:
        from axolotl.utils.schemas.config import AxolotlInputConfig

        known = {"star_dss", *AxolotlInputConfig.model_fields}
        near = _nearest_name("star_dss", [str(key) for key in raw if key not in known])
        what = (
            f"it has {near!r}, which Axolotl drops. Call it star_dss"
            if near
            else "add one that names a guard"
        )
        problems.append(f"There is no star_dss block: {what}.")
    if not is_listed(raw):
        near = _nearest_name(PLUGIN, plugins)
        what = f" (it lists {near})" if near else ""
        problems.append(
            f"The plugin is not listed{what}, so Axolotl drops the star_dss block and trains "
            f"without a safety loss. Add it:\nplugins:\n  - {PLUGIN}"
        )
    return problems


def _nearest_name(name: str, given: list[str]) -> str | None:
    return next(iter(nearest(name, given, limit=1)), None)


def _check_with_axolotl(raw: dict[str, Any], findings: Findings, *, data: bool) -> None:
    """Validate the configuration with Axolotl, load the data with it, and add estimates."""
    from axolotl.cli.config import gpu_capabilities, plugin_set_cfg, prepare_plugins
    from axolotl.common.datasets import load_datasets
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(raw)
    capabilities, environment = gpu_capabilities()
    try:
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=capabilities, env_capabilities=environment)
        if not data:
            return
        normalize_config(cfg)
        normalize_cfg_datasets(cfg)
        plugin_set_cfg(cfg)
        loaded = load_stream(cfg) if cfg.streaming else load_datasets(cfg=cfg)
        tokenizer = load_tokenizer(cfg)
    except Exception as error:  # any error of Axolotl would stop the run, too
        findings.problems.append(f"Axolotl refuses it: {type(error).__name__}: {error}")
        return
    options = options_of(cfg)
    assert options is not None
    chat = chat_of(cfg, tokenizer)
    for name, dataset in (("train", loaded.train_dataset), ("eval", loaded.eval_dataset)):
        if dataset is None:
            continue
        if isinstance(dataset, IterableDataset):
            try:
                check_stream(name, options)
                findings.notes.append(f"{name} data: {describe_stream(dataset, options)}")
            except StarDSSError as error:
                findings.problems.append(str(error))
            continue
        if lacks_guard(dataset, options):
            findings.problems.append(str(missing_guard()))
            return
        if "input_ids" not in dataset.column_names:
            try:
                reader = make_media_rows(strategy_of(cfg, tokenizer))
                said = estimate_of_media(dataset, name, reader, options)
                findings.notes.append(f"{name} data: {said}")
            except StarDSSError as error:
                findings.problems.append(str(error))
            continue
        findings.notes.append(f"{name} data: {estimate(dataset, chat, options)}")
