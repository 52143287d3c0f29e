"""Published configurations of Axolotl's repository train with the `star_dss` block.

They differ from the published files in the model, the data and the settings that a CPU needs.
"""

import json

import pytest
from axolotl_runs import (
    ANSWERS,
    PLUGIN,
    PROMPTS,
    multi_turn,
    on_two_ranks,
    output_of,
    write_config,
    write_rows,
    zero_file,
)
from support.models import tiny_llama
from support.paths import SHARED
from support.vision_models import gemma3, picture

EXAMPLES = SHARED / "coverage" / "axolotl_sft_examples.jsonl"
CPU = {
    "attn_implementation": "sdpa",
    "optimizer": "adamw_torch",
    "bf16": False,
    "tf32": False,
    "gradient_checkpointing": False,
    "dataset_num_proc": 1,
    "sample_packing_sequentially": True,  # the other sampler starts processes
    "max_steps": 3,
    "save_strategy": "no",
    "sequence_len": 256,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
# Triton kernels, which need a GPU. Fused losses stay set, because STAR-DSS switches them off.
KERNELS = (
    "liger_rope",
    "liger_rms_norm",
    "liger_glu_activation",
    "liger_layer_norm",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "lora_embedding_kernel",
)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory, tokenizer):
    """Return the folder of a Llama of hidden size 64, which bitsandbytes can quantize to 4 bits."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(name):
    if not EXAMPLES.is_file():
        pytest.skip(f"the published configurations are not beside the project ({EXAMPLES})")
    for line in EXAMPLES.read_text().splitlines():
        example = json.loads(line)
        if example["example"] == name:
            return example["config"]
    raise AssertionError(f"{EXAMPLES} has no {name}")


def from_value(folder, dataset):
    """Write conversations with the published data's keys `from` and `value`; return their entry."""
    rows = [
        {
            "conversations": [
                {"from": message["role"], "value": message["content"]}
                for message in row["messages"]
            ]
        }
        for row in multi_turn()
    ]
    path = write_rows(folder / "chat.jsonl", rows)
    return {**dataset, "path": path, "ds_type": "json", "split": None}


def tokenized(folder, dataset, tokenizer):
    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS):
        before = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        after = tokenizer(answer + "<|im_end|>")["input_ids"]
        rows.append(
            {
                "input_ids": before + after,
                "attention_mask": [1] * len(before + after),
                "labels": [-100] * len(before) + after,
            }
        )
    return {**dataset, "path": write_rows(folder / "tokens.jsonl", rows), "ds_type": "json"}


def local_settings(folder, config, model):
    """Return the settings that a CPU, the tiny model and the test's folder need."""
    return {
        **CPU,
        **{key: False for key in KERNELS if key in config or "lora" in key},
        "base_model": str(model),
        "special_tokens": None,
        "val_set_size": 0.0,
        "evals_per_epoch": None,
        "saves_per_epoch": None,
        "hub_model_id": None,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "plugins": [*config.get("plugins", ()), PLUGIN],
        "star_dss": {"guard": "test-words", "chunk_size": 2},
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3/32b-qlora.yaml", "cut_cross_entropy switched off"),
        ("LiquidAI/lfm2-350m-fft.yaml", "cut_cross_entropy switched off"),
        ("orpheus/finetune.yml", "liger_fused_linear_cross_entropy switched off"),
    ],
)
def test_a_published_configuration_trains(start, tmp_path, llama_dir, tokenizer, name, said):
    """Packed: QLoRA and a full finetuning with cut cross-entropy, and a run with Liger."""
    config = published(name)
    assert config["sample_packing"]
    (dataset,) = config["datasets"]
    if dataset["type"] == "chat_template":
        data, responses = from_value(tmp_path, dataset), 16
    else:
        data, responses = tokenized(tmp_path, dataset, tokenizer), 8
    config |= local_settings(tmp_path, config, llama_dir) | {"datasets": [data]}
    out = output_of(start("train", write_config(tmp_path, config), "--launcher", "python"))
    assert out.count(said) == 1
    assert out.count("STAR-DSS is active: loss_type=star_dss") == 1
    assert "star_dss/kl" in out
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["data"]["train"]["responses"] == responses
    assert record["data"]["train"]["below_threshold"] > 0


def test_a_published_configuration_trains_on_images(start, tmp_path):
    """The configuration is Gemma 3's, with LoRA on the language model."""
    model, processor = gemma3()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "picture.png")
    rows = multi_turn()
    for row in rows:
        for message in row["messages"]:
            message["content"] = [{"type": "text", "text": message["content"]}]
        image = {"type": "image", "path": str(tmp_path / "picture.png")}
        row["messages"][1]["content"].insert(0, image)
    config = published("gemma3/gemma-3-4b-vision-qlora.yml")
    (dataset,) = config["datasets"]
    path = write_rows(tmp_path / "chat.jsonl", rows)
    config |= CPU | {key: False for key in KERNELS if key in config or "lora" in key}
    config |= {
        "base_model": str(tmp_path / "model"),
        "datasets": [{**dataset, "path": path, "ds_type": "json", "split": None}],
        "val_set_size": 0.0,
        "adapter": "lora",
        "load_in_4bit": False,  # the rows of a tiny model's weights are too short for it
        "output_dir": str(tmp_path / "out"),
        "evals_per_epoch": None,
        "saves_per_epoch": None,
        "plugins": [PLUGIN],
        "star_dss": {"guard": "test-words", "chunk_size": 2},
    }
    out = output_of(start("train", write_config(tmp_path, config), "--launcher", "python"))
    assert out.count("STAR-DSS is active: loss_type=star_dss") == 1
    assert "the guard reads the mark [image]" in out
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["data"]["train"]["responses"] == 16
    assert record["reference"] == "the base model (adapter switched off)"


def alpaca(folder, dataset):
    rows = [{"instruction": p, "input": "", "output": a} for p, a in zip(PROMPTS, ANSWERS)]
    return {**dataset, "path": write_rows(folder / "alpaca.jsonl", rows), "ds_type": "json"}


# These also differ in the class of the tiny model's layers and in settings that need a GPU. Of two
# settings that checkpoint activations, which transformers refuses, only FSDP's is kept.
SHARDED = {
    "gpt-oss/gpt-oss-20b-fft-fsdp2.yaml": "fsdp2",
    "llama-3/fft-8b-liger-fsdp.yaml": "fsdp1",
    "gpt-oss/gpt-oss-20b-fft-deepspeed-zero3.yaml": "zero3",
    "mistral/mixtral/mixtral.yml": "zero2",
    "qwen3/qlora-fsdp.yaml": "fsdp1",
    "qwen3.5/27b-qlora-fsdp.yaml": "fsdp2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_published_configuration_trains_on_two_ranks(tmp_path, llama_dir, site, name):
    """All are packed: cut cross-entropy (FSDP2, ZeRO-3), Liger (FSDP1), QLoRA (all but ZeRO-3)."""
    config, kind = published(name), SHARDED[name]
    assert config["sample_packing"]
    (dataset,) = config["datasets"]
    fill = alpaca if dataset["type"] == "alpaca" else from_value
    mapping = {"message_property_mappings": {"role": "from", "content": "value"}}
    if dataset["type"] == "chat_template" and "field_messages" not in dataset:
        dataset |= {"field_messages": "conversations", **mapping}
    config |= local_settings(tmp_path, config, llama_dir) | {
        "datasets": [fill(tmp_path, dataset)],
        "chat_template": None,
        "eot_tokens": None,
        "model_config": None,
        "tokenizer_type": None,
        "model_quantization_config": None,
        "model_quantization_config_kwargs": None,
        "activation_offloading": False,
        "gradient_checkpointing": config["gradient_checkpointing"],
    }
    if config.get("fsdp_config", {}).get("activation_checkpointing"):
        config |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
    if kind.startswith("zero"):
        config["deepspeed"] = zero_file(tmp_path, kind)
    else:
        changed = {
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "offload_params": False,  # pinned memory
            "cpu_ram_efficient_loading": False,
            "sync_module_states": False,
        }
        for key in list(config["fsdp_config"]):
            if (value := changed.get(key.removeprefix("fsdp_"))) is not None:
                config["fsdp_config"][key] = value
    if config.get("load_in_4bit") and kind == "fsdp1":
        # FSDP1 flattens weights of one type: Axolotl's is bfloat16, this model's float32.
        config["bnb_config_kwargs"] = {"bnb_4bit_quant_storage": "float32"}
    path = write_config(tmp_path, {key: v for key, v in config.items() if v is not None})
    (found, second), done = on_two_ranks(tmp_path, site, kind, [path])
    (found, second) = (one["config"] for one in (found, second))
    assert "error" not in found, (found, done.stderr[-3000:])
    assert found["logs"] == second["logs"]
    assert len(found["logs"]) == 3
    assert max(found["kl"]) > 1e-9
    assert found["sharded"] < 0.6
    if config["plugins"] != [PLUGIN]:
        assert "cross_entropy switched off" in done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "star_dss.json").read_text())
    assert record["data"]["train"]["responses"] == (8 if fill is alpaca else 16)
    assert record["data"]["train"]["below_threshold"] > 0
