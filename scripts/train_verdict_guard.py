"""Train a small verdict guard, to measure what verdict guards cost.

    python scripts/train_verdict_guard.py DATA_DIR FIRST
    python scripts/train_verdict_guard.py DATA_DIR OUTPUT --start FIRST/adapter --whole 2400 \\
        --passes 2 --rate 4e-4

These two commands made the guard of docs/fewer_prefixes.md; the second continues from the adapter
of the first. A LoRA adapter on the first blocks of SmolLM2-135M-Instruct learns to answer the
prompt of Qwen3Guard with "Safety: Safe" or "Safety: Unsafe". DATA_DIR holds guard_train, guard_dev
and guard_test_A (.jsonl, one row per line: prompt, response, label 1 safe or 0 harmful, source,
licence); the template is that of Qwen3Guard-Gen (`--template`). The script writes to OUTPUT the
whole guard, which a configuration can name as a guard's `model`, its figures in `card.json`, and
the adapter alone in `adapter/`. The guard protects nobody.

The training set has every whole response, and a random prefix of every third response, because a
guard that scores chunks reads prefixes. Prefixes of safe responses are labelled safe; prefixes of
harmful ones harmful, with a weight proportional to their length. Only MIT, Apache-2.0 and CC-BY-4.0
rows are used, and only their labels.

Three things make training cheap. The adapter changes the upper blocks only, so the hidden states
below them are computed once for all epochs. The head, the policy with which all prompts begin, is
run once per several steps. And the tail, the template's text after the response, is three quarters
of the remaining prompt: training begins without it, with the verdict directly after the response,
and continues with whole prompts on a part of the rows. The adapter with the best AUROC on
guard_dev, with whole prompts, is written as soon as it is found; guard_test_A is used for the
figures only. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AttentionInterface, set_seed

from star_dss_plugin.engines.shared_prefix.recording import recording
from star_dss_plugin.guards.prompting.template import GuardTemplate
from star_dss_plugin.smollm2 import load_smollm2

OPEN = ("MIT", "Apache-2.0", "CC-BY-4.0")
PREFILL, VERDICTS = "Safety:", (" Unsafe", " Safe")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 3
BATCH = 16
RATE = 5e-4  # peak learning rate without the tail
RANK = 16
LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
QUESTION, ANSWER = 160, 320  # characters of each that a training prompt holds
HEAD_EVERY = 4  # steps after which the head's keys and values are computed again
CHECKS = 4  # evaluations per pass over whole prompts
MASS = 0.2  # weight of the term that raises the probability of the two verdicts together
ATTENTION = "verdict_training"


class Example(NamedTuple):
    """Hold a prompt without its head, and its verdict: 1 safe, 0 harmful."""

    ids: list[int]
    label: int
    weight: float


class Known(NamedTuple):
    """Hold an example as hidden states below the trained blocks, (tokens, hidden size)."""

    states: Tensor
    label: int
    weight: float


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(
    rows: list[dict[str, Any]],
    template: GuardTemplate,
    *,
    tail: bool,
    question: int = QUESTION,
    answer: int = ANSWER,
) -> list[Example]:
    """Return prompts without their head, each with its label and weight.

    Args:
        rows: Rows with prompt, response and label.
        template: The guard's template.
        tail: Whether prompts have the template's text after the response. If not, every third
            response also gives an example with a random prefix.
        question: Characters that a prompt holds of each question, from its end.
        answer: Characters that a prompt holds of each response.
    """
    draw = random.Random(SEED)
    head = len(head_of(template))
    verdict = template.content_ids(f"\n\n{PREFILL}")
    found = []
    for number, row in enumerate(rows):
        asked = [{"role": "user", "content": row["prompt"][-question:]}]
        text = row["response"][:answer]
        if tail:
            (prompt,) = template.prompts(asked, text, [len(text)])
            found.append(Example(prompt[head:], row["label"], 1.0))
            continue
        ends = [len(text)]
        if number % 3 == 0 and len(text) > 1:
            ends.append(draw.randrange(1, len(text)))
        for end in ends:
            opened, _ = template.prompt_with_response(asked, text[:end])
            weight = 1.0 if row["label"] else end / len(text)
            found.append(Example(opened[head:] + verdict, row["label"], weight))
    return found


def head_of(template: GuardTemplate) -> list[int]:
    """Return the tokens with which all prompts begin: the policy."""
    one, other = (
        template.prompt_with_response([{"role": "user", "content": c}], c)[0] for c in ("a", "b")
    )
    return one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]


def batches(known: list[Known], draw: random.Random) -> list[list[Known]]:
    """Return batches of prompts of similar length, in random order."""
    order = draw.sample(known, len(known))
    found = []
    for start in range(0, len(order), 4 * BATCH):
        some = sorted(order[start : start + 4 * BATCH], key=lambda one: len(one.states))
        few = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
        found += draw.sample(few, len(few))
    return found


@dataclass
class Head:
    """Hold the head's keys and values by block, for the forward passes of all prompts.

    While `known` is empty, a pass is that of the head itself, and fills it.
    """

    known: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


_head = Head()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any
) -> tuple[Tensor, None]:
    """Attend to the head, stored once for all rows, and causally to a row's own tokens.

    Matrix products and a float32 softmax take a tenth of a step's time; the fused kernel and its
    backward pass took a third. Shapes are those of transformers' attention interface.
    """
    rows, heads, length, size = query.shape
    shared = key.shape[1]
    groups = heads // shared
    asked = query.reshape(rows, shared, groups * length, size) * scaling
    own = (asked @ key.transpose(-1, -2)).reshape(rows, shared, groups, length, length)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    own = own.masked_fill(later, float("-inf")).reshape(rows, shared, groups * length, length)
    there = _head.known.get(module.layer_idx)
    if there is None:
        _head.known[module.layer_idx] = key, value
        weights = own.float().softmax(-1).to(value.dtype)
        out = weights @ value
    else:
        # The head is stored once, so the queries of all rows are folded into one long row.
        folded = asked.transpose(0, 1).reshape(shared, rows * groups * length, size)
        met = (folded @ there[0][0].transpose(-1, -2)).reshape(shared, rows, groups * length, -1)
        scores = torch.cat([met.transpose(0, 1), own], dim=-1)
        weights = scores.float().softmax(-1).to(value.dtype)
        first = there[0].shape[2]
        over = weights[..., :first].transpose(0, 1).reshape(shared, rows * groups * length, first)
        out = (over @ there[1][0]).reshape(shared, rows, groups * length, size).transpose(0, 1)
        out = out + weights[..., first:] @ value
    return out.reshape(rows, heads, length, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def _attending(decoder: Any) -> Iterator[None]:
    own, decoder.config._attn_implementation = decoder.config._attn_implementation, ATTENTION
    try:
        yield
    finally:
        decoder.config._attn_implementation = own


class Trainer:
    """Train the upper blocks of a model; hold the head's hidden states below them."""

    def __init__(self, template: GuardTemplate, model: Any, frozen: int) -> None:
        self.verdicts = [i for word in VERDICTS for i in template.label_ids([word])]
        self._head_ids, self._frozen = head_of(template), frozen
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=LINEAR,
            layers_to_transform=list(range(frozen, len(model.model.layers))),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, config)
        self._below: dict[int, tuple[Tensor, Tensor]] = {}
        self._head_states = self._states([self._head_ids], 0)[0]
        self._below = _head.known

    def _states(self, prompts: Sequence[list[int]], first: int) -> list[Tensor]:
        """Return the frozen blocks' hidden states of prompts whose first token is at `first`."""
        whole, _head.known = self.model.get_base_model(), self._below
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)
        position = first + torch.arange(ids.shape[1])
        with torch.no_grad(), recording(whole, [self._frozen - 1]) as kept, _attending(whole.model):
            whole.model(ids, position_ids=position[None], use_cache=False)
        found = kept[self._frozen - 1]
        return [found[i, : len(prompt)].clone() for i, prompt in enumerate(prompts)]

    def known(self, asked: Sequence[Example]) -> list[Known]:
        """Return examples as hidden states of the frozen blocks."""
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
        found: dict[int, Known] = {}
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            states = self._states([asked[i].ids for i in part], len(self._head_ids))
            for i, one in zip(part, states, strict=True):
                found[i] = Known(one, asked[i].label, asked[i].weight)
        return [found[i] for i in range(len(asked))]

    @contextmanager
    def _upper(self) -> Iterator[Any]:
        """Cut the decoder down to the trained blocks."""
        decoder = self.model.get_base_model().model
        blocks, decoder.layers = decoder.layers, decoder.layers[self._frozen :]
        try:
            with _attending(decoder):
                yield decoder
        finally:
            decoder.layers = blocks

    def run_head(self) -> None:
        """Compute the head's keys and values in the trained blocks again, without gradients."""
        self._above = _head.known = {}
        with torch.no_grad(), self._upper() as decoder:
            decoder(inputs_embeds=self._head_states[None], use_cache=False)

    def logits(self, batch: Sequence[Known]) -> Tensor:
        """Return the next-token logits after each prompt, (rows, vocabulary).

        Rows are padded on the right. No gradient goes through the head.
        """
        _head.known = self._above
        states = torch.nn.utils.rnn.pad_sequence([one.states for one in batch], batch_first=True)
        position = len(self._head_states) + torch.arange(states.shape[1])
        with self._upper() as decoder:
            found = decoder(inputs_embeds=states, position_ids=position[None], use_cache=False)
        last = torch.tensor([len(one.states) - 1 for one in batch])
        picked = found.last_hidden_state[torch.arange(len(batch)), last]
        # Near 16 bfloat16 has steps of 1/8, which is more than the difference of many verdicts.
        return F.linear(picked.float(), self.model.get_base_model().lm_head.weight.float())

    def auroc(self, known: Sequence[Known]) -> float:
        """Return the AUROC of the current model's log-odds."""
        scores: dict[int, float] = {}
        order = sorted(range(len(known)), key=lambda i: len(known[i].states))
        self.run_head()
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                logits = self.logits([known[i] for i in part])[:, self.verdicts]
                scores |= zip(part, (logits[:, 1] - logits[:, 0]).tolist(), strict=True)
        self.model.train()
        return float(roc_auc_score([k.label for k in known], [scores[i] for i in sorted(scores)]))

    def train(
        self, todo: Sequence[list[Known]], rate: float, measured: list[Known], checks: int
    ) -> Iterator[float]:
        """Train one pass over batches, and yield the AUROC on held-out examples several times.

        Args:
            todo: The batches.
            rate: The peak learning rate.
            measured: Held-out examples.
            checks: How often they are measured, evenly spread.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rate, total_steps=len(todo), pct_start=0.1
        )
        ends = {len(todo) * k // checks for k in range(1, checks + 1)}
        began, recent = time.monotonic(), list[float]()
        self.model.train()
        for step, rows in enumerate(todo, 1):
            if step % HEAD_EVERY == 1:
                self.run_head()
            target = torch.tensor([row.label for row in rows])
            weight = torch.tensor([row.weight for row in rows])
            logits = self.logits(rows)
            two = logits[:, self.verdicts]
            losses = F.cross_entropy(two, target, reduction="none")
            elsewhere = logits.logsumexp(1) - two.logsumexp(1)
            verdict = (losses * weight).sum() / weight.sum()
            loss = verdict + MASS * elsewhere.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent = [*recent[-49:], verdict.item()]
            if step % 10 == 0:
                seconds = (time.monotonic() - began) / step
                found = f"verdict {statistics.mean(recent):.3f} elsewhere {elsewhere.mean():.2f}"
                print(f"{step}/{len(todo)} {found}, {seconds:.2f} s a step", flush=True)
            if step in ends:
                auroc = self.auroc(measured)
                print(f"step {step}: AUROC on guard_dev {auroc:.4f}", flush=True)
                yield auroc


def first_blocks(count: int, template: Path) -> tuple[Any, Any]:
    """Return SmolLM2 with its first blocks only, and its tokenizer with the guard's template."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return model, tokenizer


def write(output: Path, trainer: Trainer, card: dict[str, Any]) -> dict[str, Tensor]:
    """Write the current adapter and its card; return the adapter's tensors."""
    (output / "adapter").mkdir(parents=True, exist_ok=True)
    (output / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    config = trainer.model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
    (output / "adapter" / "adapter_config.json").write_text(text, encoding="utf-8")
    state = get_peft_model_state_dict(trainer.model)
    kept = {name: value.detach().to(torch.float16) for name, value in state.items()}
    save_file(kept, output / "adapter" / "adapter_model.safetensors")
    return {name: value.clone() for name, value in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--template", type=Path, help="default: beside the data, in guards/")
    parser.add_argument("--blocks", type=int, default=18, help="of SmolLM2's 30")
    parser.add_argument("--frozen", type=int, default=14, help="of them, which do not learn")
    parser.add_argument("--rows", type=int, default=4000, help="that are learned, at most")
    parser.add_argument("--epochs", type=int, default=2, help="over them without the tail")
    parser.add_argument("--whole", type=int, default=1600, help="of them with the whole prompt")
    parser.add_argument("--passes", type=int, default=1, help="over them with the whole prompt")
    parser.add_argument("--rate", type=float, default=3e-4, help="highest, with the whole prompt")
    parser.add_argument("--start", type=Path, help="an adapter to go on with, with whole prompts")
    parser.add_argument("--dev", type=int, default=710, help="rows that choose the state")
    parser.add_argument("--test", type=int, default=965, help="rows of the figures")
    given = parser.parse_args()
    template_file = given.template or (
        given.data.resolve().parent / "guards" / "qwen3guard_gen" / "chat_template.jinja"
    )
    set_seed(SEED)
    names = ("guard_train", "guard_dev", "guard_test_A")
    data = {name: rows_of(given.data / f"{name}.jsonl") for name in names}
    for name in names[:2]:
        data[name] = [row for row in data[name] if row["licence"] in OPEN]
    for rows in data.values():
        random.Random(SEED).shuffle(rows)
    model, tokenizer = first_blocks(given.blocks, template_file)
    template = GuardTemplate(
        tokenizer, name="verdict", chat_template=None, template_kwargs={}, prefill=PREFILL
    )
    trainer = Trainer(template, model, given.frozen)
    train = data["guard_train"][: given.rows]
    began = time.monotonic()
    short = [] if given.start else trainer.known(examples(train, template, tail=False))
    whole = trainer.known(examples(train[: given.whole], template, tail=True))
    chosen_by = data["guard_dev"][: given.dev]
    dev = trainer.known(examples(chosen_by, template, tail=True))
    print(f"{len(short)} prompts, {len(whole)} whole: {time.monotonic() - began:.0f} s", flush=True)
    card = {
        "blocks": given.blocks,
        "frozen": given.frozen,
        "rows": len(train),
        "epochs": given.epochs,
        "whole": len(whole),
        "passes": given.passes,
        "rate": given.rate,
        "data_sha256": {
            name: hashlib.sha256((given.data / f"{name}.jsonl").read_bytes()).hexdigest()
            for name in names
        },
        "purpose": "demonstration only; protects nobody",
        "seed": SEED,
    }
    draw = random.Random(SEED)
    best, state = 0.0, dict[str, Tensor]()
    if given.start:
        state = load_file(given.start / "adapter_model.safetensors")
        set_peft_model_state_dict(trainer.model, state)
    else:
        brief = examples(chosen_by, template, tail=False)
        measured = trainer.known([example for example in brief if example.weight == 1])
        todo = [batch for _ in range(given.epochs) for batch in batches(short, draw)]
        for _ in trainer.train(todo, RATE, measured, 2 * given.epochs):
            pass
    todo = [batch for _ in range(given.passes) for batch in batches(whole, draw)]
    for auroc in trainer.train(todo, given.rate, dev, CHECKS):
        if auroc > best:
            best = auroc
            card["guard_dev"] = {"rows": len(dev), "auroc": round(best, 4)}
            state = write(given.output, trainer, card)
    set_peft_model_state_dict(trainer.model, state)
    if given.test:
        asked = examples(
            data["guard_test_A"][: given.test], template, tail=True, question=1000, answer=1000
        )
        tested = trainer.known(asked)
        card["guard_test_A"] = {"rows": len(tested), "auroc": round(trainer.auroc(tested), 4)}
    print(json.dumps(card))
    write(given.output, trainer, card)
    whole_guard = trainer.model.float().merge_and_unload()
    whole_guard.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
