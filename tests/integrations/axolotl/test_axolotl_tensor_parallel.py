"""Axolotl trains a model whose layers are split over gloo ranks (`tensor_parallel_size: 2`)."""

import pytest
from axolotl_runs import (
    VERSION,
    _light_runs,  # noqa: F401
    configuration,
    on_two_ranks,
    train_in_one_process,
    write_config,
)
from support.models import tiny_llama
from support.run_differences import largest_difference, largest_weight_difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        VERSION < (0, 21),
        reason="Axolotl 0.19 does not train with tensor parallelism, with or without STAR-DSS",
    ),
]

NAMED = {"kl_estimator": "full", "reference": "MODEL"}
CASES = {
    "full": {},
    "packed": {"sample_packing": True, "sequence_len": 64, "sample_packing_sequentially": True},
    "named": {"star_dss": NAMED},
    "evaluated": {"val_set_size": 0.5, "eval_steps": 2, "gradient_checkpointing": True},
    "stream": {
        "streaming": True,
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in order
        "star_dss": {**NAMED, "stream_buffer": 3},
    },
}
REFUSED = {"copy": {"star_dss": {"kl_estimator": "full", "reference": "copy"}}}


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    """Return the folder of a model with a head of its own, which two ranks can split evenly."""
    folder = tmp_path_factory.mktemp("untied")
    tiny_llama(400, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def case(folder, untied, changes, groups):
    """Return a configuration with four rows in each step, which `groups` groups of ranks share."""
    block = {"guard": "test-words", "chunk_size": 2, "kl_coef": 2.0, **changes.get("star_dss", {})}
    if block.get("reference") == "MODEL":
        block["reference"] = str(untied)
    return configuration(
        folder,
        untied,
        **{
            "attn_implementation": "sdpa",
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 4 // groups,
            "eval_batch_size": 4 // groups,
            "max_steps": 4,
            "learning_rate": 2e-3,
            **changes,
            "star_dss": block,
        },
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_layers_take_the_steps_of_one_process(tmp_path, untied, site, ranks):
    configs = []
    for name, changes in {**CASES, **REFUSED}.items():
        config = case(tmp_path / name, untied, changes, ranks // 2)
        config |= {"tensor_parallel_size": 2, "output_dir": str(tmp_path / name)}
        configs.append(write_config(tmp_path / name, config).rename(tmp_path / f"{name}.yaml"))
    found, done = on_two_ranks(tmp_path, site, "tp", configs, ranks=ranks)
    for name, changes in CASES.items():
        assert "error" not in found[0][name], (name, found[0][name], done.stderr[-3000:])
        assert all(other[name]["logs"] == found[0][name]["logs"] for other in found), name
        assert max(found[0][name]["kl"]) > 1e-5, name  # the reference was used
        assert found[0][name]["sharded"] < 0.7, name  # norms and embeddings are whole
        changes = {key: value for key, value in changes.items() if key != "streaming"}
        alone = tmp_path / f"{name}-alone"
        logs, evaluations = train_in_one_process(alone, case(alone, untied, changes, 1))
        steps = largest_difference(found[0][name]["logs"], logs)
        evaluated = largest_difference(
            [[0.0, *found[0][name]["evaluations"]]], [[0.0, *evaluations]]
        )
        saved = largest_weight_difference(tmp_path / name, alone / "final", lora=False)
        print(f"{ranks} {name}: {steps:.1e}, {evaluated:.1e}, {saved:.1e}")
        assert max(steps, evaluated) < 5e-5, name  # sums over parts of a layer round otherwise
        assert saved < 1e-3, name
    assert all("reference is 'copy'" in other["copy"]["error"] for other in found)
