"""Store the measured points of a landscape in a file, and assemble them into curves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from star_dss_plugin.data.files.json_lines import append_lines, read_lines
from star_dss_plugin.errors import ConfigError, DataError
from star_dss_plugin.evaluate.landscape import S_MAX, Sample, attack_success, visage
from star_dss_plugin.evaluate.moved_weights import TOWARD, Place
from star_dss_plugin.validation import shortened

__all__ = ["Curve", "Landscape", "Point", "PointsFile", "assemble_landscape"]

_FORMAT = 1


@dataclass(frozen=True)
class Point:
    """Hold one point for reports."""

    at: tuple[float, ...]
    """(α,) or (α, β)."""
    attack_success: float
    """S, in percent."""


@dataclass(frozen=True)
class Curve:
    """Hold a line or a grid of points."""

    name: str
    points: tuple[Point, ...]
    visage: float | None
    """VISAGE of this curve alone; None for the line to another model."""


@dataclass(frozen=True)
class Landscape:
    """Hold the measurements around one model."""

    curves: tuple[Curve, ...]
    visage: float | None
    """VISAGE over all points; None for the line to another model, whose direction is not random."""
    points: int
    points_below: int
    """Number of points with S < 100, over which VISAGE is the mean."""
    prompts: int
    centre: float | None
    """S of the model itself; None if it is not among the points."""

    def as_dict(self) -> dict[str, Any]:
        """Return the landscape as JSON values."""
        return asdict(self)


def assemble_landscape(
    samples: Sequence[Sample], measured: Mapping[Place, Sequence[bool]]
) -> Landscape:
    """Assemble the landscape of samples that are all measured.

    Args:
        samples: The points of all curves.
        measured: Maps a place to the safety of each answer there.
    """
    rates = {place: attack_success(safe) for place, safe in measured.items()}
    random = not any(name == TOWARD for sample in samples for name, _ in sample.place)
    curves = []
    for name in dict.fromkeys(sample.curve for sample in samples):
        points = tuple(Point(s.at, rates[s.place]) for s in samples if s.curve == name)
        own = visage(p.attack_success for p in points) if random else None
        curves.append(Curve(name, points, own))
    everywhere = [rates[s.place] for s in samples]
    return Landscape(
        curves=tuple(curves),
        visage=visage(everywhere) if random else None,
        points=len(everywhere),
        points_below=sum(rate < S_MAX for rate in everywhere),
        prompts=len(next(iter(measured.values()))),
        centre=rates.get(()),
    )


class PointsFile:
    """Keep one JSON line per measured place, so that an interrupted run can be resumed.

    The file is bound to everything that a point's value depends on: the weights, the prompts, how
    answers are generated and judged, the seed. It is not bound to the set of points, so more
    directions or a finer line reuse known points. Batch size and device change values only by
    rounding and may differ.

    Args:
        path: The file; created by the first `add`.
        bound: JSON values that identify the configuration; a file with other values is refused.
        prompts: Number of verdicts per point.

    Raises:
        ConfigError: The file belongs to another configuration.
        DataError: The file is damaged.
    """

    def __init__(self, path: Path, bound: Mapping[str, Any], prompts: int) -> None:
        self._path, self._prompts = path, prompts
        # Converted as JSON reads it back: tuples become lists.
        self._bound = json.loads(json.dumps({"star_dss_landscape": _FORMAT, **bound}))
        self.known: dict[Place, list[bool]] = {}
        self._began = self._read()

    def add(self, place: Place, safe: Iterable[bool]) -> None:
        """Store a point and write it to the file.

        Raises:
            ConfigError: Another process has begun the file since, with another configuration.
            DataError: The file that it has begun is damaged.
        """
        verdicts = list(safe)
        self._began = self._began or self._read()
        lines = [] if self._began else [self._bound]
        lines.append({"place": place, "safe": verdicts})
        append_lines(self._path, lines)
        self._began = True
        self.known[place] = verdicts

    def _read(self) -> bool:
        """Read the file's points; return whether the file was begun."""
        try:
            lines = read_lines(self._path)
            if not lines:
                return False
            head = lines[0]
            if not isinstance(head, dict) or "star_dss_landscape" not in head:
                raise ValueError("its first line is no header of a landscape")
            if head == self._bound:
                # Two processes that begin a file at the same moment both write its first line.
                points = (line for line in lines[1:] if line != head)
                self.known.update(map(self._point, points))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._path} is not a file of landscape points ({error!r}). Remove it, or name "
                "another output folder."
            ) from error
        if head != self._bound:
            keys = sorted(head.keys() | self._bound.keys())
            said = "; ".join(
                f"{key} was {shortened(head.get(key))} and is now {shortened(self._bound.get(key))}"
                for key in keys
                if head.get(key) != self._bound.get(key)
            )
            raise ConfigError(
                f"{self._path} holds points of another landscape; they cannot be mixed: {said}. "
                "Name another output folder, or remove this one."
            )
        return True

    def _point(self, entry: Any) -> tuple[Place, list[bool]]:
        safe = entry["safe"]
        if len(safe) != self._prompts or not all(isinstance(s, bool) for s in safe):
            raise ValueError(f"a point has {len(safe)} verdicts for {self._prompts} prompts")
        return tuple((str(name), float(distance)) for name, distance in entry["place"]), safe
