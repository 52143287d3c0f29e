"""Data in every form that `star-dss init` knows, and file names that need quoting in YAML."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

from star_dss_plugin import score_dataset
from star_dss_plugin.data.writing import write_dataset

PAIRS = [("how are you?", "i am fine, thank you."), ("is this bad?", "no! a bad word.")] * 2

FORMS = {
    "messages": [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
        for p, a in PAIRS
    ],
    "conversations": [
        {"conversations": [{"from": "user", "value": p}, {"from": "assistant", "value": a}]}
        for p, a in PAIRS
    ],
    "prompt-completion": [{"prompt": p, "completion": " " + a} for p, a in PAIRS],
    "text": [{"text": f"{p} {a}"} for p, a in PAIRS],
}

HOSTILE = [
    'it\'s "quoted".jsonl',
    "two\nlines.jsonl",
    "key: value # no comment.jsonl",
    "- {a: [b]}.jsonl",
    "*alias &anchor !tag %x.jsonl",
    "ünïcode ☃.jsonl",
    "back\\slash $HOME `id`.jsonl",
    "null.jsonl",
    "--guard.jsonl",
]


def write_rows(path: Path, form: str, tokenizer) -> str:
    """Write rows of a form to `path`, with a suffix if the form needs one; return the path."""
    if form in FORMS:
        path.write_text("".join(json.dumps(row) + "\n" for row in FORMS[form]))
    elif form == "parquet":
        Dataset.from_list(FORMS["messages"]).to_parquet(path := path.with_suffix(".parquet"))
    elif form == "splits":
        DatasetDict({"train": Dataset.from_list(FORMS["messages"])}).save_to_disk(path)
    elif form == "scored":
        rows = Dataset.from_list(FORMS["messages"])
        write_dataset(score_dataset(rows, tokenizer, guard="test-words", progress=False), path)
    return str(path)
