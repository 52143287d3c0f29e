"""Fixtures of the Axolotl tests."""

from axolotl_commands import site, start  # noqa: F401
