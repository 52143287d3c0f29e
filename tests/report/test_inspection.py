"""One scored row, shown in a terminal and in a notebook."""

import io
import re

import pytest
from rich.console import Console
from support.report_data import HOSTILE, response, scored_data

from star_dss_plugin import DataError
from star_dss_plugin.report import inspect_row
from star_dss_plugin.report.inspection import Inspection


def test_a_row_is_shown_in_a_terminal_and_in_a_notebook(scored_dataset):
    shown = inspect_row(scored_dataset, 1)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert "user: how are you?" in text
    assert "response 2: lowest 0.100" in text
    assert "below 0.5 from token" in text
    html = shown._repr_html_()
    assert "how are you?" in html
    assert "text-decoration:underline" in html
    with pytest.raises(DataError, match="no row 3"):
        inspect_row(scored_dataset, 3)


def test_an_error_names_the_row_of_the_data_set(scored_dataset):
    short = scored_dataset.map(
        lambda r, i: {"star_scores": r["star_scores"][: -(i == 1) or None]}, with_indices=True
    )
    with pytest.raises(DataError, match="Row 1: "):
        inspect_row(short, 1)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(text):
    shown = Inspection(scored_data(response(pieces=(text, "[red]not markup[/red]"))), 0)
    html = shown._repr_html_()
    assert not re.search(r"<(?!/?(p|b|bdi|br|span|div)[ >])", html)
    console = Console(width=100, force_terminal=True, record=True, file=io.StringIO())
    console.print(shown)
    out = console.export_text(styles=True)
    assert "[red]not markup" in re.sub("\x1b\\[[0-9;]*m", "", out)
    assert not re.search("[\x00\x07\x9b\u202e\ud800]|\x1b(?!\\[[0-9;]*m)", out)


def test_a_line_break_in_a_guards_name_is_not_printed():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Inspection(scored_data(response(), guard="a\nanother line"), 0))
    assert console.export_text().startswith("Row 0, guard a␊another line\n")
