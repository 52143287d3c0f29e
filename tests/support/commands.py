"""Run the command line in this process."""

import sys

import pytest

from star_dss_plugin.cli import app as cli


def run_command(monkeypatch, *argv):
    """Return the exit status of `star-dss` with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["star-dss", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0
