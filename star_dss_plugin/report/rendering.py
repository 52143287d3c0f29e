"""Render pages that show untrusted text, and compute the hashes of their security policy."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined

from star_dss_plugin.visible import visible

__all__ = ["content_hash", "page_environment"]


def page_environment(package: str) -> Environment:
    """Return a Jinja environment of a package's `assets`, with autoescape and strict variables."""
    environment = Environment(
        loader=PackageLoader(package, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def content_hash(content: str) -> str:
    """Return the hash of a script or a style sheet as a Content-Security-Policy source."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
