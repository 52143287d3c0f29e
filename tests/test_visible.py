"""Untrusted text is shown as text and on one line: in errors, cards, logs and summaries."""

import json
import logging
import re

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from star_dss_plugin.data.files.parquet_shards import write_card
from star_dss_plugin.data.provenance import write_note
from star_dss_plugin.errors import DataError, StarDSSError
from star_dss_plugin.guards.base import display_name
from star_dss_plugin.training.run_record import add_section
from star_dss_plugin.visible import as_code, visible, visible_line

HOSTILE = (
    "x` |\n\n# [click](http://evil)\r\n<img src=x onerror=alert(1)> \\| ~~~ ``` $x$ &lt; "
    "\x1b[31mowned\x1b]0;t\x07 \u202e\u2028\u0085\t\ud800 [/red][link=http://evil]z[/link]"
)
CONTROLS = set("\x1b\x07\r\u202e\u2028\u0085\ud800")


@given(st.text(st.characters(codec=None), max_size=30))
def test_visible_text_has_no_control_characters_and_keeps_ordinary_text(text):
    shown = visible(text)
    shown.encode("utf-8")
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown
    )
    assert visible("Grüße, 漢字, שלום\n\t🐶") == "Grüße, 漢字, שלום\n\t🐶"
    assert visible("a\x00\u202eb\x7f\ud800\U000e0041") == "a␀⟨U+202E⟩b␡⟨U+D800⟩⟨U+E0041⟩"


def test_visible_line_is_one_line():
    shown = visible_line(HOSTILE)
    assert not set(shown) & (CONTROLS | set("\n\t"))
    assert len(shown.splitlines()) == 1
    shown.encode("utf-8")
    assert "owned" in shown


@pytest.mark.parametrize("most", [1, 5, 199])
def test_visible_line_is_cut_to_its_limit(most):
    assert len(visible_line("\n" * 500, most)) == most + 1
    assert visible_line("a" * most, most) == "a" * most
    assert visible_line("\u202e" * 10**6, 10).endswith("…")


@pytest.mark.parametrize("text", [HOSTILE, "", " ", "`", "``a``", "|", "\\", "a\\", "a\\|b"])
def test_any_text_becomes_one_code_span(text):
    shown = as_code(text)
    assert re.fullmatch(r"`[^`]+`", shown)
    assert not re.search(r"(?<!\\)\|", shown)  # would begin the next cell of a table
    assert not set(shown) & (CONTROLS | set("\n"))


def test_names_of_guards_are_shown_on_one_line():
    for demonstration in (True, False):
        assert not set(display_name(HOSTILE, demonstration)) & (CONTROLS | set("\n"))


def test_messages_of_errors_have_no_control_characters():
    error = DataError(f"says {HOSTILE}").at(file=f"/tmp/{HOSTILE}", field=HOSTILE, rows=(1,))
    assert not set(str(error)) & CONTROLS
    assert "\n" not in str(StarDSSError("no").at(file=HOSTILE))


def test_model_cards_and_data_cards_show_names_as_text(tmp_path):
    provenance = {"guard": HOSTILE, "rows": 1}
    write_card(tmp_path, provenance)
    body = (tmp_path / "README.md").read_text().split("---\n", 2)[2]
    check_markdown(body)
    record = {
        "options": {
            "loss_type": "star_dss",
            "kl_coef": 1,
            "kl_estimator": "k2",
            "chunk_size": 5,
            "segmenter": "tokens",
            "threshold": 0.5,
        },
        "reference": HOSTILE,
        "data": {
            "train": {
                "guard": HOSTILE,
                "responses": 1,
                "trained_tokens": 1,
                "below_threshold": 0,
                "mean_score": 1.0,
            }
        },
    }
    (tmp_path / "star_dss.json").write_text(json.dumps(record))
    (tmp_path / "README.md").write_text("# Card\n")
    add_section(tmp_path)
    check_markdown((tmp_path / "README.md").read_text())


def check_markdown(text):
    """Check that hostile names stand only inside code spans."""
    outside = re.sub(r"`[^`]*`", "", text)
    assert "evil" not in outside
    assert "<img" not in outside
    assert "owned" not in outside
    assert not set(text) & CONTROLS
    assert "# [click]" not in [line.strip() for line in text.splitlines()]


def test_a_guards_name_from_the_data_is_one_line_in_the_summary(tmp_path, caplog):
    from star_dss_plugin.options import StarDSSOptions
    from star_dss_plugin.training.rows.summary import dataset_summary

    note = {
        "guard": HOSTILE.replace("\ud800", ""),
        "demonstration_guard": False,
        "guard_identity": {},
        "segmenter": "tokens",
        "chunk_size": 5,
        "responses": 1,
        "raw_contexts": 0,
    }
    rows = Dataset.from_list([{"input_ids": [1], "labels": [1], "star_scores": [0.5]}])
    write_note(rows, "scores", note)
    caplog.set_level(logging.DEBUG)
    found = dataset_summary(rows, StarDSSOptions(), None)
    assert not set(found.guard) & (CONTROLS | set("\n"))
