"""Facts that a guard states when it is registered, for presets and plugins alike."""

import re

import pytest
from datasets import Dataset
from support.guards import WordGuard
from typer.testing import CliRunner

from star_dss_plugin import ConfigError, PluginError, StarDSSOptions, load_guard
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.guards.spec import missing_guard
from star_dss_plugin.hookspecs import GuardInfo, hookimpl
from star_dss_plugin.plugins import Origin, Plugins, load_plugins
from star_dss_plugin.training.preflight import estimate


class EngineGuard(WordGuard):
    def __init__(self, *, engine="local", engine_options=None, **options):
        super().__init__(**options)
        self.engine = engine


def plugin(info, target=WordGuard):
    class Plugin:
        @hookimpl
        def star_dss_register_guards(self, register):
            register("stated", target, summary="a stated guard", info=info)

    return Plugin()


@pytest.fixture
def register(monkeypatch):
    """Return a function that registers a guard "stated" for this test only."""

    def register(info, target=WordGuard):
        load_plugins().register(plugin(info, target), Origin("stated", "my-package", "1.0"))

    yield register
    load_plugins.cache_clear()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reads": "twice"}, "reads is 'twice'"),
        ({"per_prefix": 5}, "per_prefix is 5 and reads is None"),
        ({"per_prefix": 5, "reads": "once"}, "with reads='shared' only"),
        ({"per_prefix": -1, "reads": "shared"}, "at least 0"),
        ({"billions": 0}, "billions is 0"),
        ({"f1": 101}, "f1 is 101"),
        ({"f1": float("nan")}, "f1 is nan"),
    ],
)
def test_invalid_facts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GuardInfo(**wrong)


def test_info_of_another_type_is_refused():
    with pytest.raises(PluginError, match=r"my-package .*with info='MIT'. Give a GuardInfo"):
        Plugins().register(plugin("MIT"), Origin("mine", "my-package", "1.0"))


@pytest.mark.parametrize(
    ("info", "cost", "terms"),
    [
        (GuardInfo(), "not stated", ""),
        (GuardInfo("MIT", reads="shared"), "not known", "MIT, ungated"),
        (GuardInfo("MIT", gated=True, reads="shared", per_prefix=7), "≈ 7 tokens", "MIT, gated"),
        (GuardInfo(reads="once"), "none (one pass)", ""),
        (GuardInfo(reads="again"), "all again", ""),
    ],
)
def test_cost_and_terms_are_put_into_words(info, cost, terms):
    assert (info.cost, info.terms) == (cost, terms)


def test_a_plugins_guard_is_listed_like_a_preset(register):
    register(GuardInfo("MIT", True, 1.5, 77.5, reads="shared", per_prefix=33))
    shown = CliRunner().invoke(cli.app, ["guards"], env={"COLUMNS": "200"}).output
    (row,) = [line for line in shown.splitlines() if line.startswith("stated ")]
    cells = re.split("  +", row.strip())
    assert cells == ["stated", "MIT", "gated", "1.5 B", "≈ 33 tokens", "77.5"]
    assert "stated: a stated guard\n" in shown
    assert "  stated: a stated guard, MIT, gated\n" in str(missing_guard())


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (GuardInfo(reads="shared", per_prefix=100), "about 400 of the guard's own words"),
        (GuardInfo(reads="once"), "one pass over each"),
        (GuardInfo(reads="again"), "4 guard calls, each from the beginning; "),
        (GuardInfo(), "where prefixes are shared"),
    ],
)
def test_a_plugins_guard_is_estimated_like_a_preset(register, tokenizer, info, said):
    register(info)
    ids = tokenizer("is this bad? no! it is a word")["input_ids"]
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [[-100] * (len(ids) - 8) + ids[-8:]]})
    for guard in ("stated", {"preset": "stated"}, '{"preset": "stated"}'):
        options = StarDSSOptions(guard=guard, chunk_size=2)
        assert said in estimate(rows, ChatTokenizer(tokenizer), options)


def test_a_plugins_guard_takes_an_engine_if_it_says_so(register):
    register(GuardInfo(takes_engine=True), EngineGuard)
    assert load_guard("stated", engine="http://h").engine == "http://h"


def test_a_plugins_guard_takes_no_engine_otherwise(register):
    register(GuardInfo(), EngineGuard)
    with pytest.raises(ConfigError, match="'stated' computes by itself and takes no engine"):
        load_guard("stated", engine="http://h")
    assert load_guard("stated").engine == "local"
