"""Small random verdict guards: with the tiny tokenizer and a template, or with real tokenizers."""

import datetime as dt
import json
import re
import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# A small template, structured as the real ones, for the tiny tokenizer.
JUDGE = (
    "{{- '<|im_start|>user\nis the last answer bad?\n\n' }}"
    "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n\n' }}{%- endfor %}"
    "{{- '<END>\n<|im_end|>\n' }}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QUESTION = [{"role": "user", "content": "how are you?"}]
UNCHECKED = {"self_check": False, "min_label_mass": 0.0, "device": "cpu"}


def describe(folder, **changes):
    """Return the options of a guard whose model is in the folder."""
    return {
        "model": str(folder),
        "chat_template": JUDGE,
        "prefill": "verdict:",
        "safe_labels": [" good"],
        "unsafe_labels": [" bad"],
        **UNCHECKED,
        **changes,
    }


def tiny_guard(folder, source, **changes):
    """Save a random model with a real guard's tokenizer, template and vocabulary."""
    config = json.loads((source / "config.json").read_text())
    config |= {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
    }
    if config["model_type"] == "qwen3":
        config["head_dim"] = 8
    else:  # Granite's factors are for 40 layers; with two the text would hardly matter
        config |= {
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": 0.35,
        }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)


def tokenizer_of(guard):
    return guard._template._tokenizer


def pinned(text):
    """Return a prompt with the date that guards fix in place of today's."""
    today = re.escape(dt.datetime.now().strftime("%B %d, %Y"))
    return re.sub(f"Today's Date: {today}", "Today's Date: April 01, 2024", text)


def naive_prompt(guard, messages):
    """Return the guard's prompt (token ids) as its model card makes it, with a fixed date."""
    tokenizer = tokenizer_of(guard)
    extra = {"guardian_config": {"risk_name": "harm"}} if "granite" in guard.name else {}
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=guard._template.source,
        tokenize=False,
        add_generation_prompt=True,
        **extra,
    )
    prefill = {"qwen3guard-gen-0.6b": "Safety:", "granite-guardian-3.1-2b": ""}
    text = pinned(text) + prefill.get(guard.name, "verdict:")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompts(guard, context, text, ends):
    """Return the token ids of the guard's prompt for each prefix."""
    return list(guard._template.prompts(guard._prompts.turns(context), text, ends))


def answer(text):
    return {"role": "assistant", "content": text}


def talk(*contents):
    """Return messages of the user and the assistant in turn."""
    return [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 4, contents, strict=False)
    ]


def unreadable(guard, text):
    """Return the characters whose bytes the vocabulary lacks: they become the unknown token."""
    tokenizer = tokenizer_of(guard)
    unknown = tokenizer.unk_token_id
    return {c for c in set(text) if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]}


TEXT = "It is 4.\n\nÇa va? 👍 Done, and some more words to read."
