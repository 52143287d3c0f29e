"""Rows of JSON files: their line numbers, and values that stay as they were written."""

import json

import pytest

from star_dss_plugin.data.files.json_lines import json_rows
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.errors import DataError

pytestmark = pytest.mark.usefixtures("own_copies")


def read(tmp_path, data):
    """Return the rows of a file with this data."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return list(read_dataset(str(path)))


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b'{"a": 1}\n\n{"a": 2}\n', [1, 3]),
        (b'{"a": 1}{"a": 2}\n{"a": 3}', [1, 1, 2]),
        (b'[\n{"a": 1},\n\n{"a":\n2}, {"a": 3}]', [2, 4, 5]),
        (b'{\n"a": 1\n}\n{\n"a": 2\n}', [1, 4]),
        (b'\xef\xbb\xbf\n{"a": 1}', [2]),
    ],
)
def test_each_row_has_its_line_number(tmp_path, data, lines):
    path = tmp_path / "rows"
    path.write_bytes(data)
    rows = list(json_rows(path))
    assert [row.line for row in rows] == lines
    assert [row.number for row in rows] == list(range(len(lines)))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'[{"a": 1},\n{"a": "\\ud800"}]', "Row 1 (line 2): field 'a': half"),
        (b'{"a": 1}\n{"b": {"c": 1, "c": 2}}', "Row 1 (line 2): field 'c': it is there twice"),
        (b'[{"a": 1}\n{"a": 2}]', "Row 0 (line 1): it is not JSON: the list goes on with"),
        (b'[{"a": 1},\n]', "Row 1 (line 2): it is not JSON"),
        (b'{"a": 1}\n' + b'{"a":' * 3000, "Row 1 (line 2): it is not JSON"),
        (b'{"a": ' + b"[" * 250 + b"]" * 250 + b"}", "Row 0 (line 1): its values are nested"),
        (b'{"a": 1, \n"b": \xff}', "Row 0 (line 2): it is not UTF-8: invalid start byte at its"),
    ],
)
def test_errors_name_the_row_and_the_line(tmp_path, data, place):
    with pytest.raises(DataError) as stop:
        read(tmp_path, data)
    assert str(stop.value).startswith(f"{tmp_path / 'rows.jsonl'}: {place}")


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "2020-01-01"}],
        [{"text": "a"}, {"text": 5}, {"text": "5"}, {"text": "null"}, {"text": None}],
        [{"tools": [{"default": 1}]}, {"tools": [{"default": "1"}]}, {"tools": []}],
        [{"text": True}, {"text": 1}],
        [{"m": [{"role": "user"}, {"role": "user", "name": "a"}]}],
        [{"c": "x"}, {"c": [{"type": "text", "text": "x"}]}],
        [{"m": {"x": 1}}, {"m": {"y": 1}}, {"m": {}}],
        [{"t": None}, {"t": None}],
        [{"t": [None]}, {"t": [[1], None]}, {"t": []}],
        [{"t": "a\0b\u2028\U0001f600"}],
        [{"t": -(2**63)}, {"t": 2**63 - 1}],
        [{"": "a", " ": "b"}],
    ],
)
def test_values_stay_as_they_were_written(tmp_path, rows):
    found = read(tmp_path, rows)
    assert found == rows
    assert [repr(row) for row in found] == [repr(row) for row in rows]  # 1 == True


def test_rows_may_lack_fields_and_numbers_become_floats(tmp_path):
    assert read(tmp_path, [{"b": 1}, {"a": 1.5, "b": 0.5}, {"b": 2**70}]) == [
        {"b": 1.0, "a": None},
        {"b": 0.5, "a": 1.5},
        {"b": float(2**70), "a": None},
    ]


def test_a_field_that_is_new_in_the_last_row_is_kept(tmp_path):
    rows = [{"t": "x"}] * 3000 + [{"t": "x", "late": ["y"]}]
    assert read(tmp_path, rows)[-1] == {"t": "x", "late": ["y"]}


def test_too_many_different_fields_are_refused(tmp_path):
    """Every row would get every field: the number of values would be quadratic."""
    with pytest.raises(DataError, match=r"Row 1000 .line 1.: there are more than 1000 different"):
        read(tmp_path, [{f"field {i}": 1} for i in range(2000)])


def test_rows_without_fields_are_refused(tmp_path):
    with pytest.raises(DataError, match="rows have no fields"):
        read(tmp_path, b"{}\n{}\n")


def test_the_fingerprint_depends_only_on_the_contents(tmp_path):
    one, other = tmp_path / "a.jsonl", tmp_path / "b[1]*.jsonl"
    for path in (one, other):
        path.write_text('{"text": "a"}\n')
    assert read_dataset(str(one))._fingerprint == read_dataset(str(other))._fingerprint
    one.write_text('{"text": "b"}\n')
    assert read_dataset(str(one))["text"][0] == "b"
