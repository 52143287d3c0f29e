"""Render the report as one HTML file that loads nothing, runs one script and isolates text.

Three measures protect the reader from hostile rows. The text is JSON in a script element whose type
is never executed, and every character that could end the element is escaped. The script inserts it
as text nodes, never as markup. The Content-Security-Policy allows only this script and this style
sheet, by their hashes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from star_dss_plugin._version import __version__
from star_dss_plugin.report import palette
from star_dss_plugin.report.reading import ScoredData, ScoredResponse
from star_dss_plugin.report.rendering import content_hash, page_environment
from star_dss_plugin.report.summary import BINS, by_source, histogram, summarise
from star_dss_plugin.scoring.guard_statistics import remarks
from star_dss_plugin.visible import visible

__all__ = ["render_page"]

_SOURCES_SHOWN = 40
_LONGEST_ROLE = 24


def render_page(
    data: ScoredData,
    *,
    name: str,
    threshold: float = 0.5,
    blur: bool = False,
    text: bool = True,
) -> str:
    """Return the complete HTML file.

    Args:
        data: The scored data to show.
        name: Name of the data set.
        threshold: τ in [0, 1]: scores below it count as unsafe.
        blur: Whether text is blurred until the reader reveals it.
        text: Whether the file contains prompts and responses; names of sources are always in it.

    Returns:
        The HTML text; encode it as UTF-8. Text of the data is written in ASCII.
    """
    environment = page_environment("star_dss_plugin.report")
    style, script = _style(), _asset("drawing.js") + _asset("report.js")
    sources = by_source(data.responses, threshold)
    counts = histogram(data.responses)
    return environment.get_template("report.html.j2").render(
        policy="; ".join(
            [
                "default-src 'none'",
                f"script-src '{content_hash(script)}'",
                f"style-src '{content_hash(style)}'",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        # Trusted: these are assets of the package, without any text of the data.
        style=Markup(style),
        script=Markup(script),
        payload=_embedded(_payload(data, [group.name for group in sources], threshold, text)),
        name=name,
        guard=data.guard,
        demonstration=data.demonstration,
        interpolated=data.interpolated,
        probed=any(response.asked is not None for response in data.responses),
        provenance=data.provenance,
        remarks=remarks(data.provenance or {}),
        # The page may be shared, so local paths are removed.
        tokenizer=_without_folders(data.tokenizer),
        version=__version__,
        threshold=threshold,
        blur=blur,
        text=text,
        total=summarise(data.responses, threshold),
        sources=sources[:_SOURCES_SHOWN],
        more_sources=len(sources) - _SOURCES_SHOWN,
        counts=counts,
        most=max(counts),
        bins=BINS,
        levels=palette.LEVELS,
    )


def _without_folders(name: str) -> str:
    path = Path(name)
    return path.name if path.is_absolute() else name


def _asset(name: str) -> str:
    return files("star_dss_plugin.report").joinpath("assets", name).read_text(encoding="utf-8")


def _style() -> str:
    scale = "".join(
        f"--h{k}:light-dark({light},{dark});"
        for k, (light, dark) in enumerate(zip(palette.LIGHT, palette.DARK, strict=True))
    )
    ink = f"--ink:light-dark({palette.INK['light']},{palette.INK['dark']});"
    rules = "".join(
        f".h{k}{{background:var(--h{k})}}.bar{k}{{fill:var(--h{k})}}" for k in range(palette.LEVELS)
    )
    return f":root{{{ink}{scale}}}\n{_asset('report.css')}{rules}\n"


def _embedded(value: Any) -> Markup:
    """Return JSON in which no string can be parsed as HTML markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _payload(
    data: ScoredData, sources: Sequence[str], threshold: float, text: bool
) -> dict[str, Any]:
    """Return the data for the script, with each message stored once."""
    messages: dict[tuple[str, str], int] = {}
    places = {name: i for i, name in enumerate(sources)}
    rows = []
    for response in data.responses:
        row = _numbers(response, threshold)
        if response.source is not None:
            row["source"] = places[response.source]
        if text:
            row["pieces"] = [visible(piece) for piece in response.pieces]
            row["raw"] = response.raw_context
            row["context"] = [
                messages.setdefault((str(m["role"]), str(m["content"])), len(messages))
                for m in response.context
            ]
        rows.append(row)
    return {
        "threshold": threshold,
        "demonstration": data.demonstration,
        "text": text,
        "sources": [visible(name) for name in sources],
        # Roles stay readable when text is blurred, so they are cut to a length that holds no text.
        "messages": [
            [visible(role[:_LONGEST_ROLE]), visible(content)] for role, content in messages
        ],
        "responses": rows,
    }


def _numbers(response: ScoredResponse, threshold: float) -> dict[str, Any]:
    found: dict[str, Any] = {} if response.asked is None else {"asked": response.asked}
    return {
        **found,
        "row": response.row,
        "turn": response.turn,
        "ends": response.token_ends,
        "scores": response.scores,
        "lowest": response.lowest,
        "mean": round(response.mean, 4),
        "fall": round(response.largest_fall, 4),
        "below": response.below(threshold),
        "cross": response.crossing(threshold),
    }
