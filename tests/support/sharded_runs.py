"""Train tiny models sharded over gloo ranks, or the same cases in one process.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/support/sharded_runs.py \
        KIND FOLDER CASE...

with `tests` in PYTHONPATH. Each case (`sharded_cases`) is trained in turn, sharded by KIND
(`sharding_kinds`); each rank writes its log to FOLDER/results-RANK.json. `train` with `ranks=1` is
the same run in one process, with more gradient accumulation.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from support.sharded_cases import CASES, OWN
from support.sharded_data import data_of, model_folder, shape_of, tokens_of, vision_folder
from support.sharding_kinds import (
    KINDS,
    SPLIT,
    deepspeed_config,
    proof_of_sharding,
    reset,
    shard_on_cpus,
)


def arguments(kind, folder, ranks, changes):
    """Return the training arguments of all cases, with changes."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 4 // ranks,
        "max_steps": 4,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "seed": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "ddp_backend": "gloo" if ranks > 1 else None,
        **changes,
    }
    if kind.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(kind[4]))
    return options


def scoring_options(case, folder, source, differs):
    """Remove the options of STAR-DSS from a case and return them.

    Args:
        case: A case, which is changed.
        folder: The score cache.
        source: The folder of the model.
        differs: How this rank differs from the other ranks, or None; this may change its guard.
    """
    from support.guards import WordGuard

    if case.get("reference") == "MODEL":
        case["reference"] = str(source)
    scoring = {name: case.pop(name) for name in ("kl_estimator", "reference") if name in case} | {
        "guard": "test-words",
        "chunk_size": 3 if differs == "chunk_size" else 2,
        "score_cache_dir": str(folder),
    }
    WordGuard.__init__.__kwdefaults__["unsafe"] = 0.1
    if differs == "guard":
        scoring["guard"] = "demo"
    if differs == "killed":
        WordGuard.token_scores = lambda self, responses: os.kill(os.getpid(), signal.SIGKILL)
    if differs == "scores":  # as if one machine had another version of the guard
        scoring["score_cache_dir"] += "-other"
        WordGuard.__init__.__kwdefaults__["unsafe"] = 0.8
    return scoring


def trainer_options(kind, out, ranks, case, own):
    """Return the trainer's options: four rows per step for any number of ranks."""
    import trl
    from packaging.version import Version

    options = arguments(kind, out, ranks, case)
    if own.get("context"):
        from accelerate.parallelism_config import ParallelismConfig

        options["parallelism_config"] = ParallelismConfig(cp_size=own["context"])
    if own.get("fixed") and ranks > 1:
        from accelerate.parallelism_config import ParallelismConfig
        from accelerate.utils import DeepSpeedSequenceParallelConfig

        handler = DeepSpeedSequenceParallelConfig(own["fixed"], False)
        options["parallelism_config"] = ParallelismConfig(sp_size=2, sp_handler=handler)
    readers = ranks // SPLIT.get(kind, {}).get("tp_size", 1)
    groups = ranks // 2 if "parts" in kind else readers  # evaluations read whole rows
    options["gradient_accumulation_steps"] = 4 // groups
    # The evaluation loss of these trainers is divided by the tokens of all ranks.
    together = own.get("plain") or Version(trl.__version__) < Version("1.15")
    if together:
        options["per_device_eval_batch_size"] = 4 // readers
    if own.get("files"):
        options["per_device_eval_batch_size"] = 2 // ranks if together else 1
    return options


def make_trainer(kind, folder, ranks, case, changes):
    """Return the trainer of a case, with STAR-DSS."""
    from peft import LoraConfig
    from star_dss_trl import StarDSSConfig, StarDSSTrainer
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, set_seed
    from trl.trainer import sft_trainer

    from star_dss_plugin.training import step
    from star_dss_plugin.training.sequence_parallel import exchanging_in_eval
    from support.trl_runs import lora_config

    own = {name: case[name] for name in OWN if name in case}
    case = {name: value for name, value in case.items() if name not in OWN}
    differs = own.get("differs") if os.environ.get("RANK") == "1" else None
    vision, lora = own.get("vision"), own.get("lora")
    source = vision_folder(folder, vision) if vision else model_folder(folder, shape_of(own))
    step.exchanging_in_eval = contextlib.nullcontext if own.get("alone") else exchanging_in_eval
    set_seed(1)  # adapters begin with random values
    tokenizer = (AutoProcessor if vision else AutoTokenizer).from_pretrained(source)
    out = Path(folder) / f"{kind}-{changes.pop('name')}-{ranks}"
    scoring = scoring_options(case, out.with_name(f"cache-{out.name}"), source, differs)
    data, evaluation = data_of(own, ranks, differs)
    if own.get("stream"):
        case["train_sampling_strategy"] = "sequential"
        scoring["stream_buffer"] = 3
    if vision:
        case["max_length"] = None
    if "padded" in own and not own.get("plain"):
        case["pad_to_multiple_of"] = own["padded"]
    options = trainer_options(kind, out, ranks, case | changes, own)
    split = {}
    if kind in SPLIT:
        from transformers.distributed import DistributedConfig

        split["distributed_config"] = DistributedConfig(**SPLIT[kind])
    if own.get("plain"):
        return plain_trainer(source, tokenizer, options, scoring, data, split, own, differs)
    adapter = lora_config() if lora else None
    if lora == "all-linear":  # also where images are read
        adapter = LoraConfig(r=4, target_modules=lora, exclude_modules=["lm_head"])
        # Gemma 3 draws random numbers while it loads if it is partitioned as it loads.
        sft_trainer.get_peft_model = seeded_adapter
    loads = {} if split else {"model_init_kwargs": {"device_map": None}}
    return StarDSSTrainer(
        AutoModelForCausalLM.from_pretrained(source, **split) if split else str(source),
        args=StarDSSConfig(**options, **scoring, **loads),
        train_dataset=data,
        eval_dataset=None if options["eval_strategy"] == "no" else evaluation,
        processing_class=tokenizer,
        peft_config=adapter,
    )


def plain_trainer(source, tokenizer, options, scoring, data, split, own, differs):
    """Return a `transformers.Trainer` with STAR-DSS attached."""
    from peft import get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from star_dss_plugin import attach
    from support.trl_runs import lora_config

    model = AutoModelForCausalLM.from_pretrained(source) if own.get("early") else None
    args = TrainingArguments(**options)
    model = model or AutoModelForCausalLM.from_pretrained(source, **split)
    if differs == "model":
        model.lm_head.weight.data.mul_(1.5)
    if own.get("lora"):
        if differs == "seed":
            set_seed(2)
        model = get_peft_model(model, lora_config())
        model.enable_input_require_grads()
    rows = data.map(lambda row: tokens_of(row, tokenizer), remove_columns=list(next(iter(data))))
    trainer = Trainer(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows.take(4),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=own.get("padded")),
    )
    return attach(trainer, **scoring)


def seeded_adapter(*args, **kwargs):
    """Return a model with an adapter whose initial values do not depend on how the model loaded."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(1)
    return get_peft_model(*args, **kwargs)


def train(kind, folder, ranks, name):
    """Train one case; return the logged losses, gradient norms and evaluation losses."""
    case = dict(CASES[name])
    resume = case.pop("resume", False)
    changes = {"name": name}
    if resume and ranks > 1:
        from support.trl_runs import Stop

        stopped = make_trainer(
            kind, folder, ranks, case, changes | {"save_strategy": "steps", "save_steps": 2}
        )
        stopped.add_callback(Stop())
        stopped.train()
        reset()
        changes["save_strategy"] = "no"
    trainer = make_trainer(kind, folder, ranks, case, changes)
    if CASES[name].get("optimizer_first"):
        trainer.create_optimizer_and_scheduler(4)
    lengths = watched_lengths(trainer.model)
    trainer.train(resume_from_checkpoint=True if resume and ranks > 1 else None)
    found = {
        "logs": [
            (line["step"], line["loss"], line["grad_norm"])
            for line in trainer.state.log_history
            if "grad_norm" in line
        ],
        "evaluations": [
            (line["step"], line["eval_loss"])
            for line in trainer.state.log_history
            if "eval_loss" in line
        ],
        "kl": [line["star_dss/kl"] for line in trainer.state.log_history if "star_dss/kl" in line],
        "shaped": trainer.star_dss_state.shaped,
        "lengths": lengths,
        "read": trainer.star_dss_state.summaries["train"].rows,
    }
    if ranks > 1 and kind != "ddp":
        found["sharded"] = proof_of_sharding(kind, trainer)
    if kind != "fsdp1":  # its save_model crashes on gloo, with and without this project
        final = Path(folder) / f"{kind}-{name}-{ranks}-final"
        trainer.save_model(str(final))
    return found


def watched_lengths(model):
    """Return a list that records the row length of each training forward pass."""
    lengths = []

    def keep(module, args, kwargs):
        if module.training:
            lengths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return lengths


def counted(folder, kind, name):
    """Return the summary of the training data in the record of a run on two ranks."""
    record = Path(folder) / f"{kind}-{name}-2" / "star_dss.json"
    return json.loads(record.read_text())["data"]["train"]


def main(kind, folder, *cases):
    os.environ.update(KINDS[kind])
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # otherwise it compiles its communication
    elif kind != "ddp":
        shard_on_cpus()
    from support.guards import register_guard

    register_guard()
    results = {}
    for name in cases:
        gc.freeze()  # trainers collect garbage often, and would scan all imported modules
        try:
            results[name] = train(kind, folder, int(os.environ["WORLD_SIZE"]), name)
        except ValueError as error:  # also StarDSSError
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        reset()
    (Path(folder) / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(*sys.argv[1:])
