"""Prompts and a place of small landscapes, and a plain implementation of VISAGE."""

PROMPTS = [[{"role": "user", "content": text}] for text in ("is this bad?", "hello world")]
PLACE = (("random 1", 0.25),)


def slow_visage(rates):
    """Return the mean distance to 100 of all rates below 100."""
    total, count = 0.0, 0
    for rate in rates:
        if rate < 100:
            total, count = total + (100 - rate), count + 1
    return total / count if count else 0.0
