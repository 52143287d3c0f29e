"""The built-in guards, segmenters, weight maps and integrations, registered like a plugin's."""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import Any

from star_dss_plugin.guards.presets import CLASSIFIER, PRESETS
from star_dss_plugin.hookspecs import Register, RegisterIntegration, hookimpl

__all__: list[str] = []


def _preset_guard(name: str, **options: Any) -> Any:
    preset = PRESETS[name]
    return pkgutil.resolve_name(preset.kind)(**{"name": name, **preset.options, **options})


@hookimpl
def star_dss_register_guards(register: Register) -> None:
    for name, preset in PRESETS.items():
        register(name, partial(_preset_guard, name), summary=preset.summary)
    register("classifier", CLASSIFIER, summary="any encoder that classifies (prompt, response)")
    register(
        "demo",
        "star_dss_plugin.guards.demo.guard:DemoGuard",
        summary="DEMONSTRATION ONLY: SmolLM2-135M with a linear probe; protects nobody",
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


@hookimpl
def star_dss_register_integrations(register: RegisterIntegration) -> None:
    register("trl", "star_dss_trl:StarDSSTrainer", host="trl", versions=">=1.9,<2")
    register("axolotl", "star_dss_axolotl:StarDSSPlugin", host="axolotl", versions=">=0.19,<0.22")
