"""Your own training loop: score the data once, then call the loss.

python examples/own_loop.py --model MODEL --data chat.jsonl --guard NAME
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_dss_plugin import resolve_model, score_dataset, star_dss_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", required=True, help="jsonl with messages")
    parser.add_argument("--guard", default="qwen3guard-gen-0.6b")
    parser.add_argument("--max-steps", type=int, default=100)
    args = parser.parse_args()

    model = resolve_model(args.model)  # writes "smollm2" to a folder
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = load_dataset("json", data_files=args.data, split="train")
    dataset = score_dataset(dataset, tokenizer, guard=args.guard)
    dataset = dataset.select_columns(["input_ids", "labels", "star_scores"]).with_format("torch")

    policy = AutoModelForCausalLM.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    for step, row in zip(range(args.max_steps), dataset, strict=False):
        ids = row["input_ids"][None]
        with torch.no_grad():
            ref_logits = reference(ids).logits
        result = star_dss_loss(
            policy(ids).logits,
            row["labels"][None],
            row["star_scores"][None],
            ref_logits=ref_logits,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {result.loss:.4f} = ce {result.ce:.4f} + kl {result.kl:.4f}")


if __name__ == "__main__":
    main()
