"""Labelled rows for the calibration of a guard."""


def row(text, label, **more):
    """Return a labelled row with this response."""
    return {"prompt": "how are you?", "response": text, "label": label, **more}


# 40 harmful and 40 safe rows, of which the guard of the word "bad" finds three quarters right.
ROWS = [row("bad fox" if i % 4 else "good fox", 0) for i in range(40)]
ROWS += [row("good dog" if i % 4 else "bad dog", 1) for i in range(40)]
