"""Prompts stored as a trunk and pieces equal the whole prompts, in less memory."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_dss_plugin.engines.label_rows import longest_first, rows_of_group
from star_dss_plugin.engines.shared_prefix.tree import build_tree
from star_dss_plugin.engines.shared_prompts import SharedPrompts, common_prefix_length
from star_dss_plugin.engines.vllm import _calls

TOKENS = st.integers(0, 2)
TRUNK = st.lists(TOKENS, min_size=1, max_size=12)
PIECES = st.lists(
    st.tuples(st.integers(0, 12), st.lists(TOKENS, max_size=4)), min_size=1, max_size=12
)


def shared_of(trunk, pieces):
    """Return prompts of at least one token, stored with a shared trunk and written out."""
    pieces = [(min(n, len(trunk)), end) for n, end in pieces if n or end]
    pieces = pieces or [(1, [])]
    written = [[*trunk[:n], *end] for n, end in pieces]
    return SharedPrompts(trunk, [n for n, _ in pieces], [end for _, end in pieces]), written


@given(TRUNK, PIECES, TRUNK, TRUNK)
def test_shared_prompts_equal_the_whole_prompts(trunk, pieces, before, behind):
    shared, written = shared_of(trunk, pieces)
    assert list(shared) == written
    assert list(SharedPrompts.from_prompts(written)) == written
    assert list(shared[1:]) == written[1:]
    assert shared.lengths() == list(map(len, written))
    assert list(shared.surrounded(before, behind)) == [[*before, *p, *behind] for p in written]
    for i, one in enumerate(written):
        assert shared.token_slice(i, 1) == tuple(one[1:])
        assert shared.token_slice(i, 1, 3) == tuple(one[1:3])
        for j, other in enumerate(written):
            assert shared.common_prefix_length(i, j) == common_prefix_length(one, other)
            assert (shared.sort_key(i) < shared.sort_key(j)) == (one < other)
            assert (shared.pieces[i] == shared.pieces[j]) == (one == other)


def trie(ordered):
    """Number each prefix of n sorted sequences; equal numbers mean equal prefixes."""
    length = np.array([len(tokens) for tokens in ordered])
    real = np.arange(length.max()) < length[:, None]
    tokens = np.full(real.shape, -1)
    tokens[real] = np.concatenate(ordered)
    new = np.ones_like(real)
    new[1:] = np.logical_or.accumulate(tokens[1:] != tokens[:-1], axis=1)
    nodes = np.maximum.accumulate(np.where(new, np.arange(new.size).reshape(new.shape), 0), axis=0)
    return np.where(real, nodes, -1)


@settings(max_examples=300)
@given(TRUNK, PIECES)
def test_a_tree_has_the_trunk_that_most_prompts_visit(trunk, pieces):
    """The expected trunk is found in the trie of whole prompts, node by node."""
    shared, written = shared_of(trunk, pieces)
    ordered = sorted({tuple(p) for p in written}, reverse=True)
    nodes = trie(ordered)
    visits = np.append(np.bincount(nodes[nodes >= 0]) - 1, 0)
    best = int(visits[nodes].sum(axis=1).argmax())
    tree = build_tree(3, shared)
    assert tree == build_tree(3, written)
    assert tree.distinct == np.unique(nodes[nodes >= 0]).size
    others = [common_prefix_length(p, ordered[best]) for p in ordered]
    end = max(
        (min(n, len(p) - 1) for n, p in zip(others, ordered) if p != ordered[best]), default=0
    )
    assert tree.trunk == ordered[best][:end]
    for row, (tail, prompt) in enumerate(zip(tree.tails, ordered)):
        assert (tail.group, tail.row) == (3, row)
        assert ordered[best][: tail.shared] + tail.tokens == prompt
        expected = end if row == best else others[row]
        assert tail.shared == min(expected, len(prompt) - 1)
    assert [ordered[row] for row in tree.row_of] == list(map(tuple, written))


@given(TRUNK, PIECES)
def test_the_longest_is_asked_first_and_each_once(trunk, pieces):
    shared, written = shared_of(trunk, pieces)
    order = longest_first(shared)
    distinct = sorted({tuple(p) for p in written}, key=lambda p: (-len(p), p))
    assert [tuple(written[i]) for i in order] == distinct
    known = {i: [float(len(written[i]))] for i in order}
    assert rows_of_group(shared, known, 1).flatten().tolist() == list(map(len, written))


def test_calls_of_vllm_are_bounded(monkeypatch):
    monkeypatch.setattr("star_dss_plugin.engines.vllm._CALL_TOKENS", 10)
    groups = [
        SharedPrompts(range(6), [6, 4, 2], [[]] * 3),
        SharedPrompts(range(30), [30, 1], [[]] * 2),
    ]
    assert list(_calls(groups, [[0, 1, 2], [0, 1]])) == [
        [(0, 0), (0, 1)],
        [(0, 2)],
        [(1, 0)],
        [(1, 1)],
    ]


def memory(prompts: int) -> int:
    """Return the peak bytes of making a response's prompts and their tree."""
    chance = random.Random(0)
    trunk = [chance.randrange(1000) for _ in range(5 * prompts)]
    kept = range(5, 5 * prompts + 1, 5)
    tracemalloc.start()
    tree = build_tree(
        0, SharedPrompts(trunk, kept, [[1001, 1002]] * prompts).surrounded([1] * 50, [2] * 9)
    )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tree.trunk) >= 5 * prompts - 10
    return most


def test_memory_grows_with_the_response_not_with_its_square():
    memory(2000)  # the first call also fills Python's free lists of tuples
    assert memory(2000) < 3 * memory(1000)
    assert memory(2000) < 2000 * 5 * 2000 / 2 * 8 / 10  # a tenth of all prompts written out


@pytest.mark.parametrize("prompts", [[], [[5]]])
def test_no_prompt_or_one(prompts):
    assert list(SharedPrompts.from_prompts(prompts)) == prompts
