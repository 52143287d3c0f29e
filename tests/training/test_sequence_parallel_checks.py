"""Settings that sequence parallelism does not support, and DeepSpeed with other averaging."""

import sys
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from support.models import tiny_llama, tiny_qwen3_moe

from star_dss_plugin import ConfigError, StarDSSError
from star_dss_plugin.training.sequence_parallel_checks import (
    check_averaging,
    check_resuming,
    unsupported_with_sequence_parallel,
)


def trainer(*, size=2, zero=None, stage=3, config=None, handler=None, **changes):
    """Return what `unsupported_with_sequence_parallel` reads of a supported trainer."""
    model = changes.pop("model", None) or tiny_llama()
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
        "supports_sequence_parallel": True,
        "media_rows": lambda: None,
    }
    own |= {name: changes.pop(name) for name in list(own) if name in changes}
    args = SimpleNamespace(**changes)
    return SimpleNamespace(accelerator=accelerator, model=model, args=args, **own)


FIXED = {"sp_seq_length_is_variable": False}
REFUSED = [
    ({"supports_sequence_parallel": False}, "was not tried in"),
    ({"kind": DistributedType.MULTI_GPU}, "DeepSpeed, which cuts rows, is not on"),
    ({"stage": 2}, "makes gradients 2 times as large"),
    ({"zero": {"reduce_scatter": False}}, "makes gradients 2 times as large"),
    ({"zero": {"zero_quantized_gradients": True}}, "makes gradients 2 times as large"),
    ({"packing": True}, "would see each other"),
    ({"eval_packing": True}, "would see each other"),
    ({"padding_free": True}, "would see each other"),
    ({"config": {"sliding_window": 8}}, "a window of tokens"),
    ({"config": {"layer_types": ["sliding_attention", "full_attention"]}}, "a window of tokens"),
    ({"config": {"output_router_logits": True}}, "no load_balancing_loss_func to replace"),
    ({"media_rows": lambda: object()}, "can neither cut images"),
    ({"handler": FIXED | {"sp_seq_length": 33}}, "is 33, which cannot be cut into equal parts"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_cannot_go_with_parts_is_refused_in_words(changes, words):
    found = [
        why
        for condition, why, _ in unsupported_with_sequence_parallel(trainer(**changes))
        if condition
    ]
    assert len(found) == 1
    assert words in found[0]
    assert unsupported_with_sequence_parallel(trainer(size=1, **changes)) == []


def test_a_plain_run_in_parts_is_not_refused():
    changes = {"config": {"sliding_window": 8, "use_sliding_window": False}}
    for given in (
        trainer(),
        trainer(**changes),
        trainer(packing=False, eval_packing=None),
        trainer(handler=FIXED | {"sp_seq_length": 34}),
        trainer(model=tiny_qwen3_moe(), config={"output_router_logits": True}),
    ):
        assert not any(condition for condition, *_ in unsupported_with_sequence_parallel(given))


def test_a_run_in_parts_resumes_only_if_no_row_is_to_be_skipped():
    with pytest.raises(ConfigError, match="ignore_data_skip=True"):
        check_resuming(trainer(ignore_data_skip=False))
    check_resuming(trainer(ignore_data_skip=True))
    check_resuming(trainer(size=1, ignore_data_skip=False))


class Engine:
    """A DeepSpeed engine that multiplies gradients by a factor."""

    destroyed = False
    device = "cpu"

    def __init__(self, model, factor):
        self.model, self.factor = model, factor

    def __call__(self, given):
        return self.model(given)

    def backward(self, loss):
        (loss * self.factor).backward()

    def destroy(self):
        self.destroyed = True


@pytest.mark.parametrize("factor", [1, 2])
def test_gradients_that_are_not_averaged_over_all_processes_stop_the_run(monkeypatch, factor):
    made = []

    def initialize(*, model, config, mpu, **rest):
        assert config["zero_optimization"]["stage"] == 3
        assert config["zero_optimization"]["reduce_scatter"] is True
        assert mpu == "groups"
        made.append(Engine(model, factor))
        return made[0], None, None, None

    fake = SimpleNamespace(
        initialize=initialize,
        utils=SimpleNamespace(safe_get_full_grad=lambda weight: weight.grad),
        __version__="9.9",
    )
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    trained = SimpleNamespace(
        zero_optimization_stage=lambda: 3, zero_reduce_scatter=lambda: True, mpu="groups"
    )
    if factor == 1:
        check_averaging(trained)
    else:
        with pytest.raises(StarDSSError, match=r"DeepSpeed \(9.9\) makes gradients 2 times"):
            check_averaging(trained)
    assert made[0].destroyed
