"""Every command of `star-dss`; no other room imports this one."""

from star_dss_plugin.cli.app import main

__all__ = ["main"]
