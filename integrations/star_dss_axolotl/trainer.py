"""Define `StarDSSAxolotlTrainer`, Axolotl's trainer with the STAR-DSS loss."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import PluginManager
from datasets import Dataset, IterableDataset

from star_dss_axolotl.args import options_of
from star_dss_axolotl.media import media_rows
from star_dss_axolotl.scoring import chat_of, score
from star_dss_axolotl.streams import PackedStream, drop_unpackable_rows
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.training.attach import set_up
from star_dss_plugin.training.mixin import StarDSSMixin
from star_dss_plugin.training.rows.raw_rows import scored_collator

__all__ = ["StarDSSAxolotlTrainer"]


class StarDSSAxolotlTrainer(StarDSSMixin, AxolotlTrainer):  # type: ignore[misc]
    """Train with the STAR-DSS loss in Axolotl; takes the arguments of `AxolotlTrainer`.

    Data without scores is scored here, because `axolotl evaluate` does not load it with plugins.

    Raises:
        StarDSSError: The configuration or the data cannot be used.
    """

    host_wants_loss_alone = True  # AxolotlTrainer.compute_loss counts labels and passes them on
    supports_sequence_parallel = False
    tag_names = ["axolotl", "star-dss"]  # noqa: RUF012 (as Axolotl declares it)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Axolotl divides by the trained tokens of each rank, so that a token on a rank with few
        # weighs more, and two ranks take another step than one rank with the same rows.
        self.args.average_tokens_across_devices = self.args.world_size > 1
        # Without a mask every attention that `packing_leaks` accepts separates the rows of a pack
        # by their positions. `packs_read_together` tests before training whether the model does.
        arguments: Any = self.args
        arguments.sample_packing_drop_attention_mask |= bool(arguments.sample_packing)
        # Axolotl sets a trainer's configuration only after its constructor.
        self._config = PluginManager.get_instance().cfg
        options = None if self._config is None else options_of(self._config)
        if options is None:
            raise ConfigError(
                "StarDSSAxolotlTrainer was made without a star_dss block in the configuration. "
                "Let Axolotl make it: list star_dss_axolotl.StarDSSPlugin under plugins and add "
                "the block."
            )
        self._options = options
        if self._packs(self.train_dataset):
            self.train_dataset = drop_unpackable_rows(self.train_dataset, self.args)
        self.train_dataset = self._scored(self.train_dataset, "train")
        self.eval_dataset = self._scored(self.eval_dataset, "eval")
        set_up(self, options)
        # Axolotl evaluates with a separate collator.
        evaluation: Any = self.eval_data_collator  # type: ignore[has-type]
        assert self.star_dss_state is not None
        state = self.star_dss_state
        self.eval_data_collator = scored_collator(
            evaluation, state.rows, state.alignment, state.fillers
        )

    def _packs(self, dataset: Any) -> bool:
        """Return whether a data set is a stream whose rows will be packed."""
        arguments: Any = self.args
        return isinstance(dataset, IterableDataset) and bool(arguments.sample_packing)

    def chat_of_streams(self, chat: ChatTokenizer) -> ChatTokenizer:
        """Return the tokenizer with the chat templates and formats of Axolotl's configuration."""
        return chat_of(self._config, chat.tokenizer)

    def pack_stream(self, stream: IterableDataset, buffer: int) -> Any:
        """Return packs of a stream's scored rows if `sample_packing` is on, else the stream."""
        return PackedStream(stream, self.args, buffer) if self._packs(stream) else stream

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(dataset, PackedStream):
            batch_size = dataset.batch_size
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def ranks_exchange_tokens(self) -> bool:
        """Return whether experts are spread over ranks, which then exchange tokens."""
        assert self.model is not None
        return any(hasattr(module, "num_experts_global") for module in self.model.modules())

    def media_rows(self) -> MediaRows | None:
        """Return the reader of rows with media if the collator is Axolotl's for these."""
        return media_rows(self.data_collator)

    def _scored(self, dataset: Any, name: str) -> Any:
        tokenizer: Any = self.processing_class
        return score(dataset, self._config, tokenizer, self._options, name)

    def _scored_for_eval(self, dataset: Any) -> Any:
        active = self.star_dss_state is not None and isinstance(dataset, Dataset)
        if active and not self._is_own(dataset):
            dataset = self._scored(dataset, "eval")
        return super()._scored_for_eval(dataset)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, and return the `star_dss/` metrics, too, for `axolotl evaluate` to show."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        ours = f"{metric_key_prefix}_star_dss/"
        logged = self.state.log_history[-1].items()
        return metrics | {name: value for name, value in logged if name.startswith(ours)}
