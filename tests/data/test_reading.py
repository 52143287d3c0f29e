"""Reading files of rows: all layouts of JSON, and errors that name file, row and line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from support.commands import run_command

from star_dss_plugin import DataError, score_dataset
from star_dss_plugin.data.reading import read_dataset, read_streams

TEXT = b'{"text": "hi"}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "rows.jsonl: it is empty"),
        (b"\n \n", "rows.jsonl: it is empty"),
        (b"null", "Row 0 .line 1.: it begins with 'null'"),  # pyarrow would crash
        (b"\xef\xbb\xbfnull", "Row 0 .line 1.: it begins with 'null'"),
        (
            TEXT + b"\nnull\n",
            "Row 1 .line 3.: it begins with 'null'",
        ),  # would be a row without values
        (TEXT * 3 + b'{"text": "h\xffi"}', "Row 3 .line 4.: it is not UTF-8: .* at its byte 11"),
        ('{"text": "hi"}'.encode("utf-16"), "Row 0 .line 1.: it is not UTF-8"),
        (b"[null]", "Row 0 .line 1.: it begins with 'null]'"),
        (b'[{"text": "hi"}, 5]', "Row 1 .line 1.: it begins with '5]'"),
        (b"[]", "list is empty"),
        (b"[" * 5000, "Row 0 .line 1.: it is not JSON"),
        (TEXT + b'{"text": "h', "Row 1 .line 2.: it is not JSON"),
        (TEXT + b'{"text": "h\x00i"}', "Row 1 .line 2.: it is not JSON"),
        (TEXT + b'{"a": 1, "a": 2}', "Row 1 .line 2.: field 'a': it is there twice"),
        (
            TEXT + b'{"text": "\\ud800"}',
            "Row 1 .line 2.: field 'text': half a character",
        ),
        (
            b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}',
            "Row 0 .line 1.: field 'messages...content': half a character",
        ),
    ],
)
def test_errors_in_json_files_name_the_row_and_the_line(tmp_path, data, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as stop:
        read_dataset(str(path))
    assert str(path) in str(stop.value)


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("rows.jsonl", TEXT * 2, 2),
        ("rows.jsonl", b"\xef\xbb\xbf" + TEXT + b"\r\n" + TEXT, 2),
        ("rows.json", b'[\n{"text": "hi"},\n{"text": "ho"}\n]', 2),
        ("rows.json", b'[{"text": "hi"}]', 1),
        ("rows.json", b'{\n"text": "hi"\n}', 1),
        ("rows.json", b'{\n"text": "hi"\n}\n{\n"text": "ho"\n}\n', 2),  # as jq writes it
        ("rows.jsonl", TEXT.strip() * 2 + b"\n" + TEXT, 3),
        ("rows.jsonl", TEXT.replace(b"\n", b"\r") * 2, 2),
        ("rows.jsonl", b'{"text": "hi", "n": 1.5, "large": ' + b"9" * 30 + b".0}\n" + TEXT, 2),
    ],
)
def test_json_files_of_every_layout_are_read(tmp_path, name, data, rows):
    path = tmp_path / name
    path.write_bytes(data)
    assert len(read_dataset(str(path))) == rows


def broken_text():
    """Return a table whose second text is no UTF-8, which Arrow does not check."""
    texts = pa.array([b"hi", b"h\xffi"]).view(pa.string())
    return pa.table({"source": ["a", "b"], "text": texts})


def test_parquet_that_is_no_utf8_names_the_row_and_the_column(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(broken_text(), path)
    with pytest.raises(DataError, match="rows.parquet: Row 1: field 'text': the value cannot"):
        read_dataset(str(path))


def test_a_data_set_that_is_no_utf8_names_the_row_and_the_column(tokenizer):
    with pytest.raises(DataError, match="Row 1: field 'text': the value cannot be read"):
        score_dataset(Dataset(broken_text()), tokenizer, guard="test-words", progress=False)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read: ArrowInvalid: "):
        read_dataset(str(path))


@pytest.mark.parametrize("nested", [False, True])
def test_a_column_that_names_files_is_refused(tmp_path, nested):
    """An image's path would be opened, and its bytes copied into what is written."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    image = {"path": str(secret), "bytes": None}
    features = {"_type": "Image"}
    column, kind = (
        ([[image]], {"_type": "List", "feature": features}) if nested else ([image], features)
    )
    info = {"features": {"text": {"dtype": "string", "_type": "Value"}, "seen": kind}}
    stored = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    seen = pa.array(column, pa.list_(stored) if nested else stored)
    table = pa.table({"text": ["hi"], "seen": seen}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": info})}
    )
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match="field 'seen': .*Image.*name files"):
        read_dataset(str(path))


def test_errors_of_the_command_name_the_file_and_the_row(monkeypatch, capsys, tmp_path, model_dir):
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    rows.append({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["score", path, "--guard", "test-words", "--tokenizer", model_dir, "-o", tmp_path / "o"]
    assert run_command(monkeypatch, *argv)
    assert f"{path}: Row 2: messages[1].role is NoneType None" in capsys.readouterr().err


def test_files_and_folders_can_be_streamed(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "many").mkdir()
    for split in ("train", "test"):
        (tmp_path / "many" / f"{split}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    found = read_streams(str(tmp_path / "a.jsonl"), "train")
    assert isinstance(found["train"], IterableDataset)
    assert list(found["train"]) == rows
    assert set(read_streams(str(tmp_path / "many"), "train")) == {"train", "test"}
    for name in ("nothing.jsonl", "../x"):
        with pytest.raises(DataError, match="there is no file or folder of this name"):
            read_streams(name, "train")
