"""Hostile files and folders: names and metadata do not choose which other files are read."""

import http.server
import json
import os
import shutil
import threading

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from star_dss_plugin.data import reading
from star_dss_plugin.data.files.folders import check_folder
from star_dss_plugin.data.files.parquet_shards import load_scored
from star_dss_plugin.data.reading import read_dataset, read_splits, read_streams
from star_dss_plugin.errors import DataError

SECRET = "the text of another file"


@pytest.fixture
def requests_of_server(monkeypatch):
    """Return the paths that a local server was asked for, and its address; allow the hub."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = b'{"text": "downloaded"}\n'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield asked, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def saved(folder, text="mine"):
    """Return a folder with a saved data set of one text."""
    Dataset.from_list([{"text": text}]).save_to_disk(folder)
    return folder


def change_json(path, **entries):
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def assert_refused(source, match, **options):
    """Check that reading fails without showing the text of another file."""
    with pytest.raises(DataError, match=match) as stop:
        read_dataset(str(source), **options)
    assert SECRET not in str(stop.value)


# Names of files and folders


@pytest.mark.parametrize(
    "name",
    ["rows[1]", "a*b", "what?", "new\nline", "esc\x1b[31m", "x::y", "{a,b}", "~", "$HOME", "a b"],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_only_the_file_of_exactly_that_name_is_read(tmp_path, name, suffix):
    for other in ("rows1", "aab", "whatx", "a", "b"):
        write(tmp_path / f"{other}{suffix}", SECRET)
    write(tmp_path / f"{name}{suffix}", "mine")
    assert read_dataset(str(tmp_path / f"{name}{suffix}")).to_list() == [{"text": "mine"}]
    (tmp_path / f"{name}{suffix}").unlink()
    assert_refused(tmp_path / f"{name}{suffix}", "no file or folder")


def write(path, text):
    """Write one text as JSON or Parquet."""
    if path.suffix == ".jsonl":
        path.write_text(json.dumps({"text": text}) + "\n")
    else:
        pq.write_table(pa.table({"text": [text]}), path)


@pytest.mark.parametrize("name", ["scored[1]", "a*b", "x::y", "new\nline", "train"])
def test_only_the_folder_of_exactly_that_name_is_read(tmp_path, name):
    saved(tmp_path / "scored1", SECRET)
    saved(tmp_path / "aab", SECRET)
    folder = tmp_path / name
    shutil.move(saved(tmp_path / "made"), folder)
    assert read_dataset(str(folder))["text"][0] == "mine"
    plain = tmp_path / f"{name} plain"
    plain.mkdir()
    write(plain / "train-[1].jsonl", "mine")
    write(plain / "test.jsonl", SECRET)
    assert read_dataset(str(plain)).to_list() == [{"text": "mine"}]


@pytest.mark.parametrize(
    "source",
    ["no/such/file.jsonl", "data.jsonl", "../x", "/x", "http://h/x", "hf://datasets/a/b", "a/b/c"],
)
def test_names_that_are_no_repository_are_not_requested_from_the_hub(monkeypatch, source):
    monkeypatch.setattr(reading, "load_dataset_builder", lambda *a, **k: pytest.fail("asked"))
    assert_refused(source, "no file or folder")


# Saved folders


def other_file(tmp_path):
    """Return the name of an Arrow file in another folder."""
    other = saved(tmp_path / "private", SECRET)
    return json.loads((other / "state.json").read_text())["_data_files"][0]["filename"]


@pytest.mark.parametrize("path", ["../private/{}", "{root}/private/{}", "x/../../private/{}"])
def test_a_saved_folder_cannot_name_files_outside_itself(tmp_path, path):
    folder, name = saved(tmp_path / "a"), other_file(tmp_path)
    given = path.format(name, root=tmp_path)
    change_json(folder / "state.json", _data_files=[{"filename": given}])
    assert_refused(folder, "no name of a file in it")


@pytest.mark.parametrize("files", [None, 5, ["x"], [{}], [{"filename": 5}], [{"filename": ""}]])
def test_an_invalid_list_of_files_is_refused(tmp_path, files):
    folder = saved(tmp_path / "a")
    change_json(folder / "state.json", _data_files=files)
    assert_refused(folder, "lists no files|no name of a file")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    folder = saved(tmp_path / "a")
    other = saved(tmp_path / "private", SECRET)
    (folder / name).unlink()
    if kind == "link":
        (folder / name).symlink_to(other / name)
    elif kind == "pipe":
        os.mkfifo(folder / name)  # opening it would block
    else:
        (folder / name).mkdir()
    assert_refused(folder, "is a (link|pipe|folder)")


@pytest.mark.parametrize("splits", [["../private"], ["/"], [".."], "train", [5], None])
def test_splits_outside_the_folder_are_refused(tmp_path, splits):
    DatasetDict({"train": Dataset.from_list([{"text": "mine"}])}).save_to_disk(tmp_path / "a")
    saved(tmp_path / "private", SECRET)
    assert read_dataset(str(tmp_path / "a"))["text"][0] == "mine"
    change_json(tmp_path / "a" / "dataset_dict.json", splits=splits)
    split = splits[0] if isinstance(splits, list) and isinstance(splits[0], str) else "train"
    assert_refused(tmp_path / "a", "no folder in|lists no splits|no name", split=split)


def test_a_compressed_arrow_file_is_refused_before_it_is_expanded(tmp_path):
    folder = saved(tmp_path / "a")
    table = pa.table({"text": ["x" * (40 << 20)] * 10})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(
        folder / "data-00000-of-00001.arrow", table.schema, options=options
    ) as w:
        w.write_table(table)
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    peak = pool.max_memory()
    assert_refused(folder, "is compressed")
    assert pool.max_memory() - max(peak, before) < 1 << 20


def test_columns_of_media_are_refused_in_every_form(tmp_path):
    """Their values name files, which would be opened and copied into what is written."""
    rows = Dataset.from_list([{"text": "a", "seen": {"path": "/etc/hostname", "bytes": None}}])
    media = rows.cast_column("seen", datasets.Image(decode=False))
    media.save_to_disk(tmp_path / "saved")
    change_features(tmp_path / "saved" / "dataset_info.json")
    assert_refused(tmp_path / "saved", "'seen'.*name files")
    (tmp_path / "files").mkdir()
    media.to_parquet(tmp_path / "files" / "train.parquet")
    assert_refused(tmp_path / "files", "'seen'.*name files")
    with pytest.raises(DataError, match="name files"):
        read_splits(str(tmp_path / "files"), "train")


def change_features(path):
    """Declare a column as images."""
    info = json.loads(path.read_text())
    info["features"]["seen"] = {"_type": "Image"}
    path.write_text(json.dumps(info))


# Plain folders


@pytest.mark.parametrize("where", ["../secret.jsonl", "{root}/secret.jsonl", "{url}/x.jsonl"])
def test_a_data_card_cannot_choose_files(tmp_path, requests_of_server, where):
    asked, url = requests_of_server
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": SECRET}) + "\n")
    folder = tmp_path / "a"
    folder.mkdir()
    write(folder / "train.jsonl", "mine")
    path = where.format(root=tmp_path, url=url)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - path: {path}\n---\n"
    (folder / "README.md").write_text(card)
    assert_refused(folder, "does not choose what is read")
    with pytest.raises(DataError, match="does not choose"):
        check_folder(folder)
    (folder / "README.md").write_text(f"# Text\n\ndata_files: {path}\n")  # no header
    assert read_dataset(str(folder)).to_list() == [{"text": "mine"}]
    assert asked == []


def test_links_in_a_folder_are_refused(tmp_path):
    write(tmp_path / "secret.jsonl", SECRET)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert_refused(tmp_path / "a", "is a link")
    with pytest.raises(DataError, match="is a link"):
        check_folder(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "data").symlink_to(tmp_path)
    assert_refused(tmp_path / "b", "has no files")
    with pytest.raises(DataError, match="is a link"):
        check_folder(tmp_path / "b")


def test_scripts_and_other_files_are_not_read(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "a.py").write_text("raise SystemExit('run')")
    (folder / "train.csv").write_text("text\nmine\n")
    assert_refused(folder, "has no files")


def test_splits_of_a_folder_are_found_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    for i, text in enumerate("ab"):
        write(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", text)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", "c")
    found = read_splits(str(tmp_path), "train")
    assert {name: list(one["text"]) for name, one in found.items()} == {
        "train": ["a", "b"],
        "test": ["c"],
    }
    assert_refused(tmp_path, "no files of the split 'dev'", split="dev")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert_refused(tmp_path / "rows.jsonl", "a pipe or a device")


# Shards


def folder_of_shards(folder):
    """Return a folder like that of a finished job."""
    (folder / "data").mkdir(parents=True)
    (folder / "star_dss.json").write_text("{}")
    write(folder / "data" / "train-00000-of-00001.parquet", "mine")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_are_read_from_a_folder_of_any_name(tmp_path, streaming):
    folder = folder_of_shards(tmp_path / "scored[1]")
    folder_of_shards(tmp_path / "scored1")
    rows = load_scored(folder, streaming=streaming)
    assert [row["text"] for row in rows] == ["mine"]


def test_shards_that_are_links_are_refused(tmp_path):
    folder = folder_of_shards(tmp_path / "a")
    shard = folder / "data" / "train-00000-of-00001.parquet"
    write(tmp_path / "secret.parquet", SECRET)
    shard.unlink()
    shard.symlink_to(tmp_path / "secret.parquet")
    assert_refused(folder, "is a link")


@pytest.mark.parametrize("text", ["[" * 5000, "5", "", "\udcff"])
def test_damaged_provenance_is_refused(tmp_path, text):
    folder = folder_of_shards(tmp_path / "a")
    (folder / "star_dss.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(folder, "star_dss.json is damaged")


# The hub


class Builder:
    """Replace the result of `load_dataset_builder` for a repository that names these files."""

    def __init__(self, *files):
        self.config = type("Config", (), {"data_files": {"train": list(files)}})
        self.info = datasets.DatasetInfo(
            features=datasets.Features({"text": datasets.Value("string")})
        )
        self.prepared = False

    def download_and_prepare(self):
        self.prepared = True

    def as_dataset(self, split):
        return Dataset.from_list([{"text": split}])

    def as_streaming_dataset(self):
        return {"train": self.as_dataset("train").to_iterable_dataset()}


@pytest.mark.parametrize(
    "file",
    ["https://elsewhere.example/x.jsonl", "/etc/passwd", "hf://datasets/other/x@main/a.jsonl"],
)
def test_a_repository_cannot_name_files_outside_itself(monkeypatch, file):
    own = "hf://datasets/owner/name@0123/train.jsonl"
    for builder, fine in ((Builder(own), True), (Builder(own, file), False)):
        monkeypatch.setattr(reading, "load_dataset_builder", lambda *a, b=builder, **k: b)
        if fine:
            streams = read_streams("owner/name", "train")
            assert [list(stream) for stream in streams.values()] == [[{"text": "train"}]]
            assert not builder.prepared  # nothing is downloaded as a whole
            assert read_dataset("owner/name")["text"][0] == "train"
        else:
            assert_refused("owner/name", "not in its repository")
            with pytest.raises(DataError, match="not in its repository"):
                read_streams("owner/name", "train")
        assert builder.prepared is fine


def test_nothing_is_requested_while_offline(monkeypatch, requests_of_server):
    asked, url = requests_of_server
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    assert_refused("owner/name", "cannot be read")
    assert asked == []
