"""`star-dss check` finds problems that Axolotl does not report."""

import copy

import pytest

pytest.importorskip("axolotl", reason="needs Axolotl: make test-axolotl")

from axolotl.integrations.base import PluginManager
from axolotl_runs import PLUGIN, _light_runs, chat, configuration, write_config  # noqa: F401
from typer.testing import CliRunner

from star_dss_plugin.cli.app import app
from star_dss_plugin.cli.check import check_config

runner = CliRunner()


def run(folder, config, *flags):
    PluginManager.get_instance().plugins.clear()
    return runner.invoke(app, ["check", str(write_config(folder, config)), *flags])


def test_a_valid_configuration_passes(tmp_path, model_dir):
    result = run(tmp_path, configuration(tmp_path, model_dir))
    assert result.exit_code == 0, result.output
    assert "guard: test-words" in result.output
    assert "train data: 8 rows, 8 responses (0 without messages): " in result.output
    assert "no problem found" in result.output


def without(*keys):
    return lambda config: [config.pop(key) for key in keys]


def setting(**changes):
    return lambda config: config.update(changes)


def rename_block(config):
    config["star_ds"] = config.pop("star_dss")


def block(**changes):
    return lambda config: config["star_dss"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("plugins"), "The plugin is not listed, so Axolotl drops the star_dss block"),
        (setting(plugins=["star_dss_axolotl.StarDSPlugin"]), "The plugin is not listed (it lists"),
        (setting(plugins=["star_dss_axolot.StarDSSPlugin"]), f"Did you mean {PLUGIN}?"),
        (setting(plugins=[PLUGIN, "no_such.Plugin"]), "The plugin no_such.Plugin cannot be loaded"),
        (without("star_dss"), "There is no star_dss block: add one"),
        (setting(star_dss=None), "There is no star_dss block: add one"),
        (rename_block, "it has 'star_ds', which Axolotl drops. Call it star_dss"),
        (block(chunk_sise=5), "chunk_sise"),
        (block(kl_coef=-1), "kl_coef is -1"),
        (block(guard="qwen3guard"), "Did you mean 'qwen3guard-gen-"),
        (
            block(guard={"model": "/no/such/guard", "safe_labels": ["a"], "unsafe_labels": ["b"]}),
            "/no/such/guard",
        ),
        (block(guard=None), "No guard was given"),
        (setting(use_eaft=True), "STAR-DSS cannot be used with use_eaft"),
        (setting(micro_batch_size="many"), "Axolotl refuses it"),
        (setting(base_model="/no/such/model"), "Axolotl refuses it"),
    ],
)
def test_a_problem_is_named_and_the_check_fails(tmp_path, model_dir, change, message):
    config = copy.deepcopy(configuration(tmp_path, model_dir))
    change(config)
    result = run(tmp_path, config)
    assert result.exit_code == 1, result.output
    assert f"Problem: {message}" in result.output or message in result.output


def test_no_data_skips_the_data(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, datasets=[{"path": "absent", "type": "alpaca"}])
    assert run(tmp_path, config).exit_code == 1
    result = run(tmp_path, config, "--no-data")
    assert result.exit_code == 0, result.output


def test_every_problem_is_listed_at_once(tmp_path, model_dir):
    config = configuration(tmp_path, model_dir, plugins=None, use_eaft=True)
    config["star_dss"] = {"chunk_sise": 1}
    found = check_config(write_config(tmp_path, config), data=False)
    assert len(found.problems) == 3


def test_a_loss_that_reads_no_scores_needs_no_guard(tmp_path, model_dir):
    result = run(tmp_path, configuration(tmp_path, model_dir, star_dss={"loss_type": "kl_only"}))
    assert result.exit_code == 0, result.output
    assert "train data: 8 rows: nothing to score" in result.output
