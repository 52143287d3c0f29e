"""Register the built-in guards, segmenters, weight maps and integrations, as a plugin does."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

from star_dss_plugin.guards.presets import CLASSIFIER, PRESETS
from star_dss_plugin.hookspecs import (
    GuardInfo,
    Integration,
    Register,
    RegisterGuard,
    RegisterIntegration,
    Starter,
    hookimpl,
)

__all__: list[str] = []


def _preset_guard(name: str, **options: Any) -> Any:
    preset = PRESETS[name]
    return pkgutil.resolve_name(preset.kind)(**{"name": name, **preset.options, **options})


@hookimpl
def star_dss_register_guards(register: RegisterGuard) -> None:
    for name, preset in PRESETS.items():
        register(name, partial(_preset_guard, name), summary=preset.title, info=preset.info)
    register(
        "classifier",
        CLASSIFIER,
        summary="any encoder that classifies (prompt, response)",
        info=GuardInfo(reads="again"),
    )
    register(
        "demo",
        "star_dss_plugin.guards.demo.guard:DemoGuard",
        summary="DEMONSTRATION ONLY: SmolLM2-135M with a linear probe; protects nobody",
        info=GuardInfo("Apache-2.0", billions=0.1, reads="once"),
    )


@hookimpl
def star_dss_register_segmenters(register: Register) -> None:
    for name, summary in (
        ("tokens", "every chunk_size trained tokens (default)"),
        ("words", "every chunk_size whitespace-separated words"),
        ("sentences", "every chunk_size sentences"),
        ("whole", "the whole response"),
    ):
        register(name, f"star_dss_plugin.segmenters:{name}", summary=summary)


@hookimpl
def star_dss_register_weight_maps(register: Register) -> None:
    for name, summary in (
        ("star_dss", "CE s_t, KL λ(1 − s_t): the paper's method (default)"),
        ("hard", "CE where s_t >= τ, KL λ elsewhere"),
        ("static", "CE s_last, KL λ(1 − s_last): one weight per turn"),
        ("rejection", "CE where s_last >= τ, nothing elsewhere"),
        ("kl_only", "KL λ everywhere"),
        ("sft", "CE everywhere: plain finetuning (TRL calls it nll)"),
    ):
        register(name, f"star_dss_plugin.weights:{name}", summary=summary)


def _has_any(raw: Mapping[str, Any], *, keys: frozenset[str]) -> bool:
    return not keys.isdisjoint(raw)


@hookimpl
def star_dss_register_integrations(register: RegisterIntegration) -> None:
    register(
        "trl",
        Integration(
            host="trl",
            versions=">=1.9,<2",
            install="star-dss-plugin[trl]",
            trainer="star_dss_trl:StarDSSTrainer",
            options="star_dss_trl:StarDSSConfig",
            configuration="a YAML of `star-dss sft`, with model_name_or_path and dataset_name",
            claims=partial(_has_any, keys=frozenset({"model_name_or_path", "dataset_name", "env"})),
            check="star_dss_trl.check:check",
            commands={"sft": "star_dss_trl.sft:main", "demo": "star_dss_trl.demo:run"},
            starters={
                "trl": Starter(
                    "run.yaml",
                    "star_dss_trl.starters:configuration",
                    ("star-dss check {file}", "star-dss sft --config {file}"),
                    "a YAML for TRL's command line",
                ),
                "script": Starter(
                    "train.py",
                    "star_dss_trl.starters:script",
                    ("python {file}",),
                    "a Python script with TRL's trainer",
                ),
            },
        ),
    )
    register(
        "axolotl",
        Integration(
            host="axolotl",
            versions=">=0.19,<0.22",
            install="star-dss-plugin[axolotl]",
            trainer="star_dss_axolotl:StarDSSPlugin",
            options="star_dss_axolotl.args:StarDSSBlock",
            configuration="a YAML of Axolotl, with base_model, plugins and a star_dss block",
            claims=partial(_has_any, keys=frozenset({"base_model", "plugins"})),
            check="star_dss_axolotl.check:check",
            starters={
                "axolotl": Starter(
                    "config.yaml",
                    "star_dss_axolotl.starters:configuration",
                    ("star-dss check {file}", "axolotl preprocess {file}", "axolotl train {file}"),
                    "a YAML for Axolotl",
                ),
            },
        ),
    )
