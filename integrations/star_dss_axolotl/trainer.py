"""`StarDSSAxolotlTrainer`: Axolotl's trainer with the STAR-DSS loss."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import PluginManager
from datasets import Dataset, IterableDataset

from star_dss_axolotl.args import options_of
from star_dss_axolotl.media import media_rows
from star_dss_axolotl.scoring import chat_of, score
from star_dss_axolotl.streams import PackedStream, fitting
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.training.attach import set_up
from star_dss_plugin.training.mixin import StarDSSMixin
from star_dss_plugin.training.rows.raw_rows import scored_collator

__all__ = ["StarDSSAxolotlTrainer"]


class StarDSSAxolotlTrainer(StarDSSMixin, AxolotlTrainer):  # type: ignore[misc]
    """Train with the STAR-DSS loss in Axolotl; takes the arguments of `AxolotlTrainer`.

    `axolotl evaluate` does not ask plugins to load the data, so what comes without scores is
    scored here.

    Raises:
        StarDSSError: What was given, why it cannot work and what to change.
    """

    host_wants_loss_alone = True  # AxolotlTrainer.compute_loss counts labels and passes them on
    supports_sequence_parallel = False
    tag_names = ["axolotl", "star-dss"]  # noqa: RUF012 (as Axolotl declares it)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Axolotl divides by the tokens of each rank: a token of a rank that has few would count
        # for more, and two ranks would not take the step that one takes with the same rows.
        self.args.average_tokens_across_devices = self.args.world_size > 1
        # Without a mask every attention that `packing_leaks` lets pass keeps the rows of a pack
        # apart, by their positions. Whether the model does is tried before training.
        arguments: Any = self.args
        arguments.sample_packing_drop_attention_mask |= bool(arguments.sample_packing)
        # Axolotl gives a trainer its configuration only after it is made.
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
            self.train_dataset = fitting(self.train_dataset, self.args)
        self.train_dataset = self._scored(self.train_dataset, "train")
        self.eval_dataset = self._scored(self.eval_dataset, "eval")
        set_up(self, options)
        # Axolotl's evaluation has a collator of its own.
        evaluation: Any = self.eval_data_collator  # type: ignore[has-type]
        assert self.star_dss_state is not None
        state = self.star_dss_state
        self.eval_data_collator = scored_collator(
            evaluation, state.rows, state.alignment, state.fillers
        )

    def _packs(self, dataset: Any) -> bool:
        """Whether a data set is a stream whose rows are to be packed."""
        arguments: Any = self.args
        return isinstance(dataset, IterableDataset) and bool(arguments.sample_packing)

    def chat_of_streams(self, chat: ChatTokenizer) -> ChatTokenizer:
        """Return the tokenizer with Axolotl's templates."""
        return chat_of(self._config, chat.tokenizer)

    def pack_stream(self, stream: IterableDataset, buffer: int) -> Any:
        """Return packs of a stream's scored rows where `sample_packing` asks for them."""
        return PackedStream(stream, self.args, buffer) if self._packs(stream) else stream

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(dataset, PackedStream):
            batch_size = dataset.batch_size
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def ranks_exchange_tokens(self) -> bool:
        """Whether experts are spread over ranks, which then send each other tokens."""
        assert self.model is not None
        return any(hasattr(module, "num_experts_global") for module in self.model.modules())

    def media_rows(self) -> MediaRows | None:
        """Return how rows with images are read, where the collator is Axolotl's for these."""
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
        """Return the `star_dss/` metrics, too: `axolotl evaluate` shows what is returned."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        ours = f"{metric_key_prefix}_star_dss/"
        logged = self.state.log_history[-1].items()
        return metrics | {name: value for name, value in logged if name.startswith(ours)}
