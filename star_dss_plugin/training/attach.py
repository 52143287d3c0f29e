"""Switch the shaped loss on in a trainer: check its settings, score its data, wrap its collator."""

from __future__ import annotations

import copy
import logging
from typing import Any

from accelerate.utils import DynamoBackend
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

from star_dss_plugin.data.alignment import Alignment
from star_dss_plugin.data.columns import SCORES_COLUMN
from star_dss_plugin.data.fingerprints import sampled_rows_hash
from star_dss_plugin.errors import ConfigError
from star_dss_plugin.loss import Shaping
from star_dss_plugin.options import StarDSSOptions
from star_dss_plugin.training.callback import StarDSSCallback
from star_dss_plugin.training.head import can_project
from star_dss_plugin.training.host_checks import check_trainer, expose_logits, switch_fused_loss_off
from star_dss_plugin.training.kept_guard import KeptGuard
from star_dss_plugin.training.mixin import StarDSSMixin
from star_dss_plugin.training.reference.choice import choose_reference
from star_dss_plugin.training.reference.column import reference_means
from star_dss_plugin.training.reference.packs import packs_read_together
from star_dss_plugin.training.rows.known_rows import KnownRows
from star_dss_plugin.training.rows.raw_rows import FillerRows, scored_collator
from star_dss_plugin.training.rows.stream import ScoredStream
from star_dss_plugin.training.rows.stream_checks import check_stream, read_in_this_process
from star_dss_plugin.training.rows.summary import DatasetSummary
from star_dss_plugin.training.sequence_parallel import (
    SequenceParallelCollator,
    fixed_length,
    sequence_parallel_size,
)
from star_dss_plugin.training.sharding import Ranks, runnable
from star_dss_plugin.training.state import StarDSSState
from star_dss_plugin.training.trainer_data import prepare_raw, prepare_rows, prepare_stream

__all__ = ["attach", "set_up"]

logger = logging.getLogger(__name__)

_REFERENCES_APART = 0.05
"""Largest difference between ranks of one model's mean log-probabilities, in nats."""


def attach(trainer: Trainer, options: StarDSSOptions | None = None, **changes: Any) -> Trainer:
    """Give an existing trainer the STAR-DSS loss.

    Works on an unmodified `SFTTrainer`, a plain `transformers.Trainer` and their subclasses. It
    scores the trainer's data sets, and adds the columns, the loss and a `StarDSSCallback`.

    Args:
        trainer: A trainer that has not trained yet, with tokenized data sets and a tokenizer
            (`processing_class`).
        options: The options; None: the defaults.
        **changes: Options by name, which override those of `options`:
            `attach(trainer, guard="qwen3guard-gen-0.6b", chunk_size=5)`.

    Returns:
        The same trainer.

    Raises:
        StarDSSError: The trainer has settings or data that the loss does not support. The trainer
            then keeps its own loss.
    """
    unknown = sorted(set(changes) - set(StarDSSOptions().star_dss_dict()))
    if unknown:
        raise ConfigError(
            f"attach got unknown options {', '.join(unknown)}. Known: "
            f"{', '.join(StarDSSOptions().star_dss_dict())}."
        )
    # Not `replace`: it would construct a StarDSSConfig's training arguments again, and that resets
    # the accelerate state that the trainer is using.
    given = (options or StarDSSOptions()).star_dss_dict()
    options = StarDSSOptions(**{**given, **changes})
    if isinstance(trainer, StarDSSMixin):
        raise ConfigError(
            "This trainer has the STAR-DSS loss already. Attach once, and not to a StarDSSTrainer."
        )
    original = type(trainer)
    trainer.__class__ = type(f"StarDSS{original.__name__}", (StarDSSMixin, original), {})
    try:
        set_up(trainer, options)  # type: ignore[arg-type]
    except BaseException:
        trainer.__class__ = original
        raise
    steps, reference = trainer.state.global_step, trainer.star_dss_state.reference  # type: ignore[attr-defined]
    if steps and (reference.is_start or reference.kind == "copy"):
        logger.warning(
            "This trainer has trained %d steps without the STAR-DSS loss, and the reference is the "
            "model as it is now: what it has unlearned since it began is not restored. Attach "
            "before the first step, or name the model that training began with as reference.",
            steps,
        )
    return trainer


def set_up(trainer: StarDSSMixin, options: StarDSSOptions) -> None:
    """Score a trainer's data and switch its shaped loss on.

    Every process of the run must call this.

    Raises:
        StarDSSError: The options, the trainer or its data cannot be used.
    """
    options.validate()
    # A copy: those of a StarDSSConfig may be changed later, but then without an effect.
    options = StarDSSOptions(**copy.deepcopy(options.star_dss_dict()))
    if options.loss_type == "nll":
        raise ConfigError(
            "loss_type is 'nll', the trainer's own loss, with which nothing is shaped. Set "
            "loss_type='star_dss', or 'sft' for plain finetuning with the same metrics."
        )
    tokenizer = _tokenizer(trainer)
    check_trainer(trainer)
    shaping = options.shaping()
    if shaping.needs_last_scores and sequence_parallel_size(trainer.accelerator) > 1:
        raise ConfigError(
            f"loss_type {options.loss_type!r} reads the score at the end of each response, and "
            "with sequence parallelism (sp_size) that may be in another process's part of the "
            "row. Set loss_type='star_dss' or another one, or sp_size=1."
        )
    expose_logits(trainer)
    switch_fused_loss_off(trainer.args)
    model = trainer.model
    assert model is not None  # a Trainer's constructor raises an error without a model
    ranks = Ranks.from_accelerator(
        trainer.accelerator,
        model,
        exchange=trainer.ranks_exchange_tokens(),
        tp_size=trainer.get_tp_size(),
    )
    with runnable(model, trainer.accelerator):
        _set_up(trainer, options, tokenizer, shaping, model, ranks)


def _set_up(
    trainer: StarDSSMixin,
    options: StarDSSOptions,
    tokenizer: PreTrainedTokenizerBase,
    shaping: Shaping,
    model: nn.Module,
    ranks: Ranks,
) -> None:
    # First, because with other options a rank would not take part in a collective call below, and
    # the other ranks would wait for it.
    ranks.check_equal(_facts_to_compare(trainer, options))
    media = trainer.media_rows()
    several = trainer.accelerator.num_processes > 1
    fillers = FillerRows() if media is not None and several else None
    obstacle = "data that is tokenized in the data collator" if media is not None else ""
    for name, dataset in _data_sets(trainer).items():
        if isinstance(dataset, IterableDataset):
            check_stream(name, options, raw=media is not None)
            obstacle = "a data set that is a stream"
    with trainer.accelerator.autocast():  # as in training: some attentions need 16 bits
        # Before the reference's fingerprint: some quantized weights change on their first use.
        projects = _can_project(trainer, model, ranks)
        if not obstacle and shaping.needs_reference:
            obstacle = packs_read_together(
                model, trainer.data_collator, trainer.train_dataset, ranks
            )
        reference = choose_reference(
            options.reference,
            model,
            tokenizer,
            estimator=options.kl_estimator,
            obstacle=obstacle,
            needed=shaping.needs_reference,
            projects=projects,
            ranks=ranks,
        )
    summaries: dict[str, DatasetSummary] = {}
    rows, kept_guard, streams = KnownRows(), KeptGuard(options), list[ScoredStream]()

    def prepare(dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, IterableDataset):
            check_stream(name, options, raw=media is not None)
            if reference.kind == "precomputed":
                raise ConfigError(
                    f"The {name} data set is a stream, and the reference of this run was computed "
                    "before training, which cannot be done for rows that are read later. Set "
                    "reference='copy' (or 'adapter'), or pass the stream to the trainer's "
                    "constructor as eval_dataset."
                )
            read_in_this_process(trainer)
            stream = prepare_stream(
                trainer, options, tokenizer, kept_guard, rows, ranks, dataset, name
            )
            summaries[name] = stream.score_first_buffer()
            if name == "train":
                stream.dataset = trainer.pack_stream(stream.dataset, options.stream_buffer)
            streams.append(stream)
            return stream.dataset
        # An evaluation set that got the score 1 without a guard must not be trained on later: the
        # loss would be that of plain finetuning.
        unread = name != "train" and not options.score_eval and shaping.needs_scores
        trainable = not unread or SCORES_COLUMN in getattr(dataset, "column_names", ())
        if media is not None:
            dataset, scored, summaries[name] = prepare_raw(
                trainer, options, media, ranks, dataset, name
            )
            if fillers is not None:
                fillers.add(dataset)
        else:
            dataset, summaries[name] = prepare_rows(
                trainer, options, tokenizer, shaping, reference, ranks, dataset, name
            )
            scored = dataset
        ranks.check_equal({f"scored {name} data": rows.add(scored, trainable=trainable)})
        if reference.kind == "precomputed":
            means = reference_means(dataset)
            ranks.check_close(f"reference of the {name} data", means, within=_REFERENCES_APART)
        return dataset

    train = prepare(trainer.train_dataset, "train")
    if isinstance(trainer.eval_dataset, dict):
        evaluation: Any = {
            k: prepare(dataset, f"eval_{k}") for k, dataset in trainer.eval_dataset.items()
        }
    else:
        evaluation = prepare(trainer.eval_dataset, "eval")
    # Errors before this line leave the trainer with its own loss; nothing after it can fail.
    trainer.train_dataset, trainer.eval_dataset = train, evaluation
    if reference.kind == "precomputed":
        reference.model = None
    alignment = None if media is None else Alignment(media.chat, media.media)
    collator: Any = scored_collator(trainer.data_collator, rows, alignment, fillers)
    if (parts := sequence_parallel_size(trainer.accelerator)) > 1:
        padding = tokenizer.pad_token_id
        assert isinstance(padding, int)  # the trainer's own collator pads
        collator = SequenceParallelCollator(
            collator, parts, padding, fixed_length(trainer.accelerator)
        )
    trainer.data_collator = collator
    # The first attribute makes the Trainer count the trained tokens of the optimizer batch, by
    # which the loss is divided. The Trainer must then not divide by the accumulation steps, unless
    # a subclass counts no tokens: transformers >= 5.19 decides this at each step if the second
    # attribute is None, older versions always decide it at each step.
    trainer.model_accepts_loss_kwargs = True
    trainer.loss_is_scaled_for_ga = None
    trainer._signature_columns = None
    args = trainer.args
    trainer.star_dss_state = StarDSSState(
        options,
        shaping,
        reference,
        prepare,
        summaries,
        projects=projects,
        ranks=ranks,
        rows=rows,
        train_dataset=train,
        streams=streams,
        kept_guard=kept_guard,
        alignment=alignment,
        fillers=fillers,
        given=copy.deepcopy(args.star_dss_dict()) if isinstance(args, StarDSSOptions) else {},
    )
    trainer.add_callback(StarDSSCallback(trainer))


def _can_project(trainer: Trainer, model: nn.Module, ranks: Ranks) -> bool:
    """Return whether logits can be computed in chunks of tokens; every rank must call this."""
    # With tensor parallelism no rank has the whole weight of the head.
    alone = ranks.can_run and ranks.tp_size == 1
    projects = alone and ranks.decide_on_first(lambda: can_project(model))
    # With a static graph DDP reduces gradients by hooks on the model's outputs, which the hidden
    # states at the head are not. A compiled model calls none of our hooks.
    compiles = trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    projects = projects and not compiles and not getattr(trainer.args, "ddp_static_graph", False)
    if not projects:
        logger.info(
            "The logits of all tokens are held at each step: the head of this model is not a plain "
            "linear layer, or is split by tensor parallelism, or the model is compiled, or "
            "ddp_static_graph is on."
        )
    return projects


def _facts_to_compare(trainer: Trainer, options: StarDSSOptions) -> dict[str, Any]:
    """Return the facts that must agree on all ranks before scoring: options and data sets."""
    facts: dict[str, Any] = {
        f"option {name}": str(value)
        for name, value in options.star_dss_dict().items()
        if name != "score_cache_dir"  # may differ between machines
    }
    for name, dataset in _data_sets(trainer).items():
        if isinstance(dataset, Dataset):
            facts[f"{name} data"] = (len(dataset), sampled_rows_hash(dataset))
        else:
            facts[f"{name} data"] = type(dataset).__name__
    return facts


def _data_sets(trainer: Trainer) -> dict[str, Any]:
    """Return a trainer's data sets by name ("train"; "eval", or of a dict "eval_NAME")."""
    evaluation = trainer.eval_dataset
    several = {"eval": evaluation}
    if isinstance(evaluation, dict):
        several = {f"eval_{name}": dataset for name, dataset in evaluation.items()}
    return {"train": trainer.train_dataset} | several


def _tokenizer(trainer: Trainer) -> PreTrainedTokenizerBase:
    found = trainer.processing_class
    if isinstance(found, ProcessorMixin):
        found = getattr(found, "tokenizer", None)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise ConfigError(
            "The trainer has no tokenizer, which STAR-DSS needs to read the responses. Pass "
            "processing_class=tokenizer to the trainer."
        )
    return found
