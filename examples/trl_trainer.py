"""Finetune with TRL and STAR-DSS: two names change, everything else is a TRL script.

python examples/trl_trainer.py --model MODEL --data chat.jsonl --guard qwen3guard-gen-0.6b
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from star_dss_trl import StarDSSConfig, StarDSSTrainer  # SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", required=True, help="jsonl with messages")
    parser.add_argument("--guard", default="qwen3guard-gen-0.6b")
    parser.add_argument("--output", default="runs/trl")
    parser.add_argument("--max-steps", type=int, default=-1)
    args = parser.parse_args()

    config = StarDSSConfig(
        output_dir=args.output,
        loss_type="star_dss",
        guard=args.guard,
        chunk_size=5,
        kl_coef=0.5,
        per_device_train_batch_size=2,
        max_steps=args.max_steps,
        learning_rate=2e-4,
        logging_steps=1,
        report_to="none",
        bf16=torch.cuda.is_available(),  # TRL's default is True
    )
    trainer = StarDSSTrainer(
        args.model,
        args=config,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
