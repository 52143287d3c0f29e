"""A toy training framework: one YAML file, one loop, and a loss that a subclass can replace.

It does not depend on STAR-DSS. Run it with `python -m toy_host toy.yaml`.
"""

import importlib
import sys
from pathlib import Path

import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


class ToyTrainer:
    """Train a causal language model on one row per step."""

    def __init__(self, config):
        self.config, settings = config, config["toy"]
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"])
        self.steps = settings.get("steps", 1)
        self.dataset = self.prepare(read(settings["data"], self.tokenizer))

    def prepare(self, dataset: Dataset) -> Dataset:
        return dataset

    def loss(self, logits, row):
        return torch.nn.functional.cross_entropy(logits[0, :-1], row["labels"][1:])

    def train(self):
        """Train, and return the loss of every step."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        losses = []
        rows = self.dataset.with_format("torch")
        for step in range(self.steps):
            row = rows[step % len(rows)]
            loss = self.loss(self.model(row["input_ids"][None]).logits, row)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses


def read(path, tokenizer) -> Dataset:
    """Return rows with their tokens and with labels that train the completions only."""

    def encode(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    return load_dataset("json", data_files=str(path), split="train").map(encode)


def trainer_class(config):
    """Return the class that the YAML names, or `ToyTrainer`."""
    module, _, name = config["toy"].get("trainer", "toy_host:ToyTrainer").partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    print(trainer_class(config)(config).train())
