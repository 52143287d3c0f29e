"""Messages about options and optional packages: one for each kind of mistake."""

import sys

import pytest

from star_dss_plugin.errors import ConfigError
from star_dss_plugin.validation import json_mapping, nearest, require, shortened, unknown_name


@pytest.mark.parametrize("load", [False, True])
def test_a_missing_package_is_named_with_its_extra(load, monkeypatch):
    for name in ("no_such_package", "blocked"):
        monkeypatch.setitem(sys.modules, "blocked", None)
        with pytest.raises(ConfigError) as stop:
            require(name, "report", "A figure", alternative="Or leave it out.", load=load)
        assert str(stop.value).startswith(f"A figure needs {name}, which ")
        assert str(stop.value).endswith(
            "Install it with: pip install 'star-dss-plugin[report]'. Or leave it out."
        )


def test_an_installed_package_is_imported_only_on_request(tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text("raise ImportError('no GPU')\n")
    monkeypatch.syspath_prepend(tmp_path)
    require("heavy", "vllm", "The engine")
    with pytest.raises(ConfigError, match=r"needs heavy, which cannot be imported \(no GPU\)"):
        require("heavy", "vllm", "The engine", load=True)


def test_near_names_are_suggested():
    assert nearest("chunk_sise", ["chunk_size", "guard"], limit=1) == ["chunk_size"]
    assert nearest("x", ["chunk_size"]) == []
    assert "Did you mean 'demo'?" in str(unknown_name("guard", "dmeo", ["demo", "qwen3guard"]))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "'a'"),
        ("x" * 70, "'" + "x" * 59 + "…"),
        ("a\nb\x1b[2J\u202e", r"'a\nb\x1b[2J\u202e'"),
    ],
)
def test_values_are_shown_short_and_on_one_line(value, shown):
    assert shortened(value) == shown


def test_mappings_may_be_json():
    assert json_mapping("guard", '{"a": 1}') == json_mapping("guard", {"a": 1}) == {"a": 1}
    for text in ("{", "[" * 5000):
        with pytest.raises(ConfigError, match="^guard is not valid JSON"):
            json_mapping("guard", text)
