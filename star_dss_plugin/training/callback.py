"""Verify the loss on one real row before the first step, and announce that it is active."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.writing import write_text
from star_dss_plugin.errors import DataError
from star_dss_plugin.tables import terminal
from star_dss_plugin.training.host_checks import check_trainer
from star_dss_plugin.training.loss_check import check_loss
from star_dss_plugin.training.rows.summary import dataset_summary
from star_dss_plugin.training.run_record import (
    add_section,
    changed_options,
    check_reference,
    run_record,
    startup_line,
    stream_line,
    summary_table,
)
from star_dss_plugin.training.terms_by_definition import loss_not_used_error

if TYPE_CHECKING:
    from transformers import Trainer

    from star_dss_plugin.training.state import StarDSSState

__all__ = ["StarDSSCallback"]

logger = logging.getLogger(__name__)


class StarDSSCallback(TrainerCallback):
    """Stop a run that would train without the shaped loss.

    Before the first step it gives one real row made-up scores, and compares the result of the
    trainer's `compute_loss` with Eq. (3) computed from the model's logits. If they differ, training
    does not start. Then it prints the start-up line and writes `star_dss.json` (options, guard,
    statistics, versions) to the output folder. When training ends it prints the first and the last
    values of the metrics.

    `StarDSSTrainer` and `attach` add this callback. You can add it to any trainer that must have
    the loss, with `trainer.add_callback(StarDSSCallback(trainer))`: training then does not start if
    the loss was never added or something replaced it.

    Args:
        trainer: The trainer that this callback is added to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._shaped = 0
        self._began = self._waited = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Check the loss and announce it.

        Raises:
            StarDSSError: The shaped loss is not in effect, or the trainer was given an unsupported
                setting since set-up.
        """
        active: StarDSSState | None = getattr(self.trainer, "star_dss_state", None)
        if active is None:
            raise loss_not_used_error(
                self.trainer,
                "this trainer was never given it. Use StarDSSTrainer with a STAR-DSS "
                "loss_type, or star_dss_plugin.attach(trainer, guard=...)",
            )
        check_trainer(self.trainer)  # type: ignore[arg-type]  # again: settings may have changed
        if train_dataloader is None:
            train_dataloader = self.trainer.get_train_dataloader()
        self._describe_data(active)
        check_loss(self.trainer, active, train_dataloader)
        self._shaped = active.shaped
        if state.global_step:
            check_reference(active, args.output_dir)
        if state.is_world_process_zero:
            if state.global_step and (changed := changed_options(active, args.output_dir)):
                logger.warning(
                    "STAR-DSS resumes with other options than this output folder was trained with "
                    "before: %s.",
                    changed,
                )
            # Printed, not logged, so that it is shown at any log level.
            print(startup_line(active), flush=True)  # noqa: T201
            _write_record(active, args.output_dir)
        self._began = time.monotonic()
        self._waited = sum(stream.seconds for stream in active.streams)

    def _describe_data(self, active: StarDSSState) -> None:
        """Check and sum up the training set again if it was replaced since set-up.

        Raises:
            StarDSSError: It is a stream, has rows that were not prepared, or differs between ranks.
        """
        dataset: Any = self.trainer.train_dataset
        if dataset is active.train_dataset:
            return
        if isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset):
            raise DataError(
                "The training set is a stream that took the place of the one that STAR-DSS was "
                "set up with, so its rows are not scored. Give it to the trainer's constructor, or "
                "call attach after the last change."
            )
        if not isinstance(dataset, Dataset):  # a list, or torch's Subset
            dataset = active.rows.as_dataset(dataset)
        if dataset is None or SCORES_COLUMN not in dataset.column_names:
            return  # `check_loss` reports what the data set lacks
        active.ranks.check_equal({"training rows": active.rows.digest(dataset)})
        summary = dataset_summary(dataset, active.options, active.summaries["train"].guard)
        active.summaries["train"], active.train_dataset = summary, self.trainer.train_dataset

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before the weights change if a micro-batch of this step did not have the loss.

        Raises:
            StarDSSError: The trainer's training step does not call its `compute_loss` for each.
        """
        active: StarDSSState | None = getattr(self.trainer, "star_dss_state", None)
        steps = getattr(self.trainer, "current_gradient_accumulation_steps", 1)
        shaped = 0 if active is None else active.shaped - self._shaped
        if active is None or shaped < steps:
            raise loss_not_used_error(
                self.trainer,
                f"its training step called the compute_loss that was checked for {shaped} of "
                f"{steps} micro-batches. Use a trainer that does so for each, or call "
                "star_dss_loss in your own training loop",
            )
        self._shaped = active.shaped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the first and the last metrics of the run, and statistics of a training stream."""
        active: StarDSSState | None = getattr(self.trainer, "star_dss_state", None)
        if active is None:
            return
        self._sum_up_stream(active, args.output_dir, state.is_world_process_zero)
        if active.kept_guard is not None:
            active.kept_guard.close()
        if not state.is_world_process_zero:
            return
        train = active.summaries["train"]
        table = summary_table(state.log_history, train, active.options.loss_type)
        if table is not None:
            terminal().print(table)

    def _sum_up_stream(self, active: StarDSSState, output_dir: str, first: bool) -> None:
        """Print and record statistics of the rows read so far, if the training set is a stream."""
        stream = next((one for one in active.streams if one.dataset is active.train_dataset), None)
        if stream is None:
            return
        active.summaries["train"] = stream.total_summary()
        if first:
            waited = sum(one.seconds for one in active.streams) - self._waited
            took = time.monotonic() - self._began
            print(stream_line(active.summaries["train"], waited, took), flush=True)  # noqa: T201
            _write_record(active, output_dir)
            add_section(Path(output_dir))


def _write_record(active: StarDSSState, output_dir: str) -> None:
    record = json.dumps(run_record(active), indent=2, sort_keys=True)
    write_text(Path(output_dir) / "star_dss.json", record + "\n")
