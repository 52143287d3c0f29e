"""The chunked head: values and gradients of full logits, without ever holding full logits."""

import pytest
import torch
from datasets import Dataset
from support.models import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DataCollatorForSeq2Seq,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    Trainer,
    TrainingArguments,
)

from star_dss_plugin import attach, logprobs
from star_dss_plugin.logprobs import full_kl, token_logprobs
from star_dss_plugin.training.head import States, apply_at_head, apply_to_logits, can_project

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():  # large enough that a cap of the logits matters
        model.get_output_embeddings().weight *= 20
    return model.eval()


MODELS = {
    "llama": lambda: tiny_llama(VOCAB).double(),
    "cap": lambda: make(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0)),
    "factor": lambda: make(CohereConfig(**SMALL, logit_scale=0.25)),
    "divisor": lambda: make(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "tied": lambda: make(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.fixture(params=[1, 3, 512])
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(logprobs, "_ROWS_PER_CHUNK", request.param)


def example(labels=None):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    if labels is None:
        labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.6, -100)
    return ids, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["some", "none"])
@pytest.mark.usefixtures("rows_per_chunk")
def test_it_equals_the_whole_logits(name, what):
    model, reference = MODELS[name](), MODELS[name]().requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.1
    assert can_project(model)
    ids, labels = example()
    if what == "none":
        labels = torch.full_like(labels, -100)
    trained = labels[:, 1:] != -100
    factors = torch.linspace(-1, 2, trained.numel(), dtype=torch.float64).view(trained.shape)

    logits, ref_logits = model(ids).logits, reference(ids).logits
    whole = token_logprobs(logits, labels), full_kl(logits, ref_logits, trained)
    wanted = gradients(model, (factors * whole[0] + factors.exp() * whole[1]).sum())

    batch = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        ref = apply_to_logits(reference, batch, States, project=True)

    def terms(rows, project):
        kl = full_kl(rows, ref.rows, trained, project, ref.project)
        return token_logprobs(rows, labels, project), kl

    with apply_at_head(model, terms) as found:
        model(ids, logits_to_keep=1)
    parts = found[0]
    for part, of in zip(parts, whole, strict=True):
        assert part.dtype == torch.float64
        torch.testing.assert_close(part, of, rtol=1e-10, atol=1e-12)
    given = gradients(model, (factors * parts[0] + factors.exp() * parts[1]).sum())
    for key, gradient in wanted.items():
        torch.testing.assert_close(given[key], gradient, rtol=1e-9, atol=1e-12)


def test_heads_that_are_not_one_known_product_are_refused():
    assert not can_project(make(HyperCLOVAXConfig(**SMALL, logits_scaling=4.0)))
    peft = pytest.importorskip("peft")
    for options in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
        assert not can_project(peft.get_peft_model(tiny_llama(VOCAB), config))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert can_project(peft.get_peft_model(tiny_llama(VOCAB), config))
    assert not can_project(tiny_llama(VOCAB).model)
    assert not can_project(torch.nn.Linear(2, 2))


class Largest(TorchDispatchMode):
    """Record the largest number of positions of any tensor over the vocabulary."""

    positions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            # The head's weight has `hidden` columns, so it is not counted.
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] > 300:
                self.positions = max(self.positions, tensor.numel() // tensor.shape[-1])
        return made


@pytest.mark.parametrize(
    ("estimator", "reference"), [("k2", "copy"), ("k2", "precomputed"), ("full", "copy")]
)
def test_no_step_holds_the_logits_of_all_positions(
    tmp_path, tokenizer, monkeypatch, estimator, reference
):
    monkeypatch.setattr(logprobs, "_ROWS_PER_CHUNK", 4)
    ids = [list(range(5, 45)), list(range(50, 90))]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "star_scores": [[0.5] * 40] * 2})
    trainer = Trainer(
        tiny_llama(len(tokenizer)),
        args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    assert len(tokenizer) > 300
    attach(trainer, reference=reference, kl_estimator=estimator)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    with Largest() as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen.positions <= 32  # the transposed head; logits come four at a time
    with Largest() as seen:
        trainer.base_loss(trainer.model, batch)
    assert seen.positions >= 78
