"""The how-to pages show the example package that the tests install (test_hosts.py).

Their Python runs in test_snippets.py.
"""

import re
from dataclasses import fields

import pytest
from support.paths import ROOT, TESTS

from star_dss_plugin.hookspecs import GuardInfo, Integration

DOCS = ROOT / "docs"
EXAMPLE = TESTS / "plugin_example" / "toy_integration"


@pytest.mark.parametrize(
    "path", sorted(p for p in EXAMPLE.rglob("*.*") if p.suffix in (".py", ".toml")), ids=str
)
def test_the_page_on_hosts_shows_every_file_of_the_example(path):
    page = (DOCS / "howto_host.md").read_text()
    assert f"```{path.suffix[1:]}\n{path.read_text()}```" in page
    assert f"`{path.relative_to(EXAMPLE)}`" in page


@pytest.mark.parametrize(
    ("page", "described"), [("howto_guard", GuardInfo), ("howto_host", Integration)]
)
def test_every_field_is_in_the_table(page, described):
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / f"{page}.md").read_text(), flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in fields(described)} <= documented


def test_functions_that_choose_an_engine_exist():
    page = (DOCS / "howto_engine.md").read_text()
    source = (ROOT / "star_dss_plugin" / "engines" / "selection.py").read_text()
    for name in ("choose_engine", "identity", "open", "check_installed"):
        assert f"`{name}`" in page
        assert f"def {name}(" in source
