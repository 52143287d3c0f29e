"""Count the Axolotl configurations that pass validation with the `star_dss:` block added.

    python benchmarks/acceptance.py axolotl/examples
    python benchmarks/acceptance.py axolotl/examples runs/*.yaml --gpus 1

Run it in an environment with Axolotl. Each supervised configuration is validated twice, as Axolotl
does before training, with the capabilities of a machine with H100s: unchanged, and with the block
and the plugin added. No model and no data are loaded. Every validation runs in its own process,
because Axolotl keeps plugins and schemas for the whole process.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

os.environ |= {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}

PLUGIN = "star_dss_axolotl.StarDSSPlugin"
NOT_SUPERVISED = ("rl", "reward_model", "process_reward_model", "pretraining_dataset")
IMPORTED_ONCE = ["axolotl.cli.config", "star_dss_axolotl.plugin"]
"""Modules that the fork server imports once, because Axolotl takes seconds to import."""


def is_supervised(config: Any) -> bool:
    """Return whether a file is a configuration that finetunes on responses."""
    if not isinstance(config, Mapping) or not {"base_model", "datasets"} <= config.keys():
        return False
    return not any(config.get(name) for name in NOT_SUPERVISED)


def configurations(paths: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the supervised configurations among files and in folders, sorted by path."""
    for path in paths:
        found = sorted(path.rglob("*.y*ml")) if path.is_dir() else [path]
        for file in found:
            with contextlib.suppress(yaml.YAMLError):
                config = yaml.safe_load(file.read_text(encoding="utf-8"))
                if is_supervised(config):
                    yield file, config


def with_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the plugin and its block added, as the README says."""
    plugins = [*(config.get("plugins") or ()), PLUGIN]
    return {**config, "plugins": plugins, "star_dss": {"guard": "qwen3guard-gen-0.6b"}}


def refusal(config: Mapping[str, Any], gpus: int) -> str:
    """Return why Axolotl's validation stops; "" if it does not."""
    from axolotl.cli.config import gpu_capabilities, prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    logging.disable()  # Axolotl's lines would hide those of this program
    os.environ["WORLD_SIZE"] = str(gpus)
    capabilities, environment = gpu_capabilities()
    capabilities |= {"bf16": True, "fp8": True, "tf32": True}
    capabilities |= {"n_gpu": gpus, "compute_capability": "sm_90"}
    made = DictDefault(config)
    try:
        prepare_plugins(made)
        validate_config(made, capabilities=capabilities, env_capabilities=environment)
    except Exception as error:  # any error stops Axolotl
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def main() -> int:
    """Print each configuration that is valid only without the block, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("paths", nargs="+", type=Path, help="YAML files, or folders of them")
    parser.add_argument("--gpus", type=int, default=8, help="devices of the pretended machine")
    parser.add_argument("--jobs", type=int, default=2, help="validations at once")
    args = parser.parse_args()
    found = list(configurations(args.paths))
    if not found:
        parser.error("no supervised configuration of Axolotl is there (base_model and datasets)")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        gpus = [args.gpus] * len(found)
        stock = pool.map(refusal, [config for _, config in found], gpus)
        ours = pool.map(refusal, [with_block(config) for _, config in found], gpus)
        stopped = list(zip((path for path, _ in found), stock, ours, strict=True))
    valid = [(path, ours) for path, stock, ours in stopped if not stock]
    refused = [(path, why) for path, why in valid if why]
    for path, why in refused:
        print(f"{path}: {why[:300]}")
    print(
        f"{len(found)} supervised configurations; {len(valid)} pass Axolotl's validation as they "
        f"are, {len(valid) - len(refused)} of these with the block"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
