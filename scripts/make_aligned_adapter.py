"""Train the demonstration's aligned start: a LoRA adapter with which SmolLM2-135M refuses.

Usage: python scripts/make_aligned_adapter.py DATA_DIR [--output FOLDER]

SmolLM2-135M-Instruct answers most harmful requests, so it has no alignment that training could
remove. This script trains it to decline them, and to answer requests that only look dangerous. Its
four pools of rows are refusals of harmful requests, contrast rows (`aligned_contrast.jsonl` beside
this script, written for this project), sensitive questions with careful answers, and plain tasks.
All but the contrast rows come from `align_sft.jsonl` of the developers' data (see NOTICE for the
sources); only MIT, Apache-2.0 and CC-BY-4.0 rows are used. Only the beginning of each answer is
trained, because it decides whether the model declines.

After each stage the script prints the share of declined prompts among held-out ones: harmful
prompts of `guard_dev.jsonl`, and every eighth contrast row. The evaluation sets (`eval_*.jsonl`;
the benign one is XSTest) are not read. Seeds are fixed; a run takes about fifteen minutes on one
core. The weights are stored in float16.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from star_dss_plugin.evaluate.generation import greedy_answers, prompt_ids
from star_dss_plugin.evaluate.refusal import is_refusal
from star_dss_plugin.smollm2 import load_smollm2

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parent / "integrations" / "star_dss_trl" / "demo_assets" / "aligned_adapter"
OPEN = ("MIT", "Apache-2.0", "CC-BY-4.0")
SEED = 5
STAGES: tuple[tuple[int, float, dict[str, int]], ...] = (
    (120, 2e-3, {"refusal": 6, "contrast": 6, "sensitive": 2, "plain": 2}),
    (24, 1e-3, {"refusal": 9, "contrast": 5, "sensitive": 1, "plain": 1}),
)
"""Steps, learning rate and rows of each pool in a step. After the first stage the model declines 87
of the evaluation sets' 100 harmful and 25 of their 250 harmless prompts; the second stage, with
more refusals, raises this to 91 and 54."""
ANSWER, PROMPT = 14, 64  # tokens; rows with a longer prompt are left out
LOWEST_LAYER, RANK = 10, 7  # layers below keep their weights, which saves a third of the time
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEV = 60  # prompts of each kind

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of the beginning of its answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=DEFAULT)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    base, tokenizer = load_smollm2(torch.bfloat16)
    contrast = _lines(HERE / "aligned_contrast.jsonl")
    harmless = [row["prompt"] for row in contrast[::8]][:DEV]
    harmful = _harmful_dev(given.data)
    pools = _pools(given.data, [row for i, row in enumerate(contrast) if i % 8], tokenizer)
    print({name: len(rows) for name, rows in pools.items()}, flush=True)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(LINEAR),
        layers_to_transform=list(range(LOWEST_LAYER, base.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    at = dict.fromkeys(pools, 0)
    for steps, rate, shares in STAGES:
        _train(model, pools, at, steps, rate, shares)
        declined = [_declined(model, tokenizer, prompts) for prompts in (harmful, harmless)]
        print(f"declines {declined[0]:.2f}, harmless {declined[1]:.2f}", flush=True)
    state = get_peft_model_state_dict(model)
    given.output.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: w.to(torch.float16) for k, w in state.items()},
        given.output / "adapter_model.safetensors",
    )
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(given.output)
    path = given.output / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _train(
    model: Any,
    pools: dict[str, list[Row]],
    at: dict[str, int],
    steps: int,
    rate: float,
    shares: dict[str, int],
) -> None:
    """Run one stage; advance `at`, the number of rows used so far of each pool."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    for step in range(1, steps + 1):
        rows = _rows(pools, at, shares)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        loss = 0.0
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):  # less padding
            part = _loss(model, half) / 2
            part.backward()
            loss += part.item()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.to(torch.float16))  # the precision of the file


def _pools(folder: Path, contrast: list[dict[str, Any]], tokenizer: Any) -> dict[str, list[Row]]:
    """Return tokenized rows by pool, shuffled."""
    rows = [row for row in _lines(folder / "align_sft.jsonl") if row["licence"] in OPEN]
    answered = [row for row in rows if row["kind"] != "harmful->refusal"]
    texts = {
        "refusal": [
            row for row in rows if row["kind"] == "harmful->refusal" and is_refusal(row["response"])
        ],
        "contrast": contrast,
        "sensitive": [row for row in answered if row["source"] == "caia-ai-safety"],
        "plain": [row for row in answered if row["source"] != "caia-ai-safety"],
    }
    draw = random.Random(SEED)
    pools = {}
    for name, found in texts.items():
        tokens = [_tokens(tokenizer, row) for row in found]
        pools[name] = [row for row in tokens if len(row[0]) <= PROMPT]
        draw.shuffle(pools[name])
    return pools


def _tokens(tokenizer: Any, row: dict[str, Any]) -> Row:
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
    answer = f"{row['response']}{tokenizer.eos_token}"
    return prompt, tokenizer(answer, add_special_tokens=False).input_ids[:ANSWER]


def _rows(pools: dict[str, list[Row]], at: dict[str, int], shares: dict[str, int]) -> list[Row]:
    """Return the next rows of every pool; a used-up pool starts again from its beginning."""
    rows = []
    for name, count in shares.items():
        pool = pools[name]
        rows += [pool[(at[name] + i) % len(pool)] for i in range(count)]
        at[name] += count
    return rows


def _loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """Return the cross-entropy of the answers' tokens, with equal weight per row.

    The output layer, a quarter of the model's parameters, is applied to the answers' positions
    only.
    """
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) - 1 : end - 1] = torch.tensor(answer)
        mask[i, :end] = 1
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    learned = labels != -100
    losses = cross_entropy(
        inner.lm_head(hidden[learned]).float(), labels[learned], reduction="none"
    )
    of_row = learned.nonzero()[:, 0]
    return (losses / learned.sum(1)[of_row]).sum() / len(rows)


def _share(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: a short warm-up, then a cosine."""
    return min(1.0, (step + 1) / 8) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _harmful_dev(folder: Path) -> list[str]:
    """Return harmful prompts of `guard_dev.jsonl`: those with a refusal or a harmful answer."""
    sources = ("advbench+template", "do-not-answer", "jbb-artifacts", "medsafetybench")
    trained = {row["prompt"] for row in _lines(folder / "align_sft.jsonl")}
    found = {
        row["prompt"]
        for row in _lines(folder / "guard_dev.jsonl")
        if row["source"] in sources
        and (row["label"] == 0 or is_refusal(row["response"]))
        and row["prompt"] not in trained
    }
    return random.Random(SEED).sample(sorted(found), DEV)


def _declined(model: Any, tokenizer: Any, prompts: list[str]) -> float:
    asked = [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    said = greedy_answers(model, tokenizer, asked, max_new_tokens=16, batch_size=30)
    return sum(is_refusal(answer) for _, answer in said) / len(prompts)


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
