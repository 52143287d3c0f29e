"""Make the pictures of docs/report.md from the demonstration's data and its guard.

Usage: python scripts/make_report_images.py

Needs the extras `demo` and `report`, Playwright's Python package, and Chromium on the path. The
pictures show the text of benign rows only; other rows are blurred.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from playwright.sync_api import sync_playwright

from star_dss_plugin.report.figures import write_figures
from star_dss_plugin.report.page import render_page
from star_dss_plugin.report.reading import read_scored
from star_dss_plugin.scoring.scorer import score_dataset
from star_dss_plugin.smollm2 import load_smollm2

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
BENIGN_SOURCE = "self-instruct-human"


def main() -> None:
    text = (
        files("star_dss_plugin.data")
        .joinpath("assets", "demo_mix.jsonl")
        .read_text(encoding="utf-8")
    )
    rows = Dataset.from_list([json.loads(line) for line in text.splitlines()])
    _, tokenizer = load_smollm2()
    tokenizer.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    data = read_scored(score_dataset(rows, tokenizer, guard="demo", max_length=160), tokenizer)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        page.write_text(render_page(data, name="demo_mix.jsonl"), encoding="utf-8")
        photograph(page, OUT / "report.png", "light", open_a_benign_one)
        page.write_text(render_page(data, name="demo_mix.jsonl", blur=True), encoding="utf-8")
        photograph(page, OUT / "report-blurred.png", "dark", most_mixed_first)
        write_figures(data, Path(scratch))
        for name in ("trajectories", "by_source"):
            shutil.copyfile(Path(scratch) / f"{name}.png", OUT / f"report-{name}.png")
    for path in sorted(OUT.glob("report*.png")):
        print(f"{path.name}: {path.stat().st_size // 1024} KB")


def open_a_benign_one(page: Any) -> None:
    page.select_option("#source", label=BENIGN_SOURCE)
    page.select_option("#sort", "mixed")
    for _ in range(3):
        page.keyboard.press("ArrowRight")


def most_mixed_first(page: Any) -> None:
    page.select_option("#sort", "mixed")


def photograph(report: Path, target: Path, scheme: str, prepare: Callable[[Any], None]) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not on the path. Install it: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1130}, color_scheme=scheme)
        page.goto(report.as_uri())
        prepare(page)
        page.screenshot(path=target)
        browser.close()
    with Image.open(target) as image:  # a quarter of the size, without visible difference
        image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


if __name__ == "__main__":
    main()
