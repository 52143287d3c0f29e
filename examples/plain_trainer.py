"""transformers' own Trainer: tokenize with labels, attach, train.

python examples/plain_trainer.py --model MODEL --data chat.jsonl --guard NAME
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import star_dss_plugin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", required=True, help="jsonl with prompt and completion (text)")
    parser.add_argument("--guard", default="qwen3guard-gen-0.6b")
    parser.add_argument("--output", default="runs/plain")
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    model = star_dss_plugin.resolve_model(args.model)  # writes "smollm2" to a folder
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)
        ids = answer["input_ids"]
        return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}

    # The columns prompt and completion stay: the guard reads them.
    dataset = load_dataset("json", data_files=args.data, split="train").map(tokenize)
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=2,
            max_steps=args.max_steps,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    star_dss_plugin.attach(trainer, guard=args.guard)
    trainer.train()


if __name__ == "__main__":
    main()
