"""Train tiny models on two gloo ranks, sharded: a script for `torch.distributed.run`, and its twin.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/support/sharded_runs.py \
        KIND FOLDER CASE...

Each case is trained in turn; rank 0 writes what was logged to FOLDER/results.json. `train` with
`ranks=1` is the same run in one process, with twice the accumulation.

accelerate shards on accelerators only: asked for FSDP on a CPU it trains with DDP and says nothing.
`shard_on_cpus` makes it take the same branch as on a GPU; `proof_of_sharding` looks at parameters.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from itertools import islice
from pathlib import Path

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "false",  # accelerate does it by an accelerator
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
KINDS = {
    "ddp": {},
    "fsdp1": FSDP | {"FSDP_VERSION": "1"},
    "fsdp2": FSDP | {"FSDP_VERSION": "2"},
    # Ranks but the first have shapes only until the model is sharded.
    "fsdp2-meta": FSDP | {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    # The head in a unit of its own.
    "fsdp2-head": FSDP
    | {"FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Linear"},
    # The layers that read images too.
    "fsdp2-gemma3": FSDP
    | {
        "FSDP_VERSION": "2",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Gemma3DecoderLayer,SiglipEncoderLayer",
    },
    "fsdp2-smolvlm": FSDP
    | {
        "FSDP_VERSION": "2",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Idefics3EncoderLayer",
    },
    # Each layer is split over the ranks, which read the same rows.
    "tp": {},
    # By two of four ranks, and by FSDP over the other two; by FSDP alone. transformers does it as
    # it loads, without accelerate.
    "tp-fsdp2": {},
    "fsdp2-loaded": {},
    "zero1": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    "zero2": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
    "zero3": {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"},
}

# What transformers splits as it loads; a kind that is not named here has two ranks.
SPLIT = {
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp-fsdp2": {"tp_size": 2, "fsdp_size": 2, "tp_plan": "auto"},
    "fsdp2-loaded": {"fsdp_size": 2},
}
RANKS = {"tp-fsdp2": 4}


def shard_on_cpus(kind="MULTI_GPU"):
    """Let accelerate shard over gloo as it does over NCCL.

    With "MULTI_CPU" it counts gloo ranks, where else a program that asks for no CPU has one.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: (
        "gloo",
        DistributedType[kind],
    )


CLOSE = 1e-5
"""How far a loss, a gradient norm or an evaluation loss may be from that of one process."""


def apart(one, other):
    """Return the largest difference, relative where a number is above 1.

    Of a resumed run the last lines are compared.
    """
    return max(
        abs(a - b) / max(1, abs(b))
        for mine, wanted in zip(one, other[-len(one) :], strict=True)
        for a, b in zip(mine, wanted, strict=True)
    )


def weights_apart(one, other, lora):
    """Return the largest difference of two saved models, which a plain process can load."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    cls = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    if not lora and hasattr(AutoConfig.from_pretrained(one), "vision_config"):
        cls = AutoModelForImageTextToText
    models = [cls.from_pretrained(path).state_dict() for path in (one, other)]
    assert models[0].keys() == models[1].keys()
    return max(float((models[0][n] - models[1][n]).abs().max()) for n in models[0])


CASES = {
    "trl": {},
    "trl-lora": {"lora": True},
    "trl-untied": {"untied": True},
    "trl-adapter-full": {"lora": True, "kl_estimator": "full", "reference": "adapter"},
    "trl-adapter-k2": {"lora": True, "reference": "adapter"},
    "trl-copy-full": {"kl_estimator": "full", "reference": "copy"},
    "trl-named-full": {"kl_estimator": "full", "reference": "MODEL"},
    "trl-checkpointing": {"gradient_checkpointing": True},
    "trl-context": {"context": 2},
    "trl-packed": {"packing": True, "max_length": 64},
    "plain": {"plain": True},
    "plain-lora": {"plain": True, "lora": True},
    # ZeRO-3 partitions a model as it loads only if it is loaded after the arguments were made.
    "plain-early": {"plain": True, "early": True},
    "plain-untied": {"plain": True, "untied": True},
    "trl-untied-lora": {"untied": True, "lora": True},
    "trl-untied-named": {"untied": True, "kl_estimator": "full", "reference": "MODEL"},
    "trl-untied-copy": {"untied": True, "kl_estimator": "full", "reference": "copy"},
    "trl-untied-stream": {"untied": True, "reference": "MODEL", "stream": 1},
    "plain-adapter-full": {
        "plain": True,
        "lora": True,
        "kl_estimator": "full",
        "reference": "adapter",
    },
    "plain-adapter-k2": {"plain": True, "lora": True, "reference": "adapter"},
    # Half of the micro-batches have no token with a KL weight, and not on the same ranks.
    "plain-adapter-rare": {"plain": True, "lora": True, "reference": "adapter", "rare": True},
    "trl-adapter-rare": {"lora": True, "reference": "adapter", "rare": True},
    # Batches of one row: half of them have no image, and those of two ranks differ in how many.
    "trl-images": {"vision": "gemma3"},
    "trl-images-adapter": {
        "vision": "gemma3",
        "lora": "all-linear",
        "kl_estimator": "full",
        "reference": "adapter",
    },
    "trl-images-tiles": {"vision": "smolvlm", "lora": "all-linear", "reference": "adapter"},
    "trl-images-named": {"vision": "smolvlm", "reference": "MODEL"},
    "trl-images-whole": {"vision": "gemma3", "kl_estimator": "full", "reference": "MODEL"},
    # One process has the same rows as a data set, in the order in which two read the stream.
    "trl-stream": {"lora": True, "reference": "adapter", "stream": 1},
    "trl-stream-shards": {"lora": True, "reference": "adapter", "stream": 2},
    # The second process has a row less in each pass, and in the evaluation.
    "trl-stream-uneven": {"lora": True, "reference": "adapter", "stream": 2, "files": [4, 3]},
    "plain-stream-uneven": {"plain": True, "reference": "MODEL", "stream": 2, "files": [4, 3]},
    # Stopped in the middle of a pass, and the second process in the middle of another.
    "trl-stream-resumed": {
        "lora": True,
        "reference": "adapter",
        "stream": 2,
        "files": [6, 3],
        "resume": True,
    },
    "trl-stream-empty": {"lora": True, "reference": "adapter", "stream": 2, "files": [8, 0]},
    "plain-stream": {"plain": True, "reference": "MODEL", "stream": 1},
    "trl-other-stream": {"lora": True, "reference": "adapter", "stream": 1, "differs": "rows"},
    # The second rank has something else than the first.
    "trl-other-option": {"differs": "chunk_size"},
    "trl-other-rows": {"differs": "rows"},
    "trl-other-scores": {"differs": "scores"},
    "trl-other-guard": {"differs": "guard"},
    "trl-other-evaluation": {"differs": "evaluation"},
    "trl-scored-there": {"differs": "scored"},
    "trl-killed": {"differs": "killed"},
    "plain-other-model": {"plain": True, "differs": "model"},
    "plain-other-adapter": {"plain": True, "lora": True, "differs": "seed"},
    "trl-resumed": {"resume": True},
    "plain-resumed": {"plain": True, "resume": True},
}


def arguments(kind, folder, ranks, changes):
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


def deepspeed_config(stage):
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def model_folder(folder, untied):
    from support.models import make_tokenizer, tiny_llama

    path = Path(folder) / ("model-untied" if untied else "model")
    if not path.exists():
        tokenizer = make_tokenizer()
        tiny_llama(len(tokenizer), tie_word_embeddings=not untied).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def vision_folder(folder, name):
    """Return the folder of a model that reads images."""
    from support.vision_models import MAKE

    path = Path(folder) / name
    if not path.exists():
        model, processor = MAKE[name]()
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return path


def asked_about_images(rows):
    """Return conversations; in turn one has no image, two, one and none."""
    from support.vision_models import stripes

    made = []
    for i, row in enumerate(rows):
        images = [stripes(i + n) for n in range((0, 2, 1, 0)[i % 4])]
        parts = [{"type": "image", "text": None}] * len(images)
        (asked,), (answer,) = row["prompt"], row["completion"]
        made.append(
            {
                "messages": [
                    {**asked, "content": [*parts, {"type": "text", "text": asked["content"]}]},
                    {**answer, "content": [{"type": "text", "text": answer["content"]}]},
                ],
                "images": images,
            }
        )
    return made


def make_trainer(kind, folder, ranks, case, changes):
    import trl
    from datasets import Dataset
    from packaging.version import Version
    from peft import LoraConfig, get_peft_model
    from star_dss_trl import StarDSSConfig, StarDSSTrainer
    from transformers import (
        AutoModelForCausalLM,
        AutoProcessor,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from trl.trainer import sft_trainer

    from star_dss_plugin import attach
    from support.guards import WordGuard
    from support.trl_runs import lora_config, prompt_completion

    case = dict(case)
    plain, lora, rare, early = (
        case.pop(name, False) for name in ("plain", "lora", "rare", "early")
    )
    shards, files = case.pop("stream", 0), case.pop("files", None)
    vision = case.pop("vision", None)
    untied = case.pop("untied", False)
    source = vision_folder(folder, vision) if vision else model_folder(folder, untied)
    set_seed(1)  # adapters begin with random values
    tokenizer = (AutoProcessor if vision else AutoTokenizer).from_pretrained(source)
    out = Path(folder) / f"{kind}-{changes.pop('name')}-{ranks}"
    if case.get("reference") == "MODEL":
        case["reference"] = str(source)
    scoring = {name: case.pop(name) for name in ("kl_estimator", "reference") if name in case} | {
        "guard": "test-words",
        "chunk_size": 2,
    }
    scoring["score_cache_dir"] = str(Path(folder) / f"cache-{out.name}")
    data = prompt_completion()
    differs = case.pop("differs", None) if os.environ.get("RANK") == "1" else None
    case.pop("differs", None)
    if differs == "chunk_size":
        scoring["chunk_size"] = 3
    if differs == "rows":
        data = data.select(range(7, -1, -1))
    WordGuard.__init__.__kwdefaults__["unsafe"] = 0.1
    if differs == "guard":
        scoring["guard"] = "demo"
    if differs == "killed":
        WordGuard.token_scores = lambda self, responses: os.kill(os.getpid(), signal.SIGKILL)
    if differs == "scores":  # as another version of the guard on one machine gives them
        scoring["score_cache_dir"] += "-other"
        WordGuard.__init__.__kwdefaults__["unsafe"] = 0.8
    evaluation = data.select(range(3 if differs == "evaluation" else 4))
    if differs == "scored":  # a copy that was scored before
        data = data.add_column("star_scores", [[1.0]] * len(data))
    if rare:
        data = data.map(lambda row, i: {"completion": safe_or_not(row, i)}, with_indices=True)
    if files:
        data = data.select([i % len(data) for i in range(sum(files))])
    if shards:
        case["train_sampling_strategy"] = "sequential"
        scoring["stream_buffer"] = 3
    if shards > 1 and ranks == 1:
        # What lacks in the second file is read again from its beginning.
        first, second = files or [4, 4]
        pairs = [(i, first + i % second) for i in range(first)]
        data = data.select([i for pair in pairs for i in pair])
    if vision:
        data = Dataset.from_list(asked_about_images(data))
        evaluation = data.select(range(4))
        case["max_length"] = None
    readers = ranks // SPLIT.get(kind, {}).get("tp_size", 1)
    context = case.pop("context", 1)
    options = arguments(kind, out, ranks, case | changes)
    if context > 1:
        from accelerate.parallelism_config import ParallelismConfig

        options["parallelism_config"] = ParallelismConfig(cp_size=context)
    options["gradient_accumulation_steps"] = 4 // readers
    # Their evaluation divides by the tokens of all ranks, as training does.
    together = plain or Version(trl.__version__) < Version("1.15")
    if together:
        options["per_device_eval_batch_size"] = 4 // readers
    if files:
        options["per_device_eval_batch_size"] = 2 // ranks if together else 1
        evaluation = data.select(range(3)) if ranks > 1 else data.select([0, 4, 2, 4])
    if files and ranks > 1:
        data, evaluation = from_files(data, files), from_files(evaluation, [2, 1])
    elif shards and ranks > 1:
        data = data.to_iterable_dataset(num_shards=shards)
        evaluation = evaluation.to_iterable_dataset()
    split = {}
    if kind in SPLIT:
        from transformers.distributed import DistributedConfig

        split["distributed_config"] = DistributedConfig(**SPLIT[kind])
    adapter = lora_config() if lora else None
    if lora == "all-linear":  # also where images are read
        adapter = LoraConfig(r=4, target_modules=lora, exclude_modules=["lm_head"])
        # Gemma 3's shape draws random numbers while it loads, if it is partitioned as it loads.
        sft_trainer.get_peft_model = seeded_adapter
    if not plain:
        loads = {} if split else {"model_init_kwargs": {"device_map": None}}
        return StarDSSTrainer(
            AutoModelForCausalLM.from_pretrained(source, **split) if split else str(source),
            args=StarDSSConfig(**options, **scoring, **loads),
            train_dataset=data,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    model = AutoModelForCausalLM.from_pretrained(source) if early else None
    args = TrainingArguments(**options)
    model = model or AutoModelForCausalLM.from_pretrained(source, **split)
    if differs == "model":
        model.lm_head.weight.data.mul_(1.5)
    if lora:
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
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return attach(trainer, **scoring)


def seeded_adapter(*args, **kwargs):
    """Return a model with an adapter that begins with the same values however it was loaded."""
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(1)
    return get_peft_model(*args, **kwargs)


def from_files(data, sizes):
    """Return a stream of so many files, which have so many rows."""
    from datasets import IterableDataset

    rows = iter(list(data))
    parts = [list(islice(rows, size)) for size in sizes]
    return IterableDataset.from_generator(rows_of, data.features, gen_kwargs={"files": parts})


def rows_of(files):
    for rows in files:
        yield from rows


def safe_or_not(row, i):
    """Return an answer without a bad word in three rows of four."""
    return [{"role": "assistant", "content": "a bad word" if i % 4 == 1 else f"{i} is fine"}]


def tokens_of(row, tokenizer):
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], tokenize=True, return_dict=False
    )
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    return {"input_ids": whole, "labels": labels, "attention_mask": [1] * len(whole)}


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
        "read": trainer.star_dss_state.summaries["train"].rows,
    }
    if ranks > 1 and kind != "ddp":
        found["sharded"] = proof_of_sharding(kind, trainer)
    if kind != "fsdp1":  # its save_model crashes on gloo, with and without this project
        final = Path(folder) / f"{kind}-{name}-{ranks}-final"
        trainer.save_model(str(final))
    return found


def counted(folder, kind, name):
    """Return what the record of a run on two ranks says of its training data."""
    record = Path(folder) / f"{kind}-{name}-2" / "star_dss.json"
    return json.loads(record.read_text())["data"]["train"]


def proof_of_sharding(kind, trainer):
    """Return the share of the trained parameters' elements that this rank holds."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if kind in SPLIT:
        held = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        return sum(p.to_local().numel() for p in held) / sum(p.numel() for p in held)
    found = str(trainer.accelerator.distributed_type).rpartition(".")[2].lower()
    expected = {"f": "fsdp", "z": "deepspeed", "d": "multi_gpu"}[kind[0]]
    assert found == expected, (found, expected)
    model = trainer.model_wrapped
    if kind.startswith("fsdp2"):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        shards = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert len(shards) == len(list(model.parameters()))
        return sum(p.to_local().numel() for p in shards) / sum(p.numel() for p in shards)
    if kind == "fsdp1":
        handles = FullyShardedDataParallel.fsdp_modules(model)
        flat = [m._handle.flat_param for m in handles if m._handle is not None]
        return sum(p._local_shard.numel() for p in flat) / sum(
            p._unpadded_unsharded_size.numel() for p in flat
        )
    if kind == "zero3":
        shards = [p for p in model.parameters() if hasattr(p, "ds_shape")]
        assert len(shards) == len(list(model.parameters()))
        return sum(p.ds_tensor.numel() for p in shards) / sum(p.ds_numel for p in shards)
    if kind.startswith("zero"):
        held = sum(flat.numel() for flat in model.optimizer.single_partition_of_fp32_groups)
        return held / sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 1.0


def reset():
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()  # the process group stays
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def register_guard():
    from star_dss_plugin.plugins import Origin, load_plugins
    from support.guards import WordGuard, WordsPlugin

    if WordGuard.name not in load_plugins().names("guard"):
        load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))


def main(kind, folder, *cases):
    os.environ.update(KINDS[kind])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # or its communication would be compiled
    elif kind != "ddp":
        shard_on_cpus()
    register_guard()
    results = {}
    for name in cases:
        gc.freeze()  # trainers collect garbage often, and would search all that was imported
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
