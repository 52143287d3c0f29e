"""Rows in parts: each part's columns, put together again, are the whole row's; or it is refused."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from support.models import make_tokenizer, tiny_llama
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from star_dss_plugin import ConfigError, DataError, StarDSSError, attach
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.logprobs import full_kl, token_logprobs
from star_dss_plugin.loss import Shaping, shaped_loss
from star_dss_plugin.training.rows.collation import TokenColumnsCollator
from star_dss_plugin.training.sequence_parts import (
    PartsCollator,
    check_resuming,
    exchanging,
    framed,
    is_part,
    part_of,
    refused_with_parts,
    trained_tokens,
)

PAD, VOCAB = 3, 11


def rows(lengths):
    """Rows whose first three tokens are a prompt, and whose columns tell tokens apart."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in lengths:
        ids = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
        made.append(
            {
                "input_ids": ids,
                "labels": [-100] * 3 + ids[3:],
                SCORES_COLUMN: torch.rand(length, generator=generator).tolist(),
                REF_COLUMN: (-torch.rand(length, generator=generator)).tolist(),
            }
        )
    return made


def collate(features, size, side="right"):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    return PartsCollator(TokenColumnsCollator(DataCollatorForSeq2Seq(tokenizer)), size, PAD)(
        features
    )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[9, 13], [12], [5, 24, 7]])
def test_a_part_has_the_columns_of_the_tokens_behind_its_own(size, lengths):
    features = rows(lengths)
    batch = collate(features, size)
    length = batch["input_ids"].shape[1]
    assert length % size == 0
    assert length - max(lengths) < size
    for index in range(size):
        part = part_of(batch, size, index)
        assert is_part(part)
        assert not is_part(batch)
        assert part["input_ids"].shape == (len(lengths), length // size)
        for i, feature in enumerate(features):  # the slow twin: token by token
            for j in range(length // size):
                at = index * (length // size) + j
                assert part["position_ids"][i, j] == at
                inside = at < lengths[i]
                assert part["attention_mask"][i, j] == inside
                assert not inside or part["input_ids"][i, j] == feature["input_ids"][at]
                behind = at + 1 < lengths[i]
                for name, of, empty in (
                    ("shift_labels", "labels", -100),
                    ("shift_star_scores", SCORES_COLUMN, 1.0),
                    ("shift_ref_logps", REF_COLUMN, 0.0),
                ):
                    expected = feature[of][at + 1] if behind else empty
                    assert part[name][i, j].item() == pytest.approx(expected), (name, i, at)


def test_the_batch_carries_what_deepspeed_cuts_and_what_is_read_whole():
    features = rows([9, 12])
    batch = collate(features, 2)
    for i, feature in enumerate(features):
        scores = feature[SCORES_COLUMN]
        assert batch[SCORES_COLUMN][i, : len(scores)].tolist() == pytest.approx(scores)
        moved = batch["shift_star_scores"][i]
        assert moved.tolist() == pytest.approx([*batch[SCORES_COLUMN][i, 1:].tolist(), 1.0])
    assert all(column.shape == (2, 12) for column in batch.values())


@pytest.mark.parametrize("loss_type", ["star_dss", "hard", "kl_only"])
def test_the_losses_of_parts_add_up_to_the_loss_of_the_whole(loss_type):
    """Also for the token whose prediction is the last of a part."""
    size, batch = 3, collate(rows([9, 13]), 3)
    torch.manual_seed(1)
    logits = torch.randn(2, batch["input_ids"].shape[1], VOCAB, dtype=torch.float64)
    others = torch.randn_like(logits)
    shaping = Shaping.named(loss_type, kl_coef=0.5, threshold=0.5)

    def loss_of(batch, logits, others, items):
        weights = shaping.weights(batch[SCORES_COLUMN], batch["labels"])
        logps = token_logprobs(logits, batch["labels"])
        kl = full_kl(logits, others, weights.kl != 0)
        return shaped_loss(logps, kl, weights, items).loss

    items = int((batch["labels"][:, 1:] != -100).sum())
    whole = loss_of(batch, logits, others, items)
    total, count = 0, 0
    for index in range(size):
        part = part_of(batch, size, index)
        count += int((part["shift_labels"] != -100).sum())
        cut = slice(index * 5, (index + 1) * 5)
        total += loss_of(framed(part), logits[:, cut], others[:, cut], items)
    assert count == items
    torch.testing.assert_close(total, whole)


def test_tokens_are_counted_in_parts_as_in_whole_rows():
    accelerator = SimpleNamespace(device="cpu", reduce=lambda total, how: total)
    batch = collate(rows([9, 13]), 2)
    parts = [part_of(batch, 2, index) for index in (0, 1)]
    assert trained_tokens(parts, accelerator) == trained_tokens([batch], accelerator) == 6 + 10


@pytest.mark.parametrize("joined", [False, True])
def test_rows_that_attention_could_not_keep_apart_are_refused(joined):
    if joined:  # documents of one row, whose positions begin again
        ids = torch.arange(4, 10)[None]
        batch = {
            "input_ids": ids,
            "labels": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        }
        with pytest.raises(DataError, match="must not be joined"):
            PartsCollator(lambda _: batch, 2, PAD)([])
        without = {name: batch[name] for name in ("input_ids", "labels")}
        with pytest.raises(DataError, match="must not be joined"):
            PartsCollator(lambda _: without, 2, PAD)([])
        batch["position_ids"] = torch.arange(6)[None]
        assert PartsCollator(lambda _: batch, 2, PAD)([])["position_ids"].shape == (1, 6)
    else:
        with pytest.raises(DataError, match="padded on the right"):
            collate(rows([9, 13]), 2, side="left")


def test_attention_exchanges_parts_in_modules_that_do_not_train():
    model = tiny_llama(VOCAB).eval()
    seen = []

    def watched(module, *args, **kwargs):
        seen.append((module.training, kwargs["dropout"]))
        return usual(module, *args, **kwargs)

    kind = model.config._attn_implementation
    usual = ALL_ATTENTION_FUNCTIONS[kind]
    ALL_ATTENTION_FUNCTIONS[kind] = watched
    try:
        with torch.no_grad():
            with exchanging(model):
                model(torch.arange(6)[None])
            exchanged, seen = seen, []
            model(torch.arange(6)[None])
        assert ALL_ATTENTION_FUNCTIONS[kind] is watched
    finally:
        ALL_ATTENTION_FUNCTIONS[kind] = usual
    layers = model.config.num_hidden_layers
    assert exchanged == [(True, 0.0)] * layers
    assert seen == [(False, 0.0)] * layers
    assert not any(module.training for module in model.modules())


def trainer(*, size=2, zero=None, stage=3, config=None, handler=None, **changes):
    """What `refused_with_parts` reads of a trainer that it lets pass."""
    model = tiny_llama(VOCAB)
    for name, value in (config or {}).items():
        setattr(model.config, name, value)
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero or {}})
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(
            sp_size=size, sp_handler=SimpleNamespace(**(handler or {}))
        ),
        distributed_type=changes.pop("kind", DistributedType.DEEPSPEED),
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    own = {
        "trains_parts": True,
        "train_dataset": Dataset.from_list([{"input_ids": [1]}]),
        "eval_dataset": None,
        "media_rows": lambda: None,
    }
    own |= {name: changes.pop(name) for name in list(own) if name in changes}
    args = SimpleNamespace(**{"average_tokens_across_devices": True, **changes})
    return SimpleNamespace(accelerator=accelerator, model=model, args=args, **own)


STREAM = Dataset.from_list([{"input_ids": [1]}]).to_iterable_dataset()
REFUSED = [
    ({"trains_parts": False}, "was not tried in"),
    ({"kind": DistributedType.MULTI_GPU}, "DeepSpeed, which cuts rows, is not on"),
    ({"stage": 2}, "makes gradients 2 times as large"),
    ({"zero": {"reduce_scatter": False}}, "makes gradients 2 times as large"),
    ({"zero": {"zero_quantized_gradients": True}}, "makes gradients 2 times as large"),
    ({"packing": True}, "would see each other"),
    ({"eval_packing": True}, "would see each other"),
    ({"padding_free": True}, "would see each other"),
    ({"config": {"sliding_window": 8}}, "a window of tokens"),
    ({"config": {"layer_types": ["sliding_attention", "full_attention"]}}, "a window of tokens"),
    ({"config": {"output_router_logits": True}}, "load-balancing loss"),
    ({"train_dataset": STREAM}, "data sets of tokens alone"),
    ({"eval_dataset": {"one": STREAM}}, "data sets of tokens alone"),
    ({"media_rows": lambda: object()}, "data sets of tokens alone"),
    ({"average_tokens_across_devices": False}, "counted over all processes only"),
    ({"handler": {"sp_seq_length_is_variable": False}}, "all batches have one length"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_cannot_go_with_parts_is_refused_in_words(changes, words):
    found = [why for condition, why, _ in refused_with_parts(trainer(**changes)) if condition]
    assert len(found) == 1
    assert words in found[0]
    assert refused_with_parts(trainer(size=1, **changes)) == []


def test_a_plain_run_in_parts_is_not_refused():
    changes = {"config": {"sliding_window": 8, "use_sliding_window": False}}
    for given in (trainer(), trainer(**changes), trainer(packing=False, eval_packing=None)):
        assert not any(condition for condition, *_ in refused_with_parts(given))


def test_a_run_in_parts_resumes_only_if_no_row_is_to_be_skipped():
    with pytest.raises(ConfigError, match="ignore_data_skip=True"):
        check_resuming(trainer(ignore_data_skip=False))
    check_resuming(trainer(ignore_data_skip=True))
    check_resuming(trainer(size=1, ignore_data_skip=False))


def test_labels_that_are_moved_without_their_scores_stop_the_run(tmp_path):
    """A host that renames labels, without sequence parallelism."""

    class Late(Trainer):
        def get_batch_samples(self, *given):
            batches, items = super().get_batch_samples(*given)
            for batch in batches:
                batch["shift_labels"] = batch.pop("labels").roll(-1, 1)
            return batches, items

    tokenizer = make_tokenizer()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    given = Late(
        tiny_llama(len(tokenizer)),
        args=arguments,
        train_dataset=Dataset.from_list(rows([9] * 2))
        .remove_columns([SCORES_COLUMN, REF_COLUMN])
        .map(lambda row: {"attention_mask": [1] * len(row["input_ids"])}),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    before = {name: value.clone() for name, value in given.model.named_parameters()}
    attach(given, guard="test-words", segmenter="tokens")
    with pytest.raises(StarDSSError, match=r"it has \['attention_mask', 'input_ids', 'shift_lab"):
        given.train()
    assert all(torch.equal(before[n], value) for n, value in given.model.named_parameters())
