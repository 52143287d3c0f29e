"""Keep your SFTTrainer: one call gives it the STAR-DSS loss.

python examples/attach_to_sft_trainer.py --model MODEL --data chat.jsonl --guard NAME
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import star_dss_plugin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", required=True, help="jsonl with prompt and completion")
    parser.add_argument("--guard", default="qwen3guard-gen-0.6b")
    parser.add_argument("--output", default="runs/attach")
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    trainer = SFTTrainer(
        star_dss_plugin.resolve_model(args.model),
        args=SFTConfig(
            output_dir=args.output,
            per_device_train_batch_size=2,
            max_steps=args.max_steps,
            logging_steps=1,
            report_to="none",
            bf16=torch.cuda.is_available(),  # TRL's default is True
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
    )
    star_dss_plugin.attach(trainer, guard=args.guard)  # the only new line
    trainer.train()


if __name__ == "__main__":
    main()
