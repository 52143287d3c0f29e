"""Outputs that cannot be written: a clear error, no partial file, and no lost result."""

import contextlib
import errno
import json
import resource

import datasets
import pytest
from datasets import Dataset
from support.commands import run_command as run
from support.guards import WordGuard

from star_dss_plugin import DataError, OutputError
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.files.parquet_shards import write_shard
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.data.writing import write_dataset, write_text
from star_dss_plugin.evaluate.answers import AnswerFile
from star_dss_plugin.evaluate.landscape_points import PointsFile
from star_dss_plugin.scoring import jobs, shards

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"is {i} bad?"},
            {"role": "assistant", "content": "no! it is a bad word."},
        ]
    }
    for i in range(6)
]


@contextlib.contextmanager
def full_disk(size):
    """Limit files to `size` bytes: larger writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_text_file(path):
    write_text(path, "new " * 5000)


def write_saved_dataset(path):
    write_dataset(Dataset.from_dict({"input_ids": [list(range(5000))]}), path)


def write_parquet_shard(path):
    write_shard(Dataset.from_dict({"input_ids": [list(range(5000))]}), path)


def write_answer(path):
    AnswerFile(path).add("k", "new " * 5000)


def write_point(path):
    PointsFile(path, {"model": "m" * 5000}, prompts=1).add((0.0,), [True])


WRITERS = [write_text_file, write_saved_dataset, write_parquet_shard, write_answer, write_point]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_named_and_leaves_no_partial_file(tmp_path, write):
    path = tmp_path / "folder" / "result"
    with full_disk(1000), pytest.raises(OutputError) as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert "File too large" in str(caught.value)
    assert "Free space there" in str(caught.value)
    if write not in (write_answer, write_point):  # these files are appended to
        assert list(path.parent.iterdir()) == []
    write(path)  # succeeds when there is space again
    assert path.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/folder/result cannot be written"):
        write(tmp_path / "file" / "folder" / "result")


def test_an_existing_file_is_kept_if_the_new_one_cannot_be_written(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with full_disk(1000), pytest.raises(OutputError):
        write_text_file(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_answers_before_a_full_disk_are_kept(tmp_path):
    store = AnswerFile(tmp_path / "answers.jsonl")
    store.add("a", "first")
    with full_disk(1000), pytest.raises(OutputError):
        store.add("b", "long " * 5000)
    again = AnswerFile(tmp_path / "answers.jsonl")
    assert again.known == {"a": "first"}
    again.add("b", "second")
    assert AnswerFile(tmp_path / "answers.jsonl").known == {"a": "first", "b": "second"}


# The command line


@pytest.fixture
def chat_file(tmp_path):
    """Return a file of six conversations."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_an_output_that_cannot_be_written_is_refused_before_a_guard_is_loaded(
    monkeypatch, capsys, chat_file, model_dir, tmp_path
):
    (tmp_path / "file").write_text("")
    loads = WordGuard.loads
    words = ("score", chat_file, "--guard", "test-words", "--tokenizer", model_dir, "-q")
    assert run(monkeypatch, *words, "-o", tmp_path / "file" / "scored") == 2
    assert f"{tmp_path / 'file' / 'scored'} cannot be written" in capsys.readouterr().err
    assert WordGuard.loads == loads


def test_a_full_disk_in_a_library_is_an_error_message(monkeypatch, capsys, chat_file):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/cache")

    monkeypatch.setattr(cli, "app", fail)
    assert run(monkeypatch, "score") == 2
    error = capsys.readouterr().err
    assert "No space left on device: '/somewhere/cache'" in error
    assert "HF_DATASETS_CACHE" in error


def test_a_full_disk_in_a_conversion_is_not_blamed_on_the_data(monkeypatch, chat_file, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("Not enough disk space. Needed: 1.00 GiB")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    monkeypatch.setattr("star_dss_plugin.data.files.conversion.atomic_file", fail)
    with pytest.raises(DataError) as caught:
        read_dataset(str(chat_file))
    assert "Not enough disk space" in str(caught.value)
    assert f"in {datasets.config.HF_DATASETS_CACHE}: free space there" in str(caught.value)


# Shards


def begin_job(chat, model_dir, tmp_path):
    """Begin a job of shards of two rows."""
    return jobs.begin(
        str(chat), str(model_dir), tmp_path / "scored", shard_rows=2, guard="test-words"
    )


def test_a_job_resumes_after_a_full_disk(chat_file, model_dir, tmp_path, monkeypatch):
    whole = begin_job(chat_file, model_dir, tmp_path / "whole")
    shards.score_shards(whole, progress=False)
    jobs.finish(whole)
    job = begin_job(chat_file, model_dir, tmp_path)
    write, written = shards.write_shard, []

    def write_until_full(dataset, path):
        written.append(path)
        with full_disk(100) if len(written) == 2 else contextlib.nullcontext():
            write(dataset, path)

    monkeypatch.setattr(shards, "write_shard", write_until_full)
    with pytest.raises(OutputError, match="train-00001-of-00003.parquet cannot be written"):
        shards.score_shards(job, progress=False)
    assert job.missing() == [1, 2]
    job = begin_job(chat_file, model_dir, tmp_path)
    shards.score_shards(job, progress=False)
    jobs.finish(job)
    for a, b in zip(
        *(sorted((f / "scored" / "data").iterdir()) for f in (tmp_path, tmp_path / "whole")),
        strict=True,
    ):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("content", ["", '{"data": "ch', "[1]"])
def test_a_damaged_job_file_is_refused(chat_file, model_dir, tmp_path, content):
    job = begin_job(chat_file, model_dir, tmp_path)
    (job.folder / "job.json").write_text(content)
    with pytest.raises(DataError, match=r"job.json is damaged .*Remove the whole folder"):
        begin_job(chat_file, model_dir, tmp_path)
