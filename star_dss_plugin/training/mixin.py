"""The mixin that any transformers Trainer takes: scores in, shaped loss out.

`StarDSSMixin.compute_loss` lets the trainer's own `compute_loss` do its forward pass, its metrics
and its bookkeeping, takes the model's output from that one pass, and returns the loss of Eq. (3)
in place of the trainer's. So everything else in the user's stack stays as it is.

Longer than other modules because `compute_loss` and its parts are read together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer

from star_dss_plugin.data.chat import ChatTokenizer
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN, TEXT_COLUMN, TOKEN_COLUMNS
from star_dss_plugin.data.media_rows import MediaRows
from star_dss_plugin.errors import ConfigError, StarDSSError
from star_dss_plugin.logprobs import IGNORE_INDEX, full_kl, kl_estimate, kl_slope, token_logprobs
from star_dss_plugin.loss import Shaping, TokenWeights, shaped_loss
from star_dss_plugin.training.checkpoints import check_checkpoint
from star_dss_plugin.training.head import (
    Projection,
    States,
    at_head,
    first_output,
    forward_inputs,
    nothing_of,
    without_logits,
)
from star_dss_plugin.training.run_record import add_section
from star_dss_plugin.training.state import StarDSSState

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

__all__ = ["StarDSSMixin"]


class StarDSSMixin(_Base):
    """Puts the STAR-DSS loss in front of a Trainer class; list it before the Trainer.

    Inactive, and exactly its base class, until `set_up` is called.
    """

    star_dss_state: StarDSSState | None = None
    host_wants_loss_alone = False
    """Whether a base class with a `compute_loss` of its own leaves the model's logits alone."""

    packs_scored_rows = False
    """Whether `pack` joins rows, so that the trainer's own packing is not used."""

    def pack(self, dataset: Dataset, *, evaluation: bool) -> Dataset:
        """Pack scored rows where the trainer is told to; `seq_lengths` says where they join."""
        return dataset

    def conversations(self, rows: Dataset, chat: ChatTokenizer) -> tuple[Dataset, ChatTokenizer]:
        """Return rows of a stream with their messages, and the templates that made their tokens."""
        return rows, chat

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

    def media_rows(self) -> MediaRows | None:
        """Return how rows are read that the collator tokenizes; None if they are tokenized before.

        Raises:
            ConfigError: Such rows are given in a form that cannot work.
        """
        return None

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the base class does, and resume only from a complete checkpoint.

        Raises:
            CheckpointError: It is not; see `check_checkpoint`.
        """
        if self.star_dss_state is not None and resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run the base class's epoch, unless the resumed run had reached its last step.

        transformers (5.16 to 5.23) looks at max_steps after a step only, and trains one too many.
        """
        if self.star_dss_state is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        for stream in [] if self.star_dss_state is None else self.star_dss_state.streams:
            if stream.dataset is self.train_dataset and stream.even is not None:
                skips = not self.args.ignore_data_skip
                left_out = kwargs.get("steps_trained_in_current_epoch", 0)
                stream.even.skipped = left_out if skips else 0
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.star_dss_state is not None:
            columns: Any = self._signature_columns
            columns += [c for c in (*TOKEN_COLUMNS, TEXT_COLUMN) if c not in columns]

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

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self._divide(loader, self.train_dataset)
        return loader  # accelerate skips what a resumed run has read in a loader of its own alone

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        """Take equally many batches in each process, also of parts of a stream."""
        for stream in [] if self.star_dss_state is None else self.star_dss_state.streams:
            if stream.dataset is self.train_dataset:
                epoch_iterator = stream.batches(epoch_iterator, num_batches)
        return super().get_batch_samples(epoch_iterator, num_batches, *args)

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
        for stream in [] if self.star_dss_state is None else self.star_dss_state.streams:
            if stream.dataset is dataset:
                return stream.divide(loader, self.accelerator.num_processes // self.get_tp_size())
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's loop with the metrics of this evaluation or prediction alone."""
        if self.star_dss_state is not None:
            self.star_dss_state.metrics.drop("eval")
        return super().evaluation_loop(*args, **kwargs)

    def _scored_late(self, dataset: Any) -> Any:
        """Scores a data set that was handed to `evaluate` or `predict` directly."""
        kinds = Dataset | IterableDataset
        if self.star_dss_state is None or not isinstance(dataset, kinds):
            return dataset
        if self._is_own(dataset):
            return dataset
        return self.star_dss_state.prepare(dataset, "eval")

    def _is_own(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether it is one of the data sets that were prepared when STAR-DSS was set up.

        One that took its place since lacks the columns.
        """
        state, evaluated = self.star_dss_state, self.eval_dataset
        assert state is not None
        if isinstance(dataset, IterableDataset):
            return any(dataset is stream.dataset for stream in state.streams)
        needed = {SCORES_COLUMN if state.alignment is None else TEXT_COLUMN} | (
            {REF_COLUMN} if state.reference.kind == "precomputed" else set()
        )
        if not needed <= set(dataset.column_names):
            return False
        sets = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        return any(dataset is one for one in [self.train_dataset, *sets])

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
        inputs = dict(inputs)
        scores, ref_logps = inputs.pop(SCORES_COLUMN, None), inputs.pop(REF_COLUMN, None)
        inputs.pop("skip_logits", None)  # transformers asks Liger's fused loss for it
        labels = inputs.get("labels")
        if scores is None or labels is None:
            raise StarDSSError(
                f"A batch came without {SCORES_COLUMN!r} or 'labels' (it has {sorted(inputs)}). "
                "Something replaced the data set or the data collator after STAR-DSS was set up; "
                "give them to the trainer's constructor."
            )
        weights = self._shaping(state).weights(_checked(scores), labels)
        if state.reference.kind != "precomputed":
            ref_logps = None  # a column from an earlier run
        ref = self._reference(state, model, inputs, ref_logps, weights)

        def terms(rows: Tensor, project: Projection | None) -> tuple[Tensor, ...]:
            with self.accelerator.autocast():  # as the model applies its own head
                logps = token_logprobs(rows, labels, project)
                return logps, *self._kl_terms(state, logps, rows, project, ref, weights)

        result, outputs, found = self._forward(state, model, inputs, return_outputs, terms)
        if found is None:
            logps = self._fused_logps(outputs, labels)
            found = logps, *self._kl_terms(state, logps, None, None, ref, weights)
        logps = found[0]
        kl_terms = found[1] if len(found) > 1 else None
        slopes = found[2] if len(found) > 2 else None
        loss = shaped_loss(logps, kl_terms, weights, num_items_in_batch).loss
        state.metrics.add(
            self._mode(),
            scores[:, 1:],
            state.options.threshold,
            logps.detach(),
            kl_terms,
            weights,
            slopes,
        )
        state.shaped += self._mode() == "train"
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # N counts the tokens of all ranks, and DDP averages gradients over them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = self._with_auxiliary_loss(loss, outputs, num_items_in_batch)
        if state.sharded:
            loss = loss + nothing_of(outputs)
        return (loss, result[1]) if return_outputs else loss

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

    def base_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the base class's own loss of a batch: its mean over the batch."""
        bare = {name: value for name, value in inputs.items() if name not in TOKEN_COLUMNS}
        loss = super().compute_loss(model, bare)
        assert isinstance(loss, Tensor)
        return loss

    def _policy(self, model: nn.Module) -> Any:
        """Return the trained model without the wrappers of accelerate and the compiler."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    def _reference(
        self,
        state: StarDSSState,
        model: nn.Module,
        inputs: dict[str, Any],
        ref_logps: Tensor | None,
        weights: TokenWeights,
    ) -> Tensor | States | None:
        """Return log π_ref, shifted, or what its distributions are made of; None: not needed.

        Called before the policy's forward pass: switching an adapter off between a forward pass
        and its backward pass would confuse checkpointing.
        """
        kind, held = state.reference.kind, weights.kl != 0
        if kind in ("adapter", "copy", "model"):
            # Each rank's pass waits for those of all others: none may be left out.
            if not (state.sharded or state.ranks.together) and not bool(held.any()):
                return None

            def function(rows: Tensor, project: Projection | None) -> Any:
                if state.needs_distributions:
                    return States(rows, project.detached() if project else None)
                labels = inputs["labels"].clone()
                labels[:, 1:][~held] = IGNORE_INDEX
                return token_logprobs(rows, labels, project)

            with self.accelerator.autocast():
                call = model if state.sharded else None
                policy = self._policy(model)
                found: Tensor | States = state.reference.run(policy, inputs, function, call=call)
                return found
        if kind == "precomputed":
            if ref_logps is None:
                raise StarDSSError(
                    f"A batch came without {REF_COLUMN!r}, the reference's log-probabilities. "
                    "Give the data set to the trainer's constructor, before training starts."
                )
            return ref_logps[:, 1:]
        if kind == "none" and bool(held.any()):
            raise StarDSSError(
                f"loss_type {state.options.loss_type!r} gave a token a KL weight although it was "
                "found to need no reference. The weight map must depend on its arguments alone."
            )
        return None

    def _forward(
        self,
        state: StarDSSState,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        terms: Callable[[Tensor, Projection | None], tuple[Tensor, ...]],
    ) -> tuple[Any, Any, tuple[Tensor, ...] | None]:
        """Return the base class's own result, the policy's outputs, and `terms` of its logits.

        None in place of the terms: the outputs hold log-probabilities, from a fused head.
        """
        policy = self._policy(model)
        read = return_outputs and not state.outputs_unread
        alone = state.projects and self._host_wants_loss_alone() and not read

        def at_head_of(kwargs: Mapping[str, Any]) -> bool:
            """Leave a pass alone whose outputs are enough: all logits, or log-probabilities."""
            lacking = state.sharded or bool(kwargs.get("fused_lm_head"))
            return alone or (state.needs_distributions and lacking)

        with contextlib.ExitStack() as stack:
            captured = stack.enter_context(first_output(model))
            found: list[tuple[Tensor, ...]] = []
            if state.projects:
                found = stack.enter_context(at_head(policy, terms, wanted=at_head_of))
            if alone:
                stack.enter_context(without_logits(model))
            result = super().compute_loss(model, dict(inputs), return_outputs=return_outputs)
        if not captured:
            raise StarDSSError(
                f"{type(self).__mro__[1].__name__}.compute_loss did not call the model, so there "
                "is no output to shape. Use a trainer whose compute_loss runs the model it gets."
            )
        if found:
            return result, captured[0], found[0]
        logits = getattr(captured[0], "logits", None)
        if logits is not None and logits.shape[:2] == inputs["labels"].shape:
            return result, captured[0], terms(logits, None)
        if state.needs_distributions:  # a second pass: the trainer's own never had the logits
            call = model if state.sharded else policy
            return result, captured[0], terms(call(**forward_inputs(inputs)).logits, None)
        return result, captured[0], None

    def _kl_terms(
        self,
        state: StarDSSState,
        logps: Tensor,
        rows: Tensor | None,
        project: Projection | None,
        ref: Tensor | States | None,
        weights: TokenWeights,
    ) -> tuple[Tensor, ...]:
        """Return KL_t and, where it is a function of log π_θ(y_t), its slope.

        Nothing without a reference.
        """
        if ref is None:
            return ()
        if isinstance(ref, States):
            assert rows is not None
            ref_project = ref.project
            if state.reference.kind == "adapter" and project is not None:
                ref_project = project  # the same head, and whole now if it is sharded
            return (full_kl(rows, ref.rows, weights.kl != 0, project, ref_project),)
        estimator = state.options.kl_estimator
        slopes = kl_slope(logps.detach(), ref, estimator)
        return kl_estimate(logps, ref, estimator), slopes

    def _shaping(self, state: StarDSSState) -> Shaping:
        """Return the shaping of this step; evaluations have λ whole, so that they compare."""
        if self._mode() == "eval":
            return state.shaping
        return state.shaping.at_step(self.state.global_step, state.options.kl_warmup_steps)

    def _host_wants_loss_alone(self) -> bool:
        """Whether nothing below this class reads the model's logits."""
        hosts = type(self).__mro__[type(self).__mro__.index(StarDSSMixin) + 1 :]
        host = next(cls for cls in hosts if "compute_loss" in cls.__dict__)
        return host is Trainer or self.host_wants_loss_alone

    def _fused_logps(self, outputs: Any, labels: Tensor) -> Tensor:
        """Return (batch, seq − 1) from the outputs of a fused LM head."""
        fused = getattr(outputs, "log_probs", None)
        if isinstance(fused, Tensor) and fused.shape == labels[:, 1:].shape:
            return fused.float()
        raise ConfigError(
            "The model's forward pass returned neither per-token log-probabilities nor logits "
            "for every token, so its loss cannot be weighed. Switch off what fuses the loss "
            "into the model: cut_cross_entropy, or the kernel's own patch."
        )

    def _with_auxiliary_loss(
        self, loss: Tensor, outputs: Any, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Add a mixture-of-experts model's load-balancing loss."""
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is None:
            return loss
        assert self.model is not None
        config = self._policy(self.model).config.get_text_config()
        coefficient = getattr(self, "router_aux_loss_coef", None)
        if coefficient is None:
            coefficient = getattr(config, "router_aux_loss_coef", 0.0)
        steps = 1
        if num_items_in_batch is not None:
            # The Trainer sets it in its training loop; the check before the first step is earlier.
            steps = getattr(self, "current_gradient_accumulation_steps", 1)
        shaped: Tensor = loss + coefficient * auxiliary / steps
        return shaped

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the base class's card, and a section on how the loss was shaped."""
        super().create_model_card(*args, **kwargs)
        if self.star_dss_state is not None and self.is_world_process_zero():
            add_section(Path(str(self.args.output_dir)))

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
        if self._mode() == "train":
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


def _checked(scores: Tensor) -> Tensor:
    """Return a batch's scores as float32.

    Raises:
        StarDSSError: One of them is no probability.
    """
    inside = (scores >= 0) & (scores <= 1)
    if not bool(inside.all()):
        raise StarDSSError(
            f"A batch has a star_score of {float(scores[~inside][0])}, which is no probability in "
            "[0, 1]. Something changed the scores after they were checked at set-up: give data "
            "sets and collator to the trainer's constructor, and leave star_scores as it is."
        )
    return scores.float()
