"""Define the commands of `star-dss`; no other package imports this one."""

from star_dss_plugin.cli.app import main

__all__ = ["main"]
