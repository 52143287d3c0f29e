"""A guard that Ray's workers find as an installed plugin; it can die on demand."""

import hashlib
import os
import time
from pathlib import Path

from star_dss_plugin import hookimpl
from star_dss_plugin.errors import GuardError
from star_dss_plugin.guards.base import StreamingGuard


class LettersGuard(StreamingGuard):
    """Score prefixes by a hash.

    Args:
        log: A folder with a file for each worker, which has a line for each response it scored.
        die_at: The first worker that scores a response with this text exits at once.
        refuse: A response that the guard cannot score.
        delay: Seconds that each call takes.
    """

    name = "test-letters"

    def __init__(self, *, log, die_at="", refuse="", delay=0.0, **common):
        self.log, self.die_at, self.refuse, self.delay = Path(log), die_at, refuse, delay

    @property
    def identity(self):
        return {"kind": "letters"}

    def token_scores(self, responses):
        time.sleep(self.delay)
        with (self.log / f"worker-{os.getpid()}").open("a") as file:
            file.writelines(f"{text}\n" for _, text in responses)
        if any(self.refuse == text for _, text in responses):
            raise GuardError("not this one")
        if self.die_at and any(self.die_at in text for _, text in responses):
            died = self.log / "died"
            if not died.exists():
                died.touch()
                os._exit(1)
        return [[(end, score(text[:end])) for end in range(len(text) + 1)] for _, text in responses]


def score(text):
    """Return a number from 0 to 1 that depends on each character."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big") / 2**24


@hookimpl
def star_dss_register_guards(register):
    register("test-letters", LettersGuard, summary="for the tests of shards")
