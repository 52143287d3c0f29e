"""`CachedTrajectories` asks a guard only for responses that the cache lacks."""

import threading

from star_dss_plugin.data.requests import PrefixRequest, Trajectory
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.base import Guard
from star_dss_plugin.scoring.cached_trajectories import CachedTrajectories
from star_dss_plugin.scoring.ranks import Share


class BatchesOfEight(Guard):
    """Score in batches of eight; fail on a response that ends with an exclamation mark."""

    name = "eights"
    identity = {"kind": "eights"}

    def __init__(self):
        self.scored = 0

    def plan(self, requests):
        return [list(range(len(requests)))[i : i + 8] for i in range(0, len(requests), 8)]

    def trajectories(self, requests):
        for index, request in enumerate(requests):
            if request.text.endswith("!"):
                raise GuardError("too long", request=index)
        self.scored += len(requests)
        return [Trajectory((0.5,)) for _ in requests]


def test_ranks_score_each_response_once_despite_failures_in_batches(tmp_path):
    texts = [f"{i}{'!' if i % 16 == 0 else ''}" for i in range(64)]
    requests = {f"{i:064x}": PrefixRequest((), t, (len(t),)) for i, t in enumerate(texts)}
    rows = {key: i for i, key in enumerate(requests)}
    wait_for_all = threading.Barrier(4).wait
    guards, found = [BatchesOfEight() for _ in range(4)], [None] * 4

    def ask(index):
        asking = CachedTrajectories(
            requests,
            rows,
            tmp_path,
            progress=False,
            strict=False,
            share=Share(index, 4, wait_for_all),
        )
        found[index] = asking.trajectories(guards[index])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(guard.scored for guard in guards) == 60
    expected = {k: Trajectory((0.0 if r.text.endswith("!") else 0.5,)) for k, r in requests.items()}
    assert found == [expected] * 4
