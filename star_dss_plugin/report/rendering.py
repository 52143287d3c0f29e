"""What every page that shows strangers' text is rendered with, and the hashes its policy allows."""

from __future__ import annotations

import base64
import hashlib

from jinja2 import Environment, PackageLoader, StrictUndefined

from star_dss_plugin.visible import visible

__all__ = ["content_hash", "page_environment"]


def page_environment(package: str) -> Environment:
    """Templates of a package's `assets`: all values are escaped, unknown ones are an error."""
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
    """A script or a style sheet as a Content-Security-Policy names it."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
