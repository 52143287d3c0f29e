"""Prompts of an evaluation: the forms of rows, and prompts with a prefilled answer."""

import pytest
from datasets import Dataset
from support.comparisons import HARMFUL, prompts

from star_dss_plugin import DataError
from star_dss_plugin.evaluate.prompts import DEFAULT_PREFILL, read_prompts, with_prefill


def test_prompts_are_read_from_every_form_of_row():
    rows = [
        {"prompt": "one", "messages": None, "system": None, "prefill": "Well,"},
        {
            "prompt": None,
            "messages": [{"role": "user", "content": "two"}],
            "system": "Be kind.",
            "prefill": None,
        },
        {
            "prompt": None,
            "messages": [
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "left out"},
            ],
            "system": None,
            "prefill": None,
        },
    ]
    found = read_prompts(Dataset.from_list(rows), "harmful")
    assert [[m["content"] for m in p.messages] for p in found] == [
        ["one"],
        ["Be kind.", "two"],
        ["three"],
    ]
    assert [p.opening for p in found] == ["Well,", DEFAULT_PREFILL, DEFAULT_PREFILL]
    conversation = Dataset.from_list([{"prompt": [{"role": "user", "content": "four"}]}])
    assert read_prompts(conversation, "benign")[0].messages[0]["content"] == "four"


@pytest.mark.parametrize("rows", [[{"question": "?"}], [{"prompt": "  "}], [{"prompt": ""}]])
def test_a_row_without_a_prompt_is_refused(rows):
    with pytest.raises(DataError, match="The harmful prompts: Row 0: the row has the columns"):
        read_prompts(Dataset.from_list(rows), "harmful")


def test_data_without_rows_is_refused():
    with pytest.raises(DataError, match="no rows"):
        read_prompts(Dataset.from_list([]), "benign")


def test_only_harmful_prompts_are_prefilled():
    found = with_prefill(prompts(), 3)
    assert len(found) == len(HARMFUL)
    assert {p.prefill_tokens for p in found} == {3}
