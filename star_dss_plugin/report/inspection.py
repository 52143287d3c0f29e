"""Show one scored row in a terminal (rich) or a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from datasets import Dataset
from rich.console import RenderableType
from rich.text import Text

from star_dss_plugin.errors import DataError
from star_dss_plugin.report import palette
from star_dss_plugin.report.reading import ScoredData, ScoredResponse, read_scored, tokenizer_of
from star_dss_plugin.visible import visible, visible_line

__all__ = ["Inspection", "inspect_row"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_DEMONSTRATION = "DEMONSTRATION SCORES: this guard protects nobody."


@dataclass(frozen=True)
class Inspection:
    """Hold a row's responses, which rich's `print` and notebooks show in colour.

    Attributes:
        data: The row's responses and the provenance of their scores.
        row: Number of the row in the data set, from 0.
        threshold: τ in [0, 1].
    """

    data: ScoredData
    row: int
    threshold: float = 0.5

    def __rich_console__(self, console: object, options: object) -> Iterator[RenderableType]:
        yield Text(f"Row {self.row}, guard {visible_line(self.data.guard)}", style="bold")
        if self.data.demonstration:
            yield Text(_DEMONSTRATION, style="bold yellow")
        for response in self.data.responses:
            yield Text()
            for message in response.context:
                yield Text.assemble(
                    (f"{visible_line(str(message['role']))}: ", "bold dim"),
                    visible(str(message["content"])),
                )
            if response.raw_context:
                yield Text("(decoded tokens: no message of the row matches)", style="dim")
            yield Text(_facts(response, self.threshold), style="bold dim")
            yield Text(_blocks(response))
            yield _coloured(response, self.threshold)

    def _repr_html_(self) -> str:
        """Return HTML with inline styles, in which all text is escaped."""
        parts = [f"<p><b>Row {self.row}, guard {_html(self.data.guard)}</b></p>"]
        if self.data.demonstration:
            parts.append(f"<p><b>{_DEMONSTRATION}</b></p>")
        for response in self.data.responses:
            parts += [
                f"<p><b>{_html(m['role'])}:</b> <bdi style='white-space:pre-wrap'>"
                f"{_html(m['content'])}</bdi></p>"
                for m in response.context
            ]
            parts.append(f"<p>{_html(_facts(response, self.threshold))}<br>{_blocks(response)}</p>")
            spans = "".join(
                f"<span title='{score:.3f}{_by(asked)}' "
                f"style='{_css(score, self.threshold)}'>{_html(piece)}</span>"
                for piece, score, asked in zip(
                    response.pieces, response.scores, _asked(response), strict=True
                )
            )
            parts.append(
                "<p dir='auto' style='white-space:pre-wrap;unicode-bidi:isolate;line-height:1.7'>"
                f"{spans}</p>"
            )
        return "<div style='max-width:60em'>" + "".join(parts) + "</div>"


def inspect_row(
    dataset: Dataset, row: int, *, tokenizer: str | None = None, threshold: float = 0.5
) -> Inspection:
    """Return one row of a scored data set, to print or to show in a notebook.

    Args:
        dataset: A data set with `input_ids`, `labels` and `star_scores`.
        row: Number of the row, from 0.
        tokenizer: Id or folder of the model that the data was scored for; None reads it from the
            data set's provenance.
        threshold: τ in [0, 1].

    Raises:
        DataError: The row does not exist, or it has no response.
        ConfigError: The tokenizer is unknown or cannot be loaded.
    """
    if not 0 <= row < len(dataset):
        raise DataError(
            f"There is no row {row}: the data set has {len(dataset)} rows, 0 to {len(dataset) - 1}."
        )
    try:
        found = read_scored(dataset.select([row]), tokenizer_of(dataset, tokenizer))
    except DataError as error:
        error.counted_from(row)
        raise
    return Inspection(found, row, threshold)


def _facts(response: ScoredResponse, threshold: float) -> str:
    crossing = response.crossing(threshold)
    where = (
        f"never below {threshold}"
        if crossing is None
        else f"below {threshold} from token {crossing} of {response.tokens}"
    )
    probed = ""
    if response.asked is not None:
        probed = f", {response.asked.count(False)} of {len(response.asked)} pieces by a probe"
    return (
        f"response {response.turn + 1}: lowest {response.lowest:.3f}, mean {response.mean:.3f}, "
        f"largest fall {response.largest_fall:.3f}, {where}{probed}"
    )


def _blocks(response: ScoredResponse) -> str:
    """Return the trajectory as a line of blocks, each as high as the lowest score of its tokens."""
    width = min(_WIDTH, response.tokens)
    lowest = [1.0] * width
    start = 0
    for end, score in zip(response.token_ends, response.scores, strict=True):
        for cell in range(start * width // response.tokens, -(-end * width // response.tokens)):
            lowest[cell] = min(lowest[cell], score)
        start = end
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(score * top)] for score in lowest)


def _asked(response: ScoredResponse) -> tuple[bool, ...]:
    return response.asked or (True,) * len(response.pieces)


def _by(asked: bool) -> str:
    return "" if asked else " by the probe"


def _coloured(response: ScoredResponse, threshold: float) -> Text:
    """Return the text coloured by score, in italics where a probe gave the score."""
    text = Text()
    for piece, score, asked in zip(response.pieces, response.scores, _asked(response), strict=True):
        k = palette.colour_level(score)
        style = f"{palette.INK['light']} on {palette.LIGHT[k]}"
        style += "" if asked else " italic"
        text.append(visible(piece), style + (" underline" if score < threshold else ""))
    return text


def _html(value: object) -> str:
    return escape(visible(str(value)), quote=True)


def _css(score: float, threshold: float) -> str:
    line = ";text-decoration:underline" if score < threshold else ""
    background = palette.LIGHT[palette.colour_level(score)]
    return f"background:{background};color:{palette.INK['light']}{line}"
