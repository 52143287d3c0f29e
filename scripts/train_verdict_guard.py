"""Train a small guard that gives verdicts, so that what such guards cost can be measured.

    python scripts/train_verdict_guard.py DATA_DIR OUTPUT [--template FILE]

The first blocks of SmolLM2-135M-Instruct learn, by a LoRA adapter, to answer Qwen3Guard's prompt
with "Safety: Safe" or "Safety: Unsafe". DATA_DIR holds guard_train, guard_dev and guard_test_A
(.jsonl, one row per line: prompt, response, label 1 safe or 0 harmful, source, licence); the
template is that of Qwen3Guard-Gen. OUTPUT gets the whole guard, ready to be named as a guard's
`model`, with its figures in `card.json`, and the adapter alone in `adapter/`. It protects nobody.

Every response is judged whole, and every third one also after a part of it, since a guard that
scores chunks reads prefixes. Prefixes of safe responses are safe; those of harmful ones weigh the
less the shorter they are. Only MIT, Apache-2.0 and CC-BY-4.0 rows are used.

The template's words behind the answer are three quarters of a prompt. So the guard first learns
without them, with the verdict right behind the answer; then it learns to give the same verdicts
behind them, from a part of the rows. The state with the best AUROC on guard_dev is kept;
guard_test_A serves for the figures alone. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import statistics
import time
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
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from transformers import DynamicCache, set_seed

from star_dss_plugin.guards.prompting.template import GuardTemplate
from star_dss_plugin.smollm2 import load_smollm2

OPEN = ("MIT", "Apache-2.0", "CC-BY-4.0")
PREFILL, VERDICTS = "Safety:", (" Unsafe", " Safe")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 3
BATCH, RATE, WARMUP = 16, 5e-4, 20
RANK = 8
LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]
QUESTION, ANSWER = 240, 480  # characters that are read of each in training
HEAD_EVERY = 4  # steps after which the states of the policy are computed again
CHECKS = 2  # how often the state is measured while whole prompts are learned
MASS = 0.2  # weight of what makes it answer with one of its words at all


class Example(NamedTuple):
    """Hold a prompt without its head, and its verdict: 1 safe, 0 harmful."""

    ids: list[int]
    label: int
    weight: float


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(rows: list[dict[str, Any]], template: GuardTemplate, *, tail: bool) -> list[Example]:
    """Return prompts without their head: of whole responses, or also of parts and without a tail.

    Args:
        rows: With prompt, response and label.
        template: Makes the prompts.
        tail: Whether the template's words stand between answer and verdict. If not, every third
            response is also judged after a part of it.
    """
    draw = random.Random(SEED)
    head = len(head_of(template))
    verdict = template.content_ids(f"\n\n{PREFILL}")
    found = []
    for number, row in enumerate(rows):
        asked = [{"role": "user", "content": row["prompt"][-QUESTION:]}]
        answer = row["response"][:ANSWER]
        if tail:
            (prompt,) = template.prompts(asked, answer, [len(answer)])
            found.append(Example(prompt[head:], row["label"], 1.0))
            continue
        ends = [len(answer)]
        if number % 3 == 0 and len(answer) > 1:
            ends.append(draw.randrange(1, len(answer)))
        for end in ends:
            opened, _ = template.opened(asked, answer[:end])
            weight = 1.0 if row["label"] else end / len(answer)
            found.append(Example(opened[head:] + verdict, row["label"], weight))
    return found


def head_of(template: GuardTemplate) -> list[int]:
    """Return the tokens with which all prompts begin: the policy."""
    one, other = (template.opened([{"role": "user", "content": c}], c)[0] for c in ("a", "b"))
    return one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]


def batches(asked: list[Example]) -> list[list[Example]]:
    """Return batches in random order, whose prompts are about as long as each other."""
    draw = random.Random(SEED)
    order = draw.sample(asked, len(asked))
    found = []
    for start in range(0, len(order), 4 * BATCH):
        some = sorted(order[start : start + 4 * BATCH], key=lambda example: len(example.ids))
        few = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
        found += draw.sample(few, len(few))
    return found


class Trainer:
    """Hold the model, and the states of what all prompts begin with."""

    def __init__(self, template: GuardTemplate, model: Any) -> None:
        self.verdicts = [i for word in VERDICTS for i in template.label_ids([word])]
        blocks = len(model.model.layers)
        self._head = head_of(template)
        self._known: DynamicCache | None = None
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=LINEAR,
            layers_to_transform=list(range(blocks // 2, blocks)),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(model, config)

    def logits(self, batch: list[Example]) -> torch.Tensor:
        """Return the next-token logits behind each prompt, (rows, vocabulary).

        Rows are padded at their ends, which no real token sees. No gradient goes through the head.
        """
        whole = self.model.get_base_model()
        if self._known is None:
            self._known = DynamicCache()
            with torch.no_grad():
                whole.model(torch.tensor([self._head]), past_key_values=self._known, use_cache=True)
        cache = copy.deepcopy(self._known)
        cache.batch_repeat_interleave(len(batch))
        rows = [torch.tensor(example.ids) for example in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        states = whole.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rows])
        found: torch.Tensor = whole.lm_head(states[torch.arange(len(rows)), last]).float()
        return found

    def auroc(self, asked: list[Example]) -> float:
        self._known = None
        scores: dict[int, float] = {}
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(order), BATCH):
                part = order[start : start + BATCH]
                logits = self.logits([asked[i] for i in part])[:, self.verdicts]
                scores |= zip(part, (logits[:, 1] - logits[:, 0]).tolist(), strict=True)
        self.model.train()
        labels = [example.label for example in asked]
        return float(roc_auc_score(labels, [scores[i] for i in range(len(asked))]))

    def train(
        self, short: list[Example], whole: list[Example], dev: list[Example]
    ) -> tuple[dict[str, Any], float]:
        """Train one pass over both kinds of prompts; return the best state and its AUROC."""
        todo = batches(short)
        shorter = len(todo)
        todo += batches(whole)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=len(todo), pct_start=WARMUP / len(todo)
        )
        checks = [shorter + (len(todo) - shorter) * (k + 1) // CHECKS for k in range(CHECKS)]
        best: tuple[dict[str, Any], float] = ({}, 0.0)
        began, recent = time.monotonic(), list[float]()
        self.model.train()
        for step, rows in enumerate(todo, 1):
            if step % HEAD_EVERY == 1:
                self._known = None
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
            recent = [*recent[-19:], verdict.item()]
            if step % 10 == 0:
                seconds = (time.monotonic() - began) / step
                found = f"verdict {statistics.mean(recent):.3f} elsewhere {elsewhere.mean():.2f}"
                print(f"{step}/{len(todo)} {found}, {seconds:.1f} s a step", flush=True)
            if step in checks:
                auroc = self.auroc(dev)
                print(f"step {step}: AUROC on guard_dev {auroc:.4f}", flush=True)
                if auroc > best[1]:
                    state = get_peft_model_state_dict(self.model)
                    best = {name: value.clone() for name, value in state.items()}, auroc
        return best


def first_blocks(count: int, template: Path) -> tuple[Any, Any]:
    """Return SmolLM2, cut to its first blocks, and its tokenizer with the guard's template."""
    model, tokenizer = load_smollm2(torch.bfloat16)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--template", type=Path, help="default: beside the data, in guards/")
    parser.add_argument("--blocks", type=int, default=18, help="of SmolLM2's 30")
    parser.add_argument("--rows", type=int, default=4000, help="that are learned, at most")
    parser.add_argument("--whole", type=int, default=800, help="of them with the whole prompt")
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
    trainer = Trainer(template, model)
    train = data["guard_train"][: given.rows]
    state, dev = trainer.train(
        examples(train, template, tail=False),
        examples(train[: given.whole], template, tail=True),
        examples(data["guard_dev"][: given.dev], template, tail=True),
    )
    set_peft_model_state_dict(trainer.model, state)
    card = {
        "blocks": given.blocks,
        "rows": len(train),
        "guard_dev": {"rows": min(given.dev, len(data["guard_dev"])), "auroc": round(dev, 4)},
        "data_sha256": {
            name: hashlib.sha256((given.data / f"{name}.jsonl").read_bytes()).hexdigest()
            for name in names
        },
        "purpose": "demonstration only; protects nobody",
        "seed": SEED,
    }
    if given.test:
        tested = examples(data["guard_test_A"][: given.test], template, tail=True)
        card["guard_test_A"] = {"rows": len(tested), "auroc": round(trainer.auroc(tested), 4)}
    print(json.dumps(card))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (given.output / "adapter").mkdir(exist_ok=True)
    config = trainer.model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
    (given.output / "adapter" / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(
        {name: value.to(torch.float16) for name, value in state.items()},
        given.output / "adapter" / "adapter_model.safetensors",
    )
    whole = trainer.model.float().merge_and_unload()
    whole.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
