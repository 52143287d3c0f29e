"""Files that expand to much more than their size are refused before they are expanded."""

import contextlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, Value

from star_dss_plugin.data.files import conversion
from star_dss_plugin.data.files.conversion import MAX_EXPANSION
from star_dss_plugin.data.files.parquet_shards import load_scored
from star_dss_plugin.data.reading import read_dataset
from star_dss_plugin.errors import ConfigError, DataError

BIG = "x" * (1 << 20)
MB = 1 << 20


pytestmark = pytest.mark.usefixtures("own_copies")


def texts(count):
    """Return a table of texts of 1 MiB."""
    return pa.table({"text": [BIG] * count})


BOMBS = {
    "texts": lambda: texts(400),
    "texts in lists": lambda: pa.table({"text": [[BIG] * 100] * 4}),
    "texts in messages": lambda: pa.table(
        {"messages": [[{"role": "user", "content": BIG}] * 20] * 20}
    ),
    "bytes": lambda: pa.table({"raw": pa.array([BIG.encode()] * 400)}),
    "numbers": lambda: pa.table({"input_ids": [[7] * (9 * MB)]}),
    "booleans": lambda: pa.table({"on": [[True] * (9 * MB)]}),
}


def write_compressed(path, table, **options):
    """Write a table with zstd; return its path."""
    pq.write_table(table, path, compression="zstd", **options)
    return path


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_expands_to_400_mb_is_refused(tmp_path, kind):
    path = write_compressed(tmp_path / "rows.parquet", BOMBS[kind]())
    assert path.stat().st_size < MB / 2
    with pytest.raises(DataError, match=f"holds more than .*{MAX_EXPANSION}"):
        read_dataset(str(path))


_POOLS = []  # a pool must live longer than all buffers that Arrow takes from it


@contextlib.contextmanager
def peak_of_arrow():
    """Yield a function that returns the largest number of bytes that Arrow held in the block."""
    default, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield pool.max_memory
    finally:
        pa.set_memory_pool(default)


def test_measuring_an_expansion_takes_little_memory(tmp_path):
    path = write_compressed(tmp_path / "rows.parquet", texts(300))
    with peak_of_arrow() as peak, pytest.raises(DataError, match="holds more than"):
        read_dataset(str(path))
    assert MB <= peak() < 100 * MB


def test_missing_texts_are_counted_before_they_are_expanded(tmp_path):
    """One row with a list of 17 million missing texts takes some hundred bytes."""
    missing = pa.array([[None] * (17 * MB)], pa.list_(pa.string()))
    path = write_compressed(tmp_path / "rows.parquet", pa.table({"text": missing}))
    assert path.stat().st_size < 2000
    with peak_of_arrow() as peak, pytest.raises(DataError, match="holds more than"):
        read_dataset(str(path))
    assert peak() < MB


def test_the_limit_of_expansion_can_be_raised(tmp_path, monkeypatch):
    path = write_compressed(tmp_path / "rows.parquet", texts(100))
    with pytest.raises(DataError, match="holds more than"):
        read_dataset(str(path))
    monkeypatch.setenv(MAX_EXPANSION, "1e6")
    assert len(read_dataset(str(path))) == 100


@pytest.mark.parametrize("given", ["x", "0", "0.5", "nan", "inf", "-3"])
def test_an_invalid_limit_of_expansion_is_refused(tmp_path, monkeypatch, given):
    monkeypatch.setenv(MAX_EXPANSION, given)
    path = write_compressed(tmp_path / "rows.parquet", pa.table({"text": [f"of {given}"]}))
    with pytest.raises(ConfigError, match=f"{MAX_EXPANSION} is '{given}'"):
        read_dataset(str(path))


def test_repetitive_small_files_are_read(tmp_path):
    path = write_compressed(
        tmp_path / "rows.parquet", pa.table({"text": ["hello " * 100] * 20_000})
    )
    assert path.stat().st_size * 200 < 20_000 * 600 < conversion._MIN_LIMIT_BYTES
    assert len(read_dataset(str(path))) == 20_000


def test_a_shard_that_expands_too_much_is_refused_in_memory_and_streaming(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "star_dss.json").write_text("{}")
    write_compressed(tmp_path / "data" / "train-00000-of-00001.parquet", texts(400))
    for streaming in (False, True):
        with pytest.raises(DataError, match="holds more than"):
            list(load_scored(tmp_path, streaming=streaming))


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_parquet_is_read_as_it_was_written(tmp_path, compression):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "é\0"},
                {"role": "tool", "content": None},
            ],
            "input_ids": list(range(i)),
            "star_scores": [0.5] * i,
            "source": "a" if i % 2 else None,
            "tags": [["x"], []],
        }
        for i in range(2500)
    ]
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist(rows)
    # A small limit: columns begin with a dictionary and go on without it.
    pq.write_table(
        table, path, compression=compression, row_group_size=700, dictionary_pagesize_limit=100
    )
    assert read_dataset(str(path)).to_list() == rows


def test_features_of_a_parquet_file_are_kept(tmp_path):
    features = Features({"text": Value("large_string"), "any": Json()})
    given = Dataset.from_list([{"text": "a", "any": "5"}, {"text": "b", "any": [1]}], features)
    given.to_parquet(tmp_path / "rows.parquet")
    found = read_dataset(str(tmp_path / "rows.parquet"))
    assert found.features == features
    assert found.to_list() == given.to_list()
