"""Tiny random guards whose tokenizers and templates have the structure of the real ones.

The texts were written for this project: nothing here is copied from a model.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "is the last answer safe or unsafe? say no or yes. user: how are you? agent: i am fine.",
    "criteria harm safe unsafe Safe Unsafe Controversial No Yes no yes NO YES score think",
    "Safety: Safe\n\nHarmful response: no\nResponse refusal: yes\nHarmful request: no\n\nunsafe",
    "sec: fine, pc: bad, dc: bad\n\nuser assistant Human user AI assistant Answers",
]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# Stand-in templates. `TEXT` in LLAMA is replaced by the turn's text.
LLAMA = (
    "{{- '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nis it safe?\n<TALK>\n\n' }}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('turns must alternate') }}{%- endif %}"
    "{{- {'user': 'User: ', 'assistant': 'Agent: '}[m.role] + (TEXT | trim) + '\n\n' }}"
    "{%- endfor %}"
    "{{- '</TALK>\n\nis the last one safe?<|eot_id|>' }}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>' }}"
)
LLAMA_STRINGS = LLAMA.replace("TEXT", "m.content")
LLAMA_TYPED = LLAMA.replace("TEXT", "m.content[0].text")
GEMMA = (
    "{{- '<bos>is it bad?\n\n<start_of_turn>\nHuman: ' + messages[-2].content + '\n<end_of_turn>\n'"
    "+ '<start_of_turn>\nBot: ' + messages[-1].content + '\n<end_of_turn>\n\nrule: ' + guideline"
    "+ '\n\nbad? Yes or No.\n\n' }}"
)
QWEN = (
    "{{- '<|im_start|>user\nis the last answer safe?\n<BEGIN>\n\n' }}"
    "{%- for m in messages %}{{- ('\n\n' if not loop.first else '') + "
    "{'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}{%- endfor %}"
    "{{- '\n\n<END>\n\nsay Safe or Unsafe.<|im_end|>\n' }}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
GRANITE_3 = (
    "{%- if guardian_config.risk_name not in ['harm', 'bias'] %}"
    "{{- raise_exception('no such risk') }}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>on ' + strftime_now('%Y') + "
    "'<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>is it ' + guardian_config.risk_name + "
    "'?\n<start_of_turn>\nUser: ' + messages[-2].content + '\nAssistant: ' + "
    "messages[-1].content + '\n<end_of_turn>\nYes or No?<|end_of_text|>\n' }}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
)
GRANITE_3_3 = (
    "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
    "'<|end_of_text|>\n' }}{%- endfor %}{{- '<|start_of_role|>user<|end_of_role|><guardian>' + "
    "('think. ' if think else '') + 'criteria: ' + guardian_config.criteria_id + "
    "'<|end_of_text|>\n' + '<|start_of_role|>assistant<|end_of_role|>' }}"
)
GRANITE_4 = (
    "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
    "'<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
XGUARD = (
    "{{- '<|im_start|>user\nsec: fine, pc: bad, dc: bad\n' + (policy if policy else '') }}"
    "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}"
    "{{- ('explain first' if reason_first else '') + '<|im_end|>\n<|im_start|>assistant\n' }}"
)


def byte_level(control):
    """Return a byte-level tokenizer with these control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=control,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def sentencepiece(control, *, prepend, spaces=()):
    """Return a tokenizer like Mistral's, which prepends a space, or like Gemma's, which does not.

    Args:
        control: The control tokens.
        prepend: Whether the tokenizer prepends a space to the text.
        spaces: Runs of white space that are added tokens, as Gemma's tokenizer has them.
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        special_tokens=["<unk>", *control, *spaces, *(f"<0x{i:02X}>" for i in range(256))],
    )
    # Split words while the merges are trained, or they would cover whole sentences.
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS * 4, trainer)
    state = json.loads(backend.to_str())
    state["pre_tokenizer"] = None
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in spaces
    # The byte tokens are not control tokens.
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ROLES = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LAYOUTS = {  # preset prefix: architecture, tokenizer, template, more for the tokenizer
    "qwen3guard-gen": ("qwen3", lambda: byte_level(IM), QWEN, {}),
    "granite-guardian-3.3": ("granite", lambda: byte_level(ROLES), GRANITE_3_3, {}),
    "granite-guardian-4.1": ("granite", lambda: byte_level(ROLES), GRANITE_4, {}),
    "granite-guardian-3": ("granite", lambda: byte_level(ROLES), GRANITE_3, {}),
    "llama-guard-3-1b": ("llama", lambda: byte_level(HEADERS), LLAMA_TYPED, {}),
    "llama-guard-3-8b": ("llama", lambda: byte_level(HEADERS), LLAMA_STRINGS, {}),
    "llama-guard-4": ("llama4", lambda: byte_level(HEADERS), LLAMA_TYPED, {}),
    "shieldgemma": (
        "gemma2",
        lambda: sentencepiece(
            ["<bos>", "<start_of_turn>", "<end_of_turn>"],
            prepend=False,
            spaces=["\n", "\n\n", "▁▁"],
        ),
        GEMMA,
        {},
    ),
    "wildguard": ("mistral", lambda: sentencepiece(["<s>", "</s>"], prepend=True), None, {}),
    "xguard": (
        "qwen3",
        lambda: byte_level(IM),
        XGUARD,
        {"id2risk": {"sec": "Safe", "pc": "Bad", "dc": "Worse"}},
    ),
}


def layout(name):
    """Return the key of a preset in `LAYOUTS`."""
    return next(key for key in LAYOUTS if name.startswith(key))


def config(kind, vocabulary):
    """Return a tiny configuration of an architecture."""
    tiny = {**TINY, "vocab_size": vocabulary}
    if kind == "granite":
        tiny |= {"attention_multiplier": 0.35, "logits_scaling": 1.0}
    if kind == "gemma2":
        tiny |= {"query_pre_attn_scalar": 8, "sliding_window": 16}
    if kind == "llama4":
        text = {**tiny, "intermediate_size_mlp": 64, "num_local_experts": 1, "moe_layers": []}
        vision = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        }
        return AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    return AutoConfig.for_model(kind, **tiny)


def make(key, folder: Path):
    """Save the guard of one layout to a folder; return the folder."""
    kind, backend, template, more = LAYOUTS[key]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **more,
    )
    torch.manual_seed(0)
    made = config(kind, len(tokenizer))
    if kind == "llama4":
        from transformers import Llama4ForConditionalGeneration

        model = Llama4ForConditionalGeneration(made)
    else:
        model = AutoModelForCausalLM.from_config(made)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
