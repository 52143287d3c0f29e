"""Ranks that read parts of a stream take the same number of batches (here ranks are threads)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from star_dss_plugin.errors import DataError
from star_dss_plugin.training.rows.even import EvenLoader


class Loader(list):
    """Hold batches, and count how often a pass over them was ended early."""

    ended = 0

    def end(self):
        self.ended += 1


def in_each(parts, read):
    """Call `read` with each part's loader, in a thread each; return the results."""
    meeting, given = threading.Barrier(len(parts), timeout=30), {}

    def loader_of(rank):
        def gather(value):
            given[rank] = value
            meeting.wait()
            found = [given[other] for other in range(len(parts))]
            meeting.wait()
            return found

        return EvenLoader(Loader(parts[rank]), "train", gather)

    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(lambda rank: read(loader_of(rank)), range(len(parts))))


def test_the_shorter_part_is_read_again_until_the_longer_ends():
    assert in_each(["abcde", "xy"], list) == [list("abcde"), list("xyxyx")]


def test_each_pass_begins_anew():
    def twice(loader):
        found = list(loader) + list(loader)
        return "".join(found), loader.loader.ended

    # Each time the shorter part ends in the middle of another pass.
    assert in_each(["abc", "xy"], twice) == [("abcabc", 0), ("xyxxyx", 2)]


def test_the_last_batches_of_a_step_are_equally_many_too():
    def in_twos(loader):
        batches = iter(loader.loader)
        return [loader.next_batches(batches, 2) for _ in range(4)]

    longer, shorter = in_each(["abc", "x"], in_twos)
    assert longer == [["a", "b"], ["c"], [], []]
    assert shorter == [["x", "x"], ["x"], [], []]


def test_equal_parts_are_read_once(caplog):
    assert in_each(["ab", "xy"], list) == [["a", "b"], ["x", "y"]]
    assert not caplog.records


def test_a_part_that_a_resumed_run_has_skipped_as_a_whole_is_read_again():
    """accelerate skips the same number of batches of each part, even if a part has fewer."""

    def resumed(loader):
        batches = iter(loader.loader[2:])
        return [loader.next_batches(batches, 2) for _ in range(3)]

    longer, shorter = in_each(["abcde", "x"], resumed)
    assert longer == [["c", "d"], ["e"], []]
    assert shorter == [["x", "x"], ["x"], []]


def test_a_resumed_run_goes_on_in_the_midst_of_a_part_that_was_read_again():
    def resumed(loader):
        loader.skipped = 4
        batches = iter(loader.loader[4:])
        return [loader.next_batches(batches, 1) for _ in range(3)]

    longer, shorter = in_each(["abcdef", "xyz"], resumed)
    assert longer == [["e"], ["f"], []]
    assert shorter == [["y"], ["z"], []]


def test_a_part_without_rows_stops_all():
    def refused(loader):
        with pytest.raises(DataError, match="Process 1 got no row of the train stream"):
            list(loader)
        return True

    assert in_each(["ab", ""], refused) == [True, True]


def test_a_stream_without_rows_ends():
    assert in_each(["", ""], list) == [[], []]
