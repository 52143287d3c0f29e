"""The promises of SECURITY.md: no code from data or files is run, no secret is written."""

import ast
import inspect
import json
import logging
import os
import sys
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from packaging.requirements import Requirement

import star_dss_plugin
from star_dss_plugin import DataError, score_dataset
from star_dss_plugin.cli import app as cli
from star_dss_plugin.guards.classifier import ClassifierGuard
from star_dss_plugin.guards.presets import PRESETS
from star_dss_plugin.guards.verdict import VerdictGuard
from star_dss_plugin.scoring import on_ray
from star_dss_plugin.training.sharding import Ranks

PACKAGE = Path(star_dss_plugin.__file__).parent
HOMES = (PACKAGE.parent, PACKAGE.parent / "integrations")  # installed, or in the source tree
FOLDERS = [PACKAGE, *(h / name for h in HOMES for name in ("star_dss_trl", "star_dss_axolotl"))]
SOURCES = {path: ast.parse(path.read_text()) for f in FOLDERS for path in sorted(f.rglob("*.py"))}

MODULES_THAT_RUN_DATA = {
    "cloudpickle",
    "cPickle",
    "code",
    "codeop",
    "ctypes",
    "dill",
    "joblib",
    "marshal",
    "pickle",
    "pty",
    "runpy",
    "shelve",
    "subprocess",
}
CALLS_THAT_RUN_DATA = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "input",
    "os.system",
    "os.popen",
    "os.execv",
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pd.read_pickle",
    "Markup.unescape",
}
OWN_FILES = {"smollm2.py"}  # reads a package's GGUF file, which holds numbers, and its own copy


def nodes(kind):
    """Yield the place and the node of every AST node of a kind."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{path.name}:{node.lineno}", node


def dotted(node) -> str:
    """Return the dotted name of an expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_all_packages_are_searched():
    seen = {path.name for path in SOURCES}
    assert {"loss_check.py", "models.py", "sft.py", "conflicts.py"} <= seen


def test_no_module_that_runs_data_is_imported():
    for where, node in nodes((ast.Import, ast.ImportFrom)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            assert str(name).split(".")[0] not in MODULES_THAT_RUN_DATA, f"{where} imports {name}"


def test_no_function_that_runs_data_is_called():
    for where, node in nodes(ast.Call):
        assert dotted(node.func) not in CALLS_THAT_RUN_DATA, f"{where} calls {dotted(node.func)}"
        for keyword in node.keywords:
            given = isinstance(keyword.value, ast.Constant) and keyword.value.value
            unsafe = keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and given
            assert not unsafe, f"{where} sets {keyword.arg}"


def test_every_load_sets_trust_remote_code_and_safetensors():
    """If trust_remote_code is not set, transformers asks on the terminal."""
    seen = 0
    for where, node in nodes(ast.Call):
        if not dotted(node.func).endswith(".from_pretrained") or where.split(":")[0] in OWN_FILES:
            continue
        if dotted(node.func) == "PeftModel.from_pretrained":
            # It has no such options; the package checks before that there are safetensors.
            assert '"adapter_model.safetensors"' in (PACKAGE / "evaluate" / "models.py").read_text()
            continue
        seen += 1
        given = {keyword.arg for keyword in node.keywords}
        assert given & {"trust_remote_code", None}, f"{where} leaves trust_remote_code open"
        if not dotted(node.func).split(".")[0].endswith(("Tokenizer", "Config", "Processor")):
            assert "use_safetensors" in given, f"{where} may read a pickle"
    assert seen >= 6


def test_remote_code_is_never_the_default():
    for guard in (VerdictGuard, ClassifierGuard):
        assert inspect.signature(guard).parameters["trust_remote_code"].default is False
    assert not any("trust_remote_code" in preset.options for preset in PRESETS.values())


VULNERABLE = {"jinja2": "3.1.5", "filelock": "3.20.2", "ray": "2.51.9"}


def test_versions_with_known_vulnerabilities_are_not_accepted():
    needed = [Requirement(line) for line in requires("star-dss-plugin")]
    named = {one.name: one.specifier for one in needed if one.name in VULNERABLE}
    assert set(named) == set(VULNERABLE)
    for name, version in VULNERABLE.items():
        assert not named[name].contains(version), name


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("1", "1")])
def test_ray_reports_usage_only_if_that_is_switched_on(monkeypatch, given, used):
    name = "RAY_USAGE_STATS_ENABLED"
    monkeypatch.setenv(name, given or "")  # monkeypatch restores it after the test
    if given is None:
        monkeypatch.delenv(name)
    on_ray._connect(SimpleNamespace(init=lambda **options: None), None, 1)
    assert os.environ[name] == used


FULL = {"ranks": Ranks(), "estimator": "full", "needed": True, "projects": False}


def test_a_pickled_reference_is_refused(tokenizer, tmp_path):
    """A .bin file of weights is not read, whatever its content."""
    from support.models import tiny_llama

    from star_dss_plugin import ConfigError
    from star_dss_plugin.training.reference.choice import choose_reference

    model = tiny_llama(len(tokenizer))
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not read")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*safetensors"):
        choose_reference(str(tmp_path), model, tokenizer, **FULL)


def test_a_reference_with_missing_weights_is_refused(tokenizer, tmp_path):
    """transformers would fill the missing weights with random numbers."""
    from safetensors.torch import load_file, save_file
    from support.models import tiny_llama

    from star_dss_plugin import ConfigError
    from star_dss_plugin.training.reference.choice import choose_reference

    model = tiny_llama(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "up_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*lack the weights.*up_proj"):
        choose_reference(str(tmp_path), model, tokenizer, **FULL)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        choose_reference(str(tmp_path), model, tokenizer, **FULL)


def test_an_adapter_of_a_base_with_missing_weights_is_refused(tokenizer, tmp_path):
    """transformers reports weights that the adapter lacks, but not those of its base."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file
    from support.models import tiny_llama

    from star_dss_plugin import ConfigError
    from star_dss_plugin.training.reference.choice import choose_reference

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(base)
    lora = peft.LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(base))
    wrapped = peft.get_peft_model(tiny_llama(len(tokenizer)), lora)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    choose_reference(str(adapter), model, tokenizer, **FULL)
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "up_proj" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*lack the weights.*up_proj"):
        choose_reference(str(adapter), model, tokenizer, **FULL)


def test_a_row_cannot_bring_a_template(tokenizer):
    """A row's chat template could loop without end, or show the guard another text."""
    row = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bad"}],
        "chat_template_kwargs": {"chat_template": "{% for i in range(9) %}fine{% endfor %}"},
    }
    with pytest.raises(DataError, match=r"Row 0: chat_template_kwargs brings a chat_template"):
        score_dataset(Dataset.from_list([row]), tokenizer, guard="test-words", progress=False)
    row["chat_template_kwargs"]["chat_template"] = None  # as Arrow fills rows without one
    scored = score_dataset(Dataset.from_list([row]), tokenizer, guard="test-words", progress=False)
    assert min(scored[0]["star_scores"]) == pytest.approx(0.1)


HOSTILE_NAMES = [
    "../../outside",
    "/etc/passwd",
    "https://example.invalid/x",
    "a/b\0c",
    "$(touch outside)",
]


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs `star-dss` and checks that it succeeds."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["star-dss", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code

    return run


@pytest.mark.parametrize("columns", [("source", "id"), ("file_name", "path")])
def test_values_of_rows_are_not_used_as_paths(run, monkeypatch, tmp_path, model_dir, columns):
    workdir = tmp_path / "outer" / "workdir"
    workdir.mkdir(parents=True)
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("STAR_DSS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": name, "completion": f" {name}", **dict.fromkeys(columns, name)}
        for name in HOSTILE_NAMES
    ]
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("rows.jsonl", "--guard", "test-words", "--tokenizer", model_dir, "-q")
    run("score", *common, "-o", "scored")
    run("score", *common, "-o", "shards", "--shard-rows", 2)
    run("report", "scored", "-q", "--source", columns[0])
    assert sorted(p.name for p in (tmp_path / "outer").iterdir()) == ["workdir"]
    found = {p.name for p in workdir.iterdir()}
    assert found == {"rows.jsonl", "scored", "shards", "report.html"}
    names = " ".join(str(p.relative_to(workdir)) for p in workdir.rglob("*"))
    assert "outside" not in names
    assert "passwd" not in names


def test_secrets_are_neither_written_nor_printed(
    run, monkeypatch, tmp_path, model_dir, capsys, caplog
):
    canary = "canary-7f3a"
    for name in ("HF_TOKEN", "STAR_DSS_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{canary}-{name}")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("STAR_DSS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "completion": " a bad word"}\n')
    scored = tmp_path / "scored"
    run(
        "score",
        tmp_path / "rows.jsonl",
        "--guard",
        "test-words",
        "--tokenizer",
        model_dir,
        "-o",
        scored,
    )
    run("report", scored, "-o", tmp_path / "report.html")
    run("inspect", scored, "--row", 0)
    run("plugins")
    written = files_below(tmp_path)
    assert {"report.html", "scored/star_dss.json"} <= set(written)
    for name, data in written.items():
        assert canary.encode() not in data, name
    shown = [*capsys.readouterr(), caplog.text]
    assert any("test-words" in text for text in shown)
    assert not any(canary in text for text in shown)


def test_a_trainers_hub_token_is_not_in_the_run_record(tmp_path, tokenizer, model_dir):
    pytest.importorskip("trl")
    from star_dss_trl import StarDSSConfig, StarDSSTrainer

    args = StarDSSConfig(
        output_dir=str(tmp_path / "out"),
        guard="test-words",
        hub_token="canary-7f3a",
        max_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"prompt": "hi", "completion": " a bad word"}] * 8
    trainer = StarDSSTrainer(str(model_dir), args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()
    record = (tmp_path / "out" / "star_dss.json").read_text()
    assert "test-words" in record
    assert "canary" not in record + (tmp_path / "out" / "README.md").read_text()
