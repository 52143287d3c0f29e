"""Reference log-probabilities: a run that is killed while computing them loses little."""

import contextlib

import pytest
from datasets import Dataset
from support.models import tiny_llama

from star_dss_plugin import CacheError
from star_dss_plugin.data import cache
from star_dss_plugin.loss import Shaping
from star_dss_plugin.training.reference import column as precompute
from star_dss_plugin.training.reference.model import Reference
from star_dss_plugin.training.sharding import Ranks

TEXTS = ["how are you?", "no!", "a bad word makes a response unsafe", "hello", "is this bad?"] * 2


class Killed(BaseException):
    pass


@pytest.fixture
def with_column(tokenizer, monkeypatch):
    """Return a function that adds the column with a new model, small batches and a given cache."""
    monkeypatch.setattr(precompute, "_BATCH_TOKENS", 8)
    ids = [[i, *row] for i, row in enumerate(tokenizer(TEXTS)["input_ids"])]
    rows = Dataset.from_dict(
        {"input_ids": ids, "labels": ids, "star_scores": [[0.5] * len(row) for row in ids]}
    )

    def column(folder):
        return list(
            precompute.add_reference_logps(
                rows,
                Reference("precomputed", "", fingerprint="f"),
                tiny_llama(len(tokenizer)),
                Shaping.named("star_dss", kl_coef=0.5, threshold=0.5),
                pad_token_id=0,
                cache_dir=folder,
                autocast=contextlib.nullcontext,
                precision="no",
                ranks=Ranks(),
                progress=False,
            )["ref_logps"]
        )

    return column


def count_batches(monkeypatch, kill_at=None):
    """Count forward passes; raise `Killed` in pass number `kill_at`."""
    done = []
    apply_to_logits = precompute.apply_to_logits

    def counted(*args, **kwargs):
        done.append(1)
        if len(done) == kill_at:
            # As after SIGKILL, nothing more is written.
            monkeypatch.setattr(cache.ScoreCache, "flush", lambda self: None)
            raise Killed
        return apply_to_logits(*args, **kwargs)

    monkeypatch.setattr(precompute, "apply_to_logits", counted)
    return done


def test_what_was_computed_before_a_kill_is_not_computed_again(with_column, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        whole = count_batches(patched)
        undisturbed = with_column(tmp_path / "undisturbed")
    assert len(whole) > 4
    monkeypatch.setattr(cache, "_FLUSH_SECONDS", -1.0)
    for kill_at in (2, 3):
        with monkeypatch.context() as patched:
            count_batches(patched, kill_at)
            with pytest.raises(Killed):
                with_column(tmp_path / "killed")
    rest = count_batches(monkeypatch)
    assert with_column(tmp_path / "killed") == undisturbed
    assert len(rest) == len(whole) - 3


def test_batches_do_not_depend_on_what_the_cache_holds(with_column, tmp_path, monkeypatch):
    """Padding changes the last bits, so a batch with one missing row is computed as a whole."""
    undisturbed = with_column(tmp_path)
    (shard,) = tmp_path.rglob("*.shard")
    namespace = {"what": "ref_logps", "version": 1, "model": "f", "precision": "no"}
    full = cache.ScoreCache(tmp_path, namespace)
    assert full.get("") is None
    body = shard.read_bytes().partition(b"\n")[2]
    entries = dict(cache.shard_format.entries(shard.name, body))
    shard.unlink()
    half = cache.ScoreCache(tmp_path, namespace)
    for key in list(entries)[::2]:
        half.put(key, entries[key].unpack())
    half.flush()
    assert with_column(tmp_path) == undisturbed


@pytest.mark.parametrize("ahead", [0, 10**19])
@pytest.mark.parametrize("fault", ["length", "nan", "more than certain", "first"])
def test_an_entry_that_is_no_answer_is_computed_again(
    with_column, tmp_path, monkeypatch, fault, ahead
):
    """For any writer and clock: an invalid entry must not become a reference of zeros."""
    undisturbed = with_column(tmp_path)
    (shard,) = tmp_path.rglob("*.shard")
    body = shard.read_bytes().partition(b"\n")[2]
    foreign = cache.ScoreCache(
        tmp_path, {"what": "ref_logps", "version": 1, "model": "f", "precision": "no"}
    )
    assert foreign.folder == shard.parent
    for key, entry in cache.shard_format.entries(shard.name, body):
        values = list(entry.unpack().scores)
        if fault == "length":
            values.append(-1.0)
        elif fault == "nan":
            values[-1] = -7.0  # a NaN cannot be put; see below
        else:
            values[0 if fault == "first" else -1] = 5.0
        foreign.put(key, cache.Trajectory(tuple(values)))
    with monkeypatch.context() as clock:
        if ahead:
            clock.setattr(cache.time, "time_ns", lambda: ahead)
        if fault == "nan":
            seven, nan = (cache.struct.pack("<d", x) for x in (-7.0, float("nan")))
            encode = cache.shard_format.encode
            clock.setattr(
                cache.shard_format, "encode", lambda entries: encode(entries).replace(seven, nan)
            )
        foreign.flush()
    assert with_column(tmp_path) == undisturbed


def test_what_cannot_be_read_back_is_an_error(with_column, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.ScoreCache, "put", lambda *args: None)
    with pytest.raises(CacheError, match="were just computed cannot be read"):
        with_column(tmp_path)
