"""The place of an error (file, row, field), and errors that keep their class and attributes."""

import pickle

import pytest

from star_dss_plugin.data.reading import with_file_name
from star_dss_plugin.data.rows import with_row_number
from star_dss_plugin.errors import ConfigError, DataError, GuardError, StarDSSError, Where
from star_dss_plugin.guards.base import Guard, PrefixRequest, Trajectory, ask


class TwoArguments(DataError):
    """An error of a plugin, with a constructor of its own."""

    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("place", "beginning"),
    [
        ({}, ""),
        ({"rows": (0,)}, "Row 0: "),
        ({"rows": (3,), "line": 7}, "Row 3 (line 7): "),
        ({"rows": range(3, 9)}, "Rows 3 to 8: "),
        ({"rows": range(3, 4)}, "Row 3: "),
        ({"rows": tuple(range(9))}, "Row 0, 1, 2, 3, 4, …: "),
        ({"file": "a.jsonl", "rows": (3,), "field": "text"}, "a.jsonl: Row 3: field 'text': "),
        ({"file": "a.jsonl"}, "a.jsonl: "),
    ],
)
def test_a_message_begins_with_the_place(place, beginning):
    assert str(DataError("no").at(**place)) == beginning + "no"


def test_the_first_place_of_an_error_is_kept():
    error = DataError("no").at(rows=(1,)).at(rows=(5,), file="a").at(file="b")
    assert error.where == Where(file="a", rows=(1,))


def test_an_error_with_another_constructor_keeps_its_class():
    error = TwoArguments(7, "why")
    with (
        pytest.raises(TwoArguments, match=r"^f\.jsonl: Row 4: 7: why$") as stop,
        with_file_name("f.jsonl"),
    ):
        with_row_number(4, fail, error)
    assert stop.value is error
    assert stop.value.code == 7
    assert stop.value.where == Where(file="f.jsonl", rows=(4,))


def test_errors_without_a_row_do_not_name_the_file():
    with pytest.raises(ConfigError, match="^an option$"), with_file_name("f.jsonl"):
        fail(ConfigError("an option"))


def test_place_and_request_can_be_pickled():
    error = GuardError("no", request=2).at(rows=(3,))
    again = pickle.loads(pickle.dumps(error))  # pickled here
    assert (str(again), again.request, again.where) == ("Row 3: no", 2, Where(rows=(3,)))


class LongestFirst(Guard):
    """Refuse the text "no"; score batches of two, the longest texts first."""

    name = "longest-first"
    identity = {"name": name}

    def plan(self, requests):
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].text))
        return [order[i : i + 2] for i in range(0, len(order), 2)]

    def trajectories(self, requests):
        for i, request in enumerate(requests):
            if request.text == "no":
                raise GuardError("not this one", request=i)
        return [Trajectory((1.0,)) for _ in requests]


def test_the_request_of_an_error_counts_in_the_whole_list():
    texts = ["a", "four", "no", "three"]
    with pytest.raises(GuardError) as stop:
        ask(LongestFirst(), [PrefixRequest((), text, (1,)) for text in texts])
    assert stop.value.request == 2


def test_a_new_error_has_an_empty_place():
    assert StarDSSError("x").where == Where()
