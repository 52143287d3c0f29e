"""Fixtures of the tests of the server engine."""

import pytest
from support.fake_server import KEY, FakeServer


@pytest.fixture
def fake(model):
    """Run a server with the tiny model until the test ends."""
    found = FakeServer(model)
    yield found
    found.stop()


@pytest.fixture
def short_waits_and_key(monkeypatch):
    """Shorten the waits before a request is sent again, and set the key of the server."""
    monkeypatch.setattr("star_dss_plugin.engines.server._MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("STAR_DSS_API_KEY", KEY)


@pytest.fixture
def open_engine():
    """Return a function that opens engines; close them after the test."""
    from star_dss_plugin.engines.server import ServerEngine

    engines = []

    def open_engine(fake, **options):
        engines.append(ServerEngine(fake.url, model="tiny", **options))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()
