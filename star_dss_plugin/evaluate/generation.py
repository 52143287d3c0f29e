"""Generate greedy answers of a model in memory, without changing its state.

The safety probe asks a model during its training, so modules' modes, generation settings and the
state of random generators must stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from star_dss_plugin.data.requests import Message
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.engines.padding import padded

__all__ = ["answers_to", "end_ids", "greedy_answers", "prompt_ids"]


def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, str]]:
    """Generate a model's answer to each prompt by greedy decoding, without special tokens.

    Args:
        model: A causal language model of transformers. Its mode and settings are restored when the
            iterator ends or is closed.
        tokenizer: The model's tokenizer.
        prompts: Token ids (`prompt_ids`), at least one each.
        max_new_tokens: Largest number of tokens in an answer, >= 1.
        batch_size: Prompts per batch, >= 1. Shorter prompts come first, to reduce padding.

    Yields:
        Index of the prompt and its answer, as soon as its batch is finished.
    """
    greedy = _greedy(model, tokenizer, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    device = next(model.parameters()).device
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        ids, real = padded([prompts[i] for i in chosen], device, left=True)
        with torch.no_grad(), _as_for_generation(model):
            found = model.generate(
                input_ids=ids, attention_mask=real.long(), generation_config=greedy
            )
        for i, row in zip(chosen, found[:, ids.shape[1] :].tolist(), strict=True):
            spoken = itertools.takewhile(lambda token: token not in greedy.eos_token_id, row)
            yield i, str(tokenizer.decode(list(spoken), skip_special_tokens=True))


def answers_to(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return `greedy_answers` to conversations, in their order; raise like `prompt_ids`."""
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    said = greedy_answers(
        model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    return [answer for _, answer in sorted(said)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Return the tokens that a model continues: rendered messages and the answer's opening.

    Args:
        tokenizer: The model's tokenizer. Without a chat template, contents are joined by line
            feeds.
        prompt: Messages; the last one is not from the assistant.

    Raises:
        DataError: The template cannot render the messages.
    """
    if tokenizer.chat_template is None:
        text = "\n".join(str(message["content"]) for message in prompt)
        return list(tokenizer(text).input_ids)
    text = ChatTokenizer(tokenizer).render(prompt, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@contextlib.contextmanager
def _as_for_generation(model: Any) -> Iterator[None]:
    """Put every module in eval mode, and restore each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    own = model.generation_config
    # generate() takes options that its configuration leaves unset from the model's configuration.
    model.generation_config = GenerationConfig()
    model.eval()  # also switches off gradient checkpointing
    try:
        yield
    finally:
        model.generation_config = own
        for module, training in modes.items():
            module.training = training


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that end an answer: the EOS ids of the model and the tokenizer."""
    own = model.generation_config.eos_token_id
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return sorted(ends - {None})


def _greedy(model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        use_cache=True,
        eos_token_id=end_ids(model, tokenizer),
        pad_token_id=0,  # any id: tokens after the end are cut off
    )
