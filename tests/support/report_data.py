"""Scored responses and hostile texts for the tests of the report, made without a guard."""

from star_dss_plugin.report.reading import ScoredData, ScoredResponse

PROVENANCE = {
    "guard": "a-guard",
    "demonstration_guard": False,
    "segmenter": "tokens",
    "chunk_size": 5,
}
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]> &lt; &amp; \u2028 \u2029",
    "\u202eevil\u202c\u2066x",
    "nul \x00 escape \x1b[31m bell \x07 \x9b31m",
    "half \ud800 a pair",
    "{{ 7 * 7 }} {% raw %}",
]


def messages(*turns):
    """Return a row whose messages alternate between user and assistant."""
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns)]}


def response(row=0, pieces=("all is ", "well"), scores=(0.9, 0.2), **changes):
    """Return a scored response with one piece of text per score."""
    fields = {
        "row": row,
        "turn": 0,
        "source": None,
        "context": ({"role": "user", "content": f"question {row}"},),
        "raw_context": False,
        "pieces": tuple(pieces),
        "token_ends": tuple(range(5, 5 * len(pieces) + 1, 5)),
        "scores": tuple(scores),
    }
    return ScoredResponse(**{**fields, **changes})


def scored_data(*responses, **provenance):
    """Return scored data with these responses and changes of `PROVENANCE`."""
    return ScoredData(tuple(responses), {**PROVENANCE, **provenance}, "some/model")
