"""Hook into any transformers Trainer: its data are scored, and its loss is that of Eq. (3).

`StarDSSMixin` overrides only what STAR-DSS has to do with, so that everything else in the user's
stack stays as it is. First come the methods of its own, most of which a host's trainer answers;
then the Trainer's: its data, its steps, its log. Each of these does the base class's work and hands
the rest over: a step's loss to `step.py`, resuming to `checkpoints.py`, streams to `stream.py`.
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
from star_dss_plugin.training.parts_checks import check_resuming
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.run_record import add_section
from star_dss_plugin.training.sequence_parts import (
    group_of_parts,
    is_part,
    one_pass,
    own_tokens,
    parts_per_row,
    trained_tokens,
)
from star_dss_plugin.training.state import StarDSSState
from star_dss_plugin.training.step import mode_of, shaped_step

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["StarDSSMixin"]


class StarDSSMixin(_Base):
    """Put the STAR-DSS loss in front of a Trainer class; list it before the Trainer.

    Inactive, and exactly its base class, until `set_up` is called.
    """

    star_dss_state: StarDSSState | None = None
    host_wants_loss_alone = False
    """Whether a base class with a `compute_loss` of its own leaves the model's logits alone."""

    packs_scored_rows = False
    """Whether `pack` joins rows, so that the trainer's own packing is not used."""

    trains_parts = True
    """Whether each process may have a part of every row (`sequence_parts`)."""

    def media_rows(self) -> MediaRows | None:
        """Return how rows are read that the collator tokenizes; None if they are tokenized before.

        Raises:
            ConfigError: Such rows are given in a form that cannot work.
        """
        return None

    def chat_of_streams(self, chat: ChatTokenizer) -> ChatTokenizer:
        """Return the tokenizer with the templates that may have made a stream's tokens."""
        return chat

    def pack(self, dataset: Dataset, *, evaluation: bool) -> Dataset:
        """Pack scored rows where the trainer is told to; `seq_lengths` says where they join."""
        return dataset

    def pack_stream(self, stream: IterableDataset, buffer: int) -> Any:
        """Return what the trainer reads of a scored stream, if its packs are no rows themselves.

        Args:
            stream: Rows with scores.
            buffer: How many of them are scored together.
        """
        return stream

    def ranks_exchange_tokens(self) -> bool:
        """Whether a forward pass waits for one of every other rank, without shards of weights."""
        return False

    def host_leaves_logits_alone(self) -> bool:
        """Whether nothing below this class reads the model's logits."""
        hosts = type(self).__mro__[type(self).__mro__.index(StarDSSMixin) + 1 :]
        host = next(cls for cls in hosts if "compute_loss" in cls.__dict__)
        return host is Trainer or self.host_wants_loss_alone

    def base_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the base class's own loss of a batch: its mean over the batch."""
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
        # accelerate skips what a resumed run has read in a loader of its own alone. DeepSpeed's,
        # which skips nothing, is put around it: each of its batches waits for all processes.
        return loader if parts_per_row(self.accelerator) == 1 else divided

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self._scored_late(eval_dataset)
        loader = super().get_eval_dataloader(dataset)
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        return self._divide(loader, self.eval_dataset if dataset is None else dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        dataset = self._scored_late(test_dataset)
        return self._divide(super().get_test_dataloader(dataset), dataset)

    def _divide(self, loader: Any, dataset: Any) -> Any:
        """Tell a stream whether its loader gives each process a part of it to read.

        Returns:
            The loader, of which each process then reads equally many batches.
        """
        stream = self._stream(dataset)
        if stream is None:
            return loader
        return stream.divide(loader, self.accelerator.num_processes // self.get_tp_size())

    def _stream(self, dataset: Any) -> ScoredStream | None:
        """Return the stream of ours that a data set is; None if it is none."""
        state = self.star_dss_state
        return None if state is None else state.stream_of(dataset)

    def _scored_late(self, dataset: Any) -> Any:
        """Score a data set that was handed to `evaluate` or `predict` directly."""
        state = self.star_dss_state
        if state is None or not isinstance(dataset, Dataset | IterableDataset):
            return dataset
        return dataset if self._is_own(dataset) else state.prepare(dataset, "eval")

    def _is_own(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether `dataset` was prepared when STAR-DSS was set up.

        One that took the place of such a one lacks the columns.
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
        """Train as the base class does, and resume only from a complete checkpoint.

        Raises:
            CheckpointError: It is not; see `check_checkpoint`.
            ConfigError: What it has read cannot be skipped.
        """
        if self.star_dss_state is not None and resume_from_checkpoint:
            check_resuming(self)
            check_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run the base class's epoch, unless the resumed run had reached its last step.

        transformers (5.16 to 5.23) looks at max_steps after a step only, and trains one too many.
        """
        if self.star_dss_state is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        stream = self._stream(self.train_dataset)
        if stream is not None and stream.even is not None:
            skipped = kwargs.get("steps_trained_in_current_epoch", 0)
            stream.even.skipped = 0 if self.args.ignore_data_skip else skipped
        if self.star_dss_state is not None and parts_per_row(self.accelerator) > 1:
            kwargs["train_dataloader"] = one_pass(kwargs["train_dataloader"])
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """Take equally many batches in each process, also of parts of a stream."""
        stream = self._stream(self.train_dataset)
        if stream is not None and parts_per_row(self.accelerator) == 1:
            epoch_iterator = stream.batches(epoch_iterator, num_batches)
        return super().get_batch_samples(epoch_iterator, num_batches, *args)

    def _get_num_items_in_batch(self, batch_samples: list[Any], *args: Any) -> Any:
        """Count trained tokens also of parts of rows: of all processes, or of those of one group.

        The base class counts none of parts, and divides those of whole rows by the parts' number.
        """
        parts = self.star_dss_state is not None and parts_per_row(self.accelerator) > 1
        if parts and batch_samples:
            device = self.accelerator.device
            if self.args.average_tokens_across_devices:
                return trained_tokens(batch_samples, device)
            if is_part(batch_samples[0]):
                return trained_tokens(batch_samples, device, group_of_parts())
            return own_tokens(batch_samples, device)  # an evaluation's, whole
        return super()._get_num_items_in_batch(batch_samples, *args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Do the base class's work, but keep scores and reference in float32.

        With DeepSpeed it casts every floating-point input to the model's dtype, in which a
        log-probability of −10 is off by up to 0.03.
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
        """Return the shaped loss; outputs, metrics and signature are those of the base class."""
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
        """Run the base class's loop with the metrics of this evaluation or prediction alone."""
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
        """Do the base class's step; logits are made only where something reads them."""
        state = self.star_dss_state
        if state is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        state.outputs_unread = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            state.outputs_unread = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the `star_dss/` metrics to the trainer's own log lines."""
        if self.star_dss_state is not None:
            # In place: `evaluate` returns this very dict, and metric_for_best_model looks into it.
            logs.update(self._metrics_for(logs, self.star_dss_state))
        super().log(logs, start_time)

    def _metrics_for(self, logs: dict[str, float], state: StarDSSState) -> dict[str, float]:
        """Return what goes with a line of the trainer's, which has a loss.

        Nothing with a user's: it may come from one process alone, and would wait for the others.
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
        """Write the base class's card, and a section on how the loss was shaped."""
        super().create_model_card(*args, **kwargs)
        if self.star_dss_state is not None and self.is_world_process_zero():
            add_section(Path(str(self.args.output_dir)))
