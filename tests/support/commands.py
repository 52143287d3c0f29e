"""The command line, run in this process."""

import sys

import pytest

from star_dss_plugin.cli import app as cli


def run_command(monkeypatch, *argv):
    """The exit status of `star-dss` with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["star-dss", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0
