"""The HTML of a report, without a browser: escaped text, the content policy, and remarks."""

import io
import json
import re

import pytest
from rich.console import Console
from support.report_data import HOSTILE, PROVENANCE, response, scored_data

from star_dss_plugin import DataError
from star_dss_plugin.report.inspection import Inspection
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import ScoredData, read_scored
from star_dss_plugin.visible import visible


def page_data(html):
    """Return the data that a report embeds."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_escaped(text):
    hostile = response(pieces=(text, text), source=text, context=({"role": text, "content": text},))
    html = render_page(scored_data(hostile, guard=text), name=text)
    html.encode("utf-8")
    assert html.count("<script") == 2  # the data and the program
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x00" not in html
    found = page_data(html)["responses"][0]
    assert found["pieces"] == [visible(text)] * 2


def test_the_content_policy_allows_only_the_reports_script():
    html = render_page(scored_data(response()), name="x")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert not re.search(r"<[^>]* (style|on\w+)=", html)


def test_a_report_without_text_contains_no_text():
    html = render_page(
        scored_data(response(pieces=("secret one", "secret two"), source="src")),
        name="x",
        text=False,
    )
    assert "secret" not in html.split('id="data"')[1].split("</script>")[0]
    assert "question 0" not in html
    assert page_data(html)["responses"][0]["scores"] == [0.9, 0.2]
    assert "src" in html


def test_a_source_column_of_texts_is_left_out(scored_dataset, tokenizer, caplog):
    texts = ["a private text\nof two lines"] * len(scored_dataset)
    dataset = scored_dataset.remove_columns(
        [c for c in ("source",) if c in scored_dataset.column_names]
    )
    found = read_scored(dataset.add_column("source", texts), tokenizer)
    assert {r.source for r in found.responses} == {None}
    assert "private" not in render_page(found, name="x", text=False)
    assert "--source" in caplog.text


def test_a_report_names_the_tokenizer_without_its_path():
    page = render_page(ScoredData((response(),), PROVENANCE, "/home/me/model"), name="x")
    assert "/home/me" not in page
    assert "model" in page


# Remarks on the scores


def test_scores_of_a_demonstration_guard_are_marked(tmp_path):
    demo = scored_data(response(), demonstration_guard=True)
    html = render_page(demo, name="x")
    assert "(demonstration guard)</title>" in html
    assert "Demonstration scores." in html
    assert page_data(html)["demonstration"] is True
    assert "Demonstration scores." not in render_page(scored_data(response()), name="x")
    shown = Inspection(demo, 0)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(shown)
    assert "protects nobody" in console.export_text()
    assert "protects nobody" in shown._repr_html_()


def test_interpolated_scores_are_marked():
    adaptive = scored_data(
        response(), guard_identity={"trajectory": {"adaptive": {"epsilon": 0.02}}}
    )
    assert "safe stretches are interpolated" in render_page(adaptive, name="x")
    assert "interpolated" not in render_page(scored_data(response()), name="x")


def test_remarks_name_attempts_truncations_errors_and_disagreement():
    noted = scored_data(
        response(),
        attempts={"control token": {"responses": 3, "rows": [1, 4]}},
        truncated_contexts=2,
        guard_errors=1,
        disagreement={"mean": 0.25, "p95": 0.5, "opposite": 0.1},
    )
    page = render_page(noted, name="x")
    for remark in (
        "3 responses contain text that could be meant for the guard (control token), first in rows "
        "1, 4.",
        "2 conversations did not fit the guard, which read their ends.",
        "1 responses could not be scored and count as unsafe.",
        "0.250 apart on average; 10.0% of the prefixes are safe to one and unsafe to another.",
    ):
        assert remark in page
    assert "could be meant" not in render_page(scored_data(response()), name="x")


@pytest.mark.parametrize("identity", [{"guards": 3}, {"guards": [5, {"trajectory": {}}]}])
def test_guard_identities_of_another_form_can_be_shown(identity):
    assert "a-guard" in render_page(scored_data(response(), guard_identity=identity), name="x")


@pytest.mark.parametrize(
    "notes",
    [
        {"attempts": {"x": 3}},
        {"attempts": [1]},
        {"attempts": {"x": {"responses": "<b>", "rows": []}}},
        {"truncated_contexts": "<b>"},
        {"guard_errors": [1]},
        {"disagreement": {"mean": "x"}},
    ],
    ids=str,
)
def test_provenance_of_another_form_is_refused(notes):
    with pytest.raises(DataError, match="not what this package writes"):
        render_page(scored_data(response(), **notes), name="x")
