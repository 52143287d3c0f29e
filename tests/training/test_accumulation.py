"""The loss of an optimizer step does not depend on the number of micro-batches."""

import pytest

pytest.importorskip("trl")

from star_dss_trl import StarDSSTrainer
from support.run_differences import history
from support.trl_runs import prompt_completion, tiny_trainer


def uncounted(self, *args, **kwargs):
    """Do not count the trained tokens of an optimizer step, as a subclass may."""
    return super(StarDSSTrainer, self).get_batch_samples(*args, **kwargs)[0], None


@pytest.mark.parametrize("counted", [True, False])
def test_equal_micro_batches_are_averaged(tmp_path, tokenizer, counted, monkeypatch):
    if not counted:
        monkeypatch.setattr(StarDSSTrainer, "get_batch_samples", uncounted, raising=False)
    data = prompt_completion().select([1] * 8)

    def run(steps):
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
        trainer = tiny_trainer(tmp_path, tokenizer, data=data, max_steps=1, **options)
        trainer.train()
        return history(trainer)[0]

    assert run(4) == pytest.approx(run(1), rel=1e-4)
