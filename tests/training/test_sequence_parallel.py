"""Sequence parallelism: the parts' columns, joined, equal the whole row's, or it is refused."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support.models import make_tokenizer, tiny_llama, tiny_qwen3_moe
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from star_dss_plugin import DataError, StarDSSError, attach
from star_dss_plugin.data.columns import REF_COLUMN, SCORES_COLUMN
from star_dss_plugin.logprobs import full_kl, token_logprobs
from star_dss_plugin.loss import Shaping, shaped_loss
from star_dss_plugin.training import mixin, sequence_parallel
from star_dss_plugin.training.rows.collation import TokenColumnsCollator
from star_dss_plugin.training.rows.shortest import shortest_row
from star_dss_plugin.training.sequence_parallel import (
    SequenceParallelCollator,
    balancing_over_group,
    exchanging_in_eval,
    is_part,
    one_epoch,
    own_tokens,
    pad_batch,
    slice_for_rank,
    trained_tokens,
    unshifted,
)
from star_dss_plugin.training.step import averaging_factor

PAD, VOCAB = 3, 11


def rows(lengths):
    """Return rows with a prompt of three tokens, whose columns identify their tokens."""
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


def collate(features, size, side="right", length=None):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    inner = TokenColumnsCollator(DataCollatorForSeq2Seq(tokenizer))
    return SequenceParallelCollator(inner, size, PAD, length)(features)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[9, 13], [12], [5, 24, 7]])
def test_a_part_has_the_columns_of_the_tokens_behind_its_own(size, lengths):
    features = rows(lengths)
    batch = collate(features, size)
    length = batch["input_ids"].shape[1]
    assert length % size == 0
    assert length - max(lengths) < size
    for index in range(size):
        part = slice_for_rank(batch, size, index)
        assert is_part(part)
        assert not is_part(batch)
        assert part["input_ids"].shape == (len(lengths), length // size)
        for i, feature in enumerate(features):  # compared token by token
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
    """Also for a token that is predicted at the last position of the previous part."""
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
        part = slice_for_rank(batch, size, index)
        count += int((part["shift_labels"] != -100).sum())
        cut = slice(index * 5, (index + 1) * 5)
        total += loss_of(unshifted(part), logits[:, cut], others[:, cut], items)
    assert count == items
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("group", [None, "of this row"])
def test_tokens_are_counted_in_parts_as_in_whole_rows(monkeypatch, group):
    counted = []
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda total, group: counted.append((int(total), group))
    )
    batch = collate(rows([9, 13]), 2)
    parts = [slice_for_rank(batch, 2, index) for index in (0, 1)]
    assert trained_tokens(parts, "cpu", group) == trained_tokens([batch], "cpu", group) == 6 + 10
    assert counted == [(16, group)] * 2


@pytest.mark.parametrize("together", [True, False])
def test_an_evaluation_divides_by_the_tokens_that_its_loss_is_averaged_over(monkeypatch, together):
    """Each process evaluates its own whole rows; unless averaged, only its own tokens count."""
    groups = []
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda total, group: groups.append(group) or total.mul_(2)
    )
    monkeypatch.setattr(mixin, "sequence_parallel_group", lambda: "of this row")
    given = SimpleNamespace(
        star_dss_state=object(),
        args=SimpleNamespace(average_tokens_across_devices=together),
        accelerator=SimpleNamespace(
            device="cpu", parallelism_config=SimpleNamespace(sp_size=2), num_processes=2
        ),
        get_tp_size=lambda: 1,
    )
    whole = collate(rows([9, 13]), 2)
    for batch, part in ((whole, False), (slice_for_rank(whole, 2, 1), True)):
        own = int(own_tokens([batch], "cpu"))
        found = mixin.StarDSSMixin._get_num_items_in_batch(given, [batch])
        assert int(found) == own * averaging_factor(given, part=part), (together, part)
    assert groups == ([None, None] if together else ["of this row"])


@pytest.mark.parametrize(
    ("together", "part", "times"),
    [(True, True, 8), (True, False, 8), (False, True, 2), (False, False, 1)],
)
def test_a_loss_counts_as_often_as_processes_divide_by_the_same_tokens(together, part, times):
    """With eight processes, two per row."""
    accelerator = SimpleNamespace(num_processes=8, parallelism_config=SimpleNamespace(sp_size=2))
    given = SimpleNamespace(
        args=SimpleNamespace(average_tokens_across_devices=together),
        accelerator=accelerator,
        get_tp_size=lambda: 1,
    )
    assert averaging_factor(given, part=part) == times


def test_batches_have_the_length_that_attention_is_set_up_for():
    features = rows([9, 13])
    batch = collate(features, 2, length=20)
    assert all(column.shape == (2, 20) for column in batch.values())
    free = collate(features, 2)
    again = pad_batch(free, 20, PAD)
    for index in (0, 1):
        one, other = slice_for_rank(batch, 2, index), slice_for_rank(again, 2, index)
        assert all(torch.equal(column, other[name]) for name, column in one.items())
    with pytest.raises(DataError, match=r"rows of 13 tokens, and sp_seq_length is 12.*max_length="):
        collate(features, 2, length=12)


def test_the_row_that_is_tried_reaches_into_the_second_part():
    """The shortest such row is used, or the longest row if none reaches the second part."""
    features = rows([9, 13, 7, 12])
    for beyond, expected in ((0, 7), (8, 9), (9, 12), (12, 13), (20, 13)):
        row = shortest_row(features, 8, iter, beyond)
        assert len(row["input_ids"]) == expected, beyond


class Cut:
    """Iterate over two batches twice, as DeepSpeed's loader does."""

    def __init__(self):
        self.left = [1, 2, StopIteration, 3, 4, StopIteration, StopIteration]

    def __iter__(self):
        return self

    def __next__(self):
        found = self.left.pop(0)
        if found is StopIteration:
            raise StopIteration
        return found


@pytest.mark.parametrize("asked", [2, 3])
def test_a_pass_ends_once_whether_or_not_it_was_asked_for_more(asked):
    cut = Cut()
    first = one_epoch(cut)
    assert [next(first, None) for _ in range(asked)] == [1, 2, None][:asked]
    second = one_epoch(cut)
    assert [next(second, None) for _ in range(4)] == [3, 4, None, None]
    assert list(one_epoch(Cut())) == [1, 2]


def test_a_pass_over_nothing_ends():
    cut = Cut()
    cut.left = [StopIteration] * 2
    assert list(one_epoch(cut)) == []


@pytest.mark.parametrize("module", [modeling_qwen3_moe, modeling_mixtral])
def test_the_load_balancing_loss_of_parts_is_that_of_the_whole(monkeypatch, module):
    """For the function of the model's module, and the one that TRL calls."""
    torch.manual_seed(0)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 7:] = 0
    layers = [torch.randn(2, 10, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    usual = module.load_balancing_loss_func
    whole = usual(tuple(layer.reshape(-1, 4) for layer in layers), 4, 2, mask)
    (gradient,) = torch.autograd.grad(whole, layers[0])
    halves = [
        [layer[:, half].reshape(-1, 4) for layer in layers] + [mask[:, half]]
        for half in (slice(5), slice(5, 10))
    ]
    found = torch.zeros_like(gradient)
    monkeypatch.setattr(sequence_parallel, "sequence_parallel_group", lambda: "group")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    for rank, half in enumerate((slice(5), slice(5, 10))):

        def gather(parts, own, group, rank=rank):
            at = next(i for i, column in enumerate(halves[rank]) if torch.equal(column, own))
            for part, columns in zip(parts, halves, strict=True):
                part.copy_(columns[at].detach())

        monkeypatch.setattr(torch.distributed, "all_gather", gather)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        *logits, part = halves[rank]
        with balancing_over_group(tiny_qwen3_moe()):
            loss = module.load_balancing_loss_func(tuple(logits), 4, 2, part)
        torch.testing.assert_close(loss, whole)
        # Averaged over both processes; the other process has no gradient for this half.
        found[:, half] = torch.autograd.grad(loss, layers[0])[0][:, half] / 2
        assert module.load_balancing_loss_func is usual
    torch.testing.assert_close(found, gradient)


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
            SequenceParallelCollator(lambda _: batch, 2, PAD)([])
        without = {name: batch[name] for name in ("input_ids", "labels")}
        with pytest.raises(DataError, match="must not be joined"):
            SequenceParallelCollator(lambda _: without, 2, PAD)([])
        batch["position_ids"] = torch.arange(6)[None]
        assert SequenceParallelCollator(lambda _: batch, 2, PAD)([])["position_ids"].shape == (1, 6)
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
            with exchanging_in_eval(model):
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


def test_labels_that_are_moved_without_their_scores_stop_the_run(tmp_path):
    """A host renames labels without sequence parallelism."""

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
