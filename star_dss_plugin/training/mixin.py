"""Override the methods of a transformers Trainer that STAR-DSS needs, and no others.

The class begins with attributes and methods of its own that a host's trainer overrides. Then come
the Trainer's methods, for data, steps and logging. Each calls the base class and delegates the
rest: a step's loss to `step.py`, resuming to `checkpoints.py`, streams to `rows/stream.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, TEXT_COLUMN, TOKEN_COLUMNS
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.training.checkpoints import check_checkpoint
from star_dss_plugin.training.policy import mode_of
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.run_record import add_section
from star_dss_plugin.training.sequence_parallel import (
    is_part,
    one_epoch,
    own_tokens,
    sequence_parallel_group,
    sequence_parallel_size,
    trained_tokens,
)
from star_dss_plugin.training.sequence_parallel_checks import check_resuming
from star_dss_plugin.training.sharding import reshard
from star_dss_plugin.training.state import StarDSSState, check_options_unchanged
from star_dss_plugin.training.step import shaped_step

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["StarDSSMixin"]


class StarDSSMixin(_Base):
    """Give a Trainer class the STAR-DSS loss; list the mixin before the Trainer among the bases.

    Until `set_up` is called the class behaves exactly like its base class.
    """

    star_dss_state: StarDSSState | None = None
    host_wants_loss_alone = False
    """Whether a base class that overrides `compute_loss` reads no logits in it."""

    packs_scored_rows = False
    """Whether `pack` replaces the trainer's own packing."""

    supports_sequence_parallel = True
    """Whether the trainer was tried with sequence parallelism."""

    def media_rows(self) -> MediaRows | None:
        """Return the reader of rows that the data collator tokenizes; None for tokenized rows.

        Raises:
            ConfigError: The trainer's settings for these rows cannot work.
        """
        return None

    def chat_of_streams(self, chat: ChatTokenizer) -> ChatTokenizer:
        """Return the tokenizer with the chat templates that may have rendered a stream's rows."""
        return chat

    def pack(self, dataset: Dataset, *, evaluation: bool) -> Dataset:
        """Pack scored rows if the trainer's arguments ask for it, with a column `seq_lengths`."""
        return dataset

    def pack_stream(self, stream: IterableDataset, buffer: int) -> Any:
        """Return the stream to train on: packs of scored rows if the host packs streams.

        Args:
            stream: The scored rows.
            buffer: How many rows are scored together.
        """
        return stream

    def ranks_exchange_tokens(self) -> bool:
        """Return whether ranks exchange tokens in a forward pass (expert parallelism)."""
        return False

    def host_leaves_logits_alone(self) -> bool:
        """Return whether the base classes' `compute_loss` reads no logits."""
        hosts = type(self).__mro__[type(self).__mro__.index(StarDSSMixin) + 1 :]
        host = next(cls for cls in hosts if "compute_loss" in cls.__dict__)
        return host is Trainer or self.host_wants_loss_alone

    def base_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the base class's own loss of a batch, a mean over the batch."""
        bare = {name: value for name, value in inputs.items() if name not in TOKEN_COLUMNS}
        loss = super().compute_loss(model, bare)
        assert isinstance(loss, Tensor)
        return loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.star_dss_state is not None:
            columns: Any = self._signature_columns
            columns += [c for c in (*TOKEN_COLUMNS, TEXT_COLUMN) if c not in columns]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        divided = self._divide(loader, self.train_dataset)
        # A resumed run skips batches only in accelerate's own loader, so that one is returned;
        # `get_batch_samples` evens out its batches. With sequence parallelism nothing is skipped,
        # and DeepSpeed's loader, which wraps this one, needs equally many batches in each process.
        return loader if sequence_parallel_size(self.accelerator) == 1 else divided

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self._scored_for_eval(eval_dataset)
        loader = super().get_eval_dataloader(dataset)
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        return self._divide(loader, self.eval_dataset if dataset is None else dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        dataset = self._scored_for_eval(test_dataset)
        return self._divide(super().get_test_dataloader(dataset), dataset)

    def _divide(self, loader: Any, dataset: Any) -> Any:
        """Tell a stream by its loader whether each process reads its own part of the stream.

        Returns:
            A loader with equally many batches in each process; for a data set `loader` itself.
        """
        stream = self._stream(dataset)
        if stream is None:
            return loader
        return stream.wrap_loader(loader, self.accelerator.num_processes // self.get_tp_size())

    def _stream(self, dataset: Any) -> ScoredStream | None:
        """Return the `ScoredStream` of a data set; None if the data set is no scored stream."""
        state = self.star_dss_state
        return None if state is None else state.stream_of(dataset)

    def _scored_for_eval(self, dataset: Any) -> Any:
        """Score a data set that was passed to `evaluate` or `predict`, unless it is scored."""
        state = self.star_dss_state
        if state is None or not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        return dataset if self._is_own(dataset) else state.prepare(dataset, "eval")

    def _is_own(self, dataset: Dataset | IterableDataset) -> bool:
        """Return whether `dataset` was prepared when STAR-DSS was set up.

        A data set that the user assigned to the trainer since then lacks the columns.
        """
        state, evaluated = self.star_dss_state, self.eval_dataset
        assert state is not None
        if isinstance(dataset, IterableDataset):
            return state.stream_of(dataset) is not None
        needed = {SCORES_COLUMN if state.alignment is None else TEXT_COLUMN} | (
            {REF_COLUMN} if state.reference.kind == "precomputed" else set()
        )
        if not needed <= set(dataset.column_names):
            return False
        sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        return any(dataset is one for one in [self.train_dataset, *sets])

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the base class does, but resume only from a complete checkpoint.

        Raises:
            CheckpointError: The checkpoint is not complete; see `check_checkpoint`.
            ConfigError: With sequence parallelism the batches read before cannot be skipped; or
                options were changed since the trainer was made.
        """
        check_options_unchanged(self.args, self.star_dss_state)
        if self.star_dss_state is not None and resume_from_checkpoint:
            check_resuming(self)
            check_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the base class's optimizer, of parameters that are sharded as before set-up."""
        if self.star_dss_state is not None:
            assert self.model is not None
            reshard(self.model)  # the reference was computed with it
        return super().create_optimizer(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run the base class's epoch, unless a resumed run has already reached `max_steps`.

        transformers (5.16 to 5.23) compares with `max_steps` only after a step, and would train one
        step too many.
        """
        if self.star_dss_state is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        stream = self._stream(self.train_dataset)
        if stream is not None and stream.even is not None:
            skipped = kwargs.get("steps_trained_in_current_epoch", 0)
            stream.even.skipped = 0 if self.args.ignore_data_skip else skipped
        if self.star_dss_state is not None and sequence_parallel_size(self.accelerator) > 1:
            kwargs["train_dataloader"] = one_epoch(kwargs["train_dataloader"])
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """Take the next batches, equally many in each process also if each reads its own files."""
        stream = self._stream(self.train_dataset)
        if stream is not None and sequence_parallel_size(self.accelerator) == 1:
            epoch_iterator = stream.next_batches(epoch_iterator, num_batches)
        return super().get_batch_samples(epoch_iterator, num_batches, *args)

    def _get_num_items_in_batch(self, batch_samples: list[Any], *args: Any) -> Any:
        """Count the trained tokens of a step, with sequence parallelism by `trained_tokens`.

        The base class counts no shifted labels, and divides the count of whole rows by `sp_size`.
        """
        parts = self.star_dss_state is not None and sequence_parallel_size(self.accelerator) > 1
        if parts and batch_samples:
            device = self.accelerator.device
            if self.args.average_tokens_across_devices:
                return trained_tokens(batch_samples, device)
            if is_part(batch_samples[0]):
                return trained_tokens(batch_samples, device, sequence_parallel_group())
            return own_tokens(batch_samples, device)  # an evaluation: whole rows
        return super()._get_num_items_in_batch(batch_samples, *args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare inputs as the base class does, but keep scores and reference in float32.

        With DeepSpeed the base class casts floating-point inputs to the model's dtype; in bfloat16
        a log-probability of −10 is off by up to 0.03.
        """
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.star_dss_state is not None:
            columns = [name for name in TOKEN_COLUMNS if name in inputs]
            prepared |= {name: inputs[name].to(self.args.device) for name in columns}
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the shaped loss; signature, outputs and metrics are those of the base class."""
        state = self.star_dss_state
        if state is None:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        return shaped_step(
            self,
            state,
            model,
            inputs,
            super().compute_loss,
            logits_unread=self.host_leaves_logits_alone(),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's loop with metrics that begin at zero."""
        if self.star_dss_state is not None:
            self.star_dss_state.metrics.drop("eval")
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Run the base class's step; without outputs to return, the model makes no logits."""
        state = self.star_dss_state
        if state is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        state.outputs_unread = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            state.outputs_unread = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the base class does, with the `star_dss/` metrics added to lines with a loss."""
        if self.star_dss_state is not None:
            # In place: `evaluate` returns this dict, and metric_for_best_model is looked up in it.
            logs.update(self._metrics_for(logs, self.star_dss_state))
        super().log(logs, start_time)

    def _metrics_for(self, logs: dict[str, float], state: StarDSSState) -> dict[str, float]:
        """Return the metrics to add to a log line; none if the line has no loss.

        A line without a loss is the user's own. One process alone may log it, and the metrics'
        all-reduce would wait for the other processes.
        """
        if mode_of(self) == "train":
            if not logs.keys() & {"loss", "train_loss"}:
                return {}
            found = state.metrics.pop("train", self.accelerator) | state.extra_metrics
            state.extra_metrics.clear()
            return found
        losses = [name for name in logs if name.endswith("_loss")]
        if not losses:
            return {}
        prefix = min(losses, key=len).removesuffix("loss")  # "eval_", "eval_NAME_"
        found = state.metrics.pop("eval", self.accelerator)
        return {prefix + name: value for name, value in found.items()}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the base class's model card with a section on STAR-DSS."""
        super().create_model_card(*args, **kwargs)
        if self.star_dss_state is not None and self.is_world_process_zero():
            add_section(Path(str(self.args.output_dir)))
