"""Implement the hooks that Axolotl calls (`StarDSSPlugin`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

from star_dss_axolotl.args import PLUGIN, is_listed, options_of
from star_dss_axolotl.conflicts import conflicts
from star_dss_axolotl.kernels import add_kernel_methods
from star_dss_axolotl.replaced import change_settings
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.smollm2 import SMOLLM2, resolve_model

if TYPE_CHECKING:
    from axolotl.common.datasets import TrainDatasetMeta

__all__ = ["StarDSSPlugin"]


class StarDSSPlugin(BasePlugin):  # type: ignore[misc]
    """Score the data for Axolotl, provide the trainer with the loss, and check that it is used.

    Axolotl's heavier modules are imported inside the hooks: their first import builds classes from
    the plugins that are registered by then.
    """

    def register(self, cfg: Any) -> None:
        """Check a configuration for the block and for conflicts, and adapt its settings.

        Settings that STAR-DSS replaces (fused losses) are switched off, with a log line for each.
        The model `smollm2` is replaced by the folder that it is loaded from.

        Args:
            cfg: The configuration as written, with the command line's changes, before Axolotl
                validates it.

        Raises:
            ConfigError: The block is missing, or settings conflict with STAR-DSS; all are listed.
        """
        if not is_listed(cfg):
            return  # Axolotl asks every plugin that this process has ever registered
        if cfg.get("star_dss") is None:
            raise ConfigError(
                f"The plugin {PLUGIN} is listed, but the configuration has no star_dss block that "
                "names a guard. Add one, for example\n"
                "star_dss:\n  guard: qwen3guard-gen-0.6b\n"
                "or remove the plugin for plain finetuning."
            )
        if found := conflicts(cfg):
            raise ConfigError("\n".join(found))
        for key in ("base_model", "tokenizer_config"):
            if cfg.get(key) == SMOLLM2:
                cfg[key] = resolve_model(SMOLLM2)
        for line in change_settings(cfg):
            get_logger("axolotl.star_dss").info("STAR-DSS: %s", line)

    def get_input_args(self) -> str:
        return "star_dss_axolotl.args.StarDSSArgs"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta | None:
        """Return Axolotl's own data, scored; for `axolotl train` and `axolotl preprocess`.

        Raises:
            StarDSSError: The data cannot be scored, or another plugin loads it.
        """
        options = options_of(cfg)
        if options is None:
            return None
        for name, plugin in self._others():
            if type(plugin).load_datasets is not BasePlugin.load_datasets:
                raise ConfigError(
                    f"The plugin {name} loads the data too, and Axolotl takes it from one plugin. "
                    "Remove one of the two."
                )
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer

        from star_dss_axolotl.scoring import score
        from star_dss_axolotl.streams import load_stream

        loaded = load_stream(cfg) if cfg.streaming else load_datasets(cfg=cfg)
        tokenizer = load_tokenizer(cfg)
        loaded.train_dataset = score(loaded.train_dataset, cfg, tokenizer, options, "train")
        loaded.eval_dataset = score(loaded.eval_dataset, cfg, tokenizer, options, "eval")
        return loaded

    def pre_model_load(self, cfg: Any) -> None:
        """Keep Axolotl's LoRA kernels from breaking guards and references."""
        if options_of(cfg) is not None:
            add_kernel_methods(cfg)

    def get_trainer_cls(self, cfg: Any) -> Any:
        """Return the trainer class with the loss; None if the plugin is not used.

        Raises:
            ConfigError: Another plugin provides a trainer for this run, which would be replaced.
        """
        if options_of(cfg) is None:
            return None
        for name, plugin in self._others():
            if (other := plugin.get_trainer_cls(cfg)) is not None:
                raise ConfigError(
                    f"The plugin {name} brings a trainer of its own ({other.__name__}), which "
                    "STAR-DSS would replace. Remove one of the two plugins."
                )
        from star_dss_axolotl.trainer import StarDSSAxolotlTrainer

        return StarDSSAxolotlTrainer

    def _others(self) -> list[tuple[str, Any]]:
        """Return (name, plugin) of the other registered plugins."""
        plugins = PluginManager.get_instance().plugins.items()
        return [(n, plugin) for n, plugin in plugins if not isinstance(plugin, StarDSSPlugin)]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Check that Axolotl made the trainer with the loss.

        Raises:
            StarDSSError: It made another one.
        """
        if options_of(cfg) is None or getattr(trainer, "star_dss_state", None) is not None:
            return
        raise StarDSSError(
            f"Axolotl made a {type(trainer).__name__} and not the trainer of STAR-DSS: another "
            f"plugin has won the trainer class. Plugins: {', '.join(cfg.plugins)}. Remove the one "
            "that brings a trainer."
        )
