"""Verdict guards that several modules share."""

import pytest
from support.verdict_guards import UNCHECKED, describe, tiny_guard

from star_dss_plugin import load_guard


@pytest.fixture(scope="module")
def qwen(shared, tmp_path_factory):
    """Return a tiny random Qwen3Guard-Gen with the real tokenizer and template."""
    folder = tmp_path_factory.mktemp("qwen3guard")
    tiny_guard(folder, shared / "guards" / "qwen3guard_gen")
    return load_guard({"preset": "qwen3guard-gen-0.6b", "model": str(folder), **UNCHECKED})


@pytest.fixture(scope="module")
def granite(shared, tmp_path_factory):
    """Return a tiny random Granite Guardian 3.1 with the real tokenizer and template."""
    folder = tmp_path_factory.mktemp("granite")
    tiny_guard(folder, shared / "guards" / "granite_guardian_3_1")
    return load_guard({"preset": "granite-guardian-3.1-2b", "model": str(folder), **UNCHECKED})


@pytest.fixture(scope="module")
def tiny(model_dir):
    """Return a guard of the tiny model, with a template of this project."""
    return load_guard(describe(model_dir))


@pytest.fixture(scope="module", params=["tiny", "qwen", "granite"])
def guard(request):
    return request.getfixturevalue(request.param)
