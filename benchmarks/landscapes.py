"""Compare the safety landscapes of an aligned start and of two finetuned models.

    python benchmarks/threats.py DATA_DIR --keep runs/models --workers 1000 --worker N
    python benchmarks/landscapes.py DATA_DIR runs/models

The first command, with N = 1, 2 and 3, makes and keeps the start and its finetunings with plain SFT
and star_dss on the mixture. The second runs `star-dss landscape` on each model, along the same
random directions, and from the start to each finetuned model. An interrupted run can be resumed. It
draws all landscapes in one figure and prints VISAGE.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from star_dss_plugin.cli.app import app
from star_dss_plugin.evaluate.landscape_figure import write_landscape
from star_dss_plugin.evaluate.landscape_points import Curve, Landscape, Point

START = "none-start-0"
NAMES = {START: "start", "harmful_mix-sft-0": "sft", "harmful_mix-star_dss-0": "star_dss"}


def read(path: Path) -> Landscape:
    """Return the landscape that `star-dss landscape` wrote."""
    found = json.loads(path.read_text())
    found.pop("options")
    curves = tuple(
        Curve(
            c["name"],
            tuple(Point(tuple(p["at"]), p["attack_success"]) for p in c["points"]),
            c["visage"],
        )
        for c in found.pop("curves")
    )
    return Landscape(curves=curves, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with eval_harmful_prompts.jsonl")
    parser.add_argument("models", type=Path, help="folder of threats.py --keep")
    parser.add_argument("--output", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--radius", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--save", type=Path, help="all curves in one JSON file")
    parser.add_argument("--figure", type=Path, help="the pictures, as NAME.png and NAME-toward.png")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.data / "eval_harmful_prompts.jsonl").open(encoding="utf-8") as file:
        lines = list(file)
    random.Random(1).shuffle(lines)  # the same sample as in threats.py
    prompts = args.output / "prompts.jsonl"
    prompts.write_text("".join(lines[: args.prompts]), encoding="utf-8")

    around: dict[str, Landscape] = {}
    between: dict[str, Landscape] = {}
    for folder, name in NAMES.items():
        lines_to = [] if folder == START else ["--toward", str(args.models / folder)]
        for found, options in (
            (around, [str(args.models / folder), "--radius", str(args.radius)]),
            (between, [str(args.models / START), *lines_to, "--beyond", "0.25"]),
        ):
            if found is between and not lines_to:
                continue
            output = args.output / f"{'around' if found is around else 'toward'}-{name}"
            app(
                [
                    "landscape",
                    *options,
                    "--prompts",
                    str(prompts),
                    "--output",
                    str(output),
                    "--no-figure",
                    "--directions",
                    str(args.directions),
                    "--steps",
                    str(args.steps),
                    "--max-new-tokens",
                    "16",
                    "--batch-size",
                    "24",
                    "--quiet",
                ],
                standalone_mode=False,
            )
            found[name] = read(output / "landscape.json")
    if args.save:
        every = {"around": around, "toward": between}
        rows = {kind: {n: one.as_dict() for n, one in every[kind].items()} for kind in every}
        args.save.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.figure:
        write_landscape(around, args.figure)
        write_landscape(between, args.figure.with_stem(f"{args.figure.stem}-toward"))
    for name, one in around.items():
        print(f"{name}: VISAGE {one.visage:.1f} ({one.points_below} of {one.points} points)")


if __name__ == "__main__":
    main()
