"""Small TRL runs that several test modules share."""

from datasets import Dataset
from peft import LoraConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from support.models import tiny_llama

PROMPTS = ["how are you?", "is this bad?", "1 + 1 =", "hello world. who is lazy?"] * 2
ANSWERS = [
    "i am fine, thank you.",
    "no! it is a bad word, and words are words.",
    "2",
    "the dog is lazy",
    "the quick brown fox jumps",
    "bad",
    "it's 2 o'clock",
    "good words keep it safe",
]


def prompt_completion():
    """Return prompts and completions as lists of one message."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": p}],
                "completion": [{"role": "assistant", "content": a}],
            }
            for p, a in zip(PROMPTS, ANSWERS, strict=True)
        ]
    )


def conversations():
    """Return conversations of two turns each."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": p},
                    {"role": "assistant", "content": a},
                    {"role": "user", "content": "and " + p},
                    {"role": "assistant", "content": a + " yes"},
                ]
            }
            for p, a in zip(PROMPTS, ANSWERS, strict=True)
        ]
    )


def arguments(tmp_path, cls=StarDSSConfig, **changes):
    """Return training arguments for a few steps on a CPU."""
    options = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
    }
    if cls is not TrainingArguments:
        options["shuffle_dataset"] = False
    if cls is StarDSSConfig:
        options |= {"guard": "test-words", "chunk_size": 2}
    return cls(**{**options, **changes})


def tiny_trainer(
    tmp_path, tokenizer, data=None, model=None, cls=StarDSSTrainer, peft_config=None, **changes
):
    """Return a trainer of a tiny model; `changes` are training arguments."""
    return cls(
        model or tiny_llama(len(tokenizer)),
        args=arguments(tmp_path, StarDSSConfig if cls is StarDSSTrainer else SFTConfig, **changes),
        train_dataset=data or prompt_completion(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def lora_config(dropout=0.0):
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=dropout
    )


class Stop(TrainerCallback):
    """Stop training after the second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
