"""A guard that looks for a word, and the plugin that registers it."""

from collections.abc import Sequence

from star_dss_plugin import hookimpl
from star_dss_plugin.data.requests import Message
from star_dss_plugin.guards.base import StreamingGuard
from star_dss_plugin.plugins import Origin, load_plugins


class WordGuard(StreamingGuard):
    """Score prefixes as unsafe from the end of the word "bad" on, and as safe before."""

    name = "test-words"
    loads = 0

    def __init__(
        self,
        *,
        word: str = "bad",
        safe: float = 0.9,
        unsafe: float = 0.1,
        device: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 0,
    ) -> None:
        self.word, self.safe, self.unsafe = word, safe, unsafe
        self.asked: list[str] = []
        self.closed = 0

    @property
    def identity(self) -> dict[str, object]:
        return {"kind": "words", "word": self.word, "scores": [self.safe, self.unsafe]}

    def token_scores(
        self, responses: Sequence[tuple[Sequence[Message], str]]
    ) -> list[list[tuple[int, float]]]:
        type(self).loads += 1
        self.asked += [text for _, text in responses]
        return [
            [
                (end, self.unsafe if self.word in text[:end] else self.safe)
                for end in range(len(text) + 1)
            ]
            for _, text in responses
        ]

    def close(self) -> None:
        self.closed += 1


class WordsPlugin:
    """Register `WordGuard` as the preset "test-words"."""

    @hookimpl
    def star_dss_register_guards(self, register):
        register("test-words", WordGuard, summary="a word list")


def register_guard() -> None:
    """Register `WordGuard` by its name in this process, unless it is registered."""
    if WordGuard.name not in load_plugins().names("guard"):
        load_plugins().register(WordsPlugin(), Origin("tests", "star-dss-tests", "0"))


def write_words_plugin(folder):
    """Install the tests' guard as a plugin in a folder for PYTHONPATH; return the folder."""
    (folder / "words_plugin.py").write_text(
        "from support.guards import WordsPlugin\nwords = WordsPlugin()\n"
    )
    info = folder / "words_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: words-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[star_dss]\nwords = words_plugin:words\n")
    return folder
