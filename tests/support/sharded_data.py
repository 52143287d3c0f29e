"""The models and rows of the runs in `sharded_runs`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path


def shape_of(case):
    """Return a case's kind of model: "untied", "experts", or "" for neither."""
    return next((name for name in ("untied", "experts") if case.get(name)), "")


def model_folder(folder, shape=""):
    """Return the folder of a model of this kind; save the model if it does not exist."""
    from support.models import make_tokenizer, tiny_llama, tiny_qwen3_moe

    path = Path(folder) / f"model-{shape}".rstrip("-")
    if not path.exists():
        tokenizer = make_tokenizer()
        if shape == "experts":
            model = tiny_qwen3_moe(len(tokenizer))
            model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0
        else:
            model = tiny_llama(len(tokenizer), tie_word_embeddings=shape != "untied")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def vision_folder(folder, name):
    """Return the folder of a vision-language model; save the model if it does not exist."""
    from support.vision_models import MAKE

    path = Path(folder) / name
    if not path.exists():
        model, processor = MAKE[name]()
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return path


def data_of(case, ranks, differs):
    """Return a case's training and evaluation rows; streams if the case says so.

    Args:
        case: A case of `CASES`.
        ranks: The number of processes. One process gets the rows in the order in which two read a
            stream.
        differs: How this rank's data differ from the other ranks', or None.
    """
    from datasets import Dataset

    from support.trl_runs import prompt_completion

    data, files, shards = prompt_completion(), case.get("files"), case.get("stream", 0)
    if differs == "rows":
        data = data.select(range(7, -1, -1))
    evaluation = data.select(range(3 if differs == "evaluation" else 4))
    if differs == "scored":  # a copy that was scored before
        data = data.add_column("star_scores", [[1.0]] * len(data))
    if case.get("rare"):
        data = data.map(lambda row, i: {"completion": safe_or_not(row, i)}, with_indices=True)
    if case.get("rows"):
        data = data.select(range(case["rows"]))
    if files:
        data = data.select([i % len(data) for i in range(sum(files))])
    if shards > 1 and ranks == 1:
        # The second file is read again from its beginning when it ends before the first.
        first, second = files or [4, 4]
        pairs = [(i, first + i % second) for i in range(first)]
        data = data.select([i for pair in pairs for i in pair])
    if case.get("vision"):
        data = Dataset.from_list(asked_about_images(data))
        evaluation = data.select(range(4))
    if files:
        evaluation = data.select(range(3)) if ranks > 1 else data.select([0, 4, 2, 4])
    if files and ranks > 1:
        return from_files(data, files), from_files(evaluation, [2, 1])
    if shards and (ranks > 1 or case.get("rows")):
        return data.to_iterable_dataset(num_shards=shards), evaluation.to_iterable_dataset()
    return data, evaluation


def asked_about_images(rows):
    """Return conversations with none, two, one and no images in turn."""
    from support.vision_models import stripes

    made = []
    for i, row in enumerate(rows):
        images = [stripes(i + n) for n in range((0, 2, 1, 0)[i % 4])]
        parts = [{"type": "image", "text": None}] * len(images)
        (asked,), (answer,) = row["prompt"], row["completion"]
        made.append(
            {
                "messages": [
                    {**asked, "content": [*parts, {"type": "text", "text": asked["content"]}]},
                    {**answer, "content": [{"type": "text", "text": answer["content"]}]},
                ],
                "images": images,
            }
        )
    return made


def from_files(data, sizes):
    """Return a stream of files with these numbers of rows."""
    from datasets import IterableDataset

    rows = iter(list(data))
    parts = [list(islice(rows, size)) for size in sizes]
    return IterableDataset.from_generator(rows_of, data.features, gen_kwargs={"files": parts})


def rows_of(files):
    """Yield the rows of all files."""
    for rows in files:
        yield from rows


def safe_or_not(row, i):
    """Return an answer that is unsafe in one of four rows."""
    return [{"role": "assistant", "content": "a bad word" if i % 4 == 1 else f"{i} is fine"}]


def tokens_of(row, tokenizer):
    """Return the tokens of a prompt and its completion, of which the completion is trained."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], tokenize=True, return_dict=False
    )
    labels = [-100] * len(prompt) + whole[len(prompt) :]
    return {"input_ids": whole, "labels": labels, "attention_mask": [1] * len(whole)}
