"""The Python, YAML, TOML and command lines of the README and the documentation run.

Python is executed with a tiny model in place of the named one and a guard that reads words in
place of the named guard. YAML is read by our configuration and commands by the real parser, so
that a name, a flag or an argument that no longer exists fails here.
"""

import ast
import importlib
import inspect
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from support.models import tiny_llama
from support.paths import ROOT
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.main import get_command

import star_dss_plugin
from star_dss_plugin import StarDSSOptions
from star_dss_plugin.cli import app as cli
from star_dss_plugin.data.writing import write_dataset
from star_dss_plugin.hookspecs import ENTRY_POINT_GROUP
from star_dss_plugin.models.loading import load_tokenizer
from star_dss_plugin.plugins import HOOK_KINDS, Origin, Plugins

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "integrations").glob("*/README.md")),
]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def blocks(language):
    """Return the fenced blocks of a language, as parameters with page and line."""
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if match[1] == language:
                line = page.read_text(encoding="utf-8")[: match.start()].count("\n") + 1
                name = f"{page.relative_to(ROOT)}:{line}"
                found.append(pytest.param(match[2], id=name))
    return found


def pages_without_fences():
    for page in PAGES:
        yield page.relative_to(ROOT), FENCE.sub("", page.read_text(encoding="utf-8"))


# Python

NOT_EXECUTED = {
    'engine="http://gpu-7:8000"': "asks a server; test_server_engine.py runs one",
}

PAIRS = [("how are you?", " i am fine, thank you."), ("is this bad?", " no! a bad word.")] * 20
CHAT = [
    {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]}
    for p, a in PAIRS
]
SMALL = 'output_dir="out", bf16=False, use_cpu=True, max_steps=1, report_to="none"'


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Change to a folder with the files that the snippets read."""
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text(jsonl(CHAT))
    Path("pairs.jsonl").write_text(jsonl({"prompt": p, "completion": a} for p, a in PAIRS))
    return tmp_path


def write_scored(model_dir, *, shards: bool):
    """Write scored conversations as a data set or as shards."""
    if shards:
        from star_dss_plugin.scoring import jobs
        from star_dss_plugin.scoring.shards import score_shards

        begun = jobs.begin(
            "chat.jsonl", str(model_dir), Path("scored"), guard="test-words", shard_rows=30
        )
        score_shards(begun, progress=False)
        jobs.finish(begun)
    else:
        scored = star_dss_plugin.score_dataset(
            Dataset.from_list(CHAT),
            load_tokenizer(str(model_dir)),
            guard="test-words",
            progress=False,
        )
        write_dataset(scored, Path("scored"))


def names_for(source, tokenizer) -> dict:
    """Return the names that a snippet presupposes: public names and objects of a user's script."""
    names = {n: getattr(star_dss_plugin, n) for n in star_dss_plugin.__all__}
    policy, reference = tiny_llama(len(tokenizer)), tiny_llama(len(tokenizer))
    names |= {
        "dataset": Dataset.from_list(CHAT),
        "tokenizer": tokenizer,
        "policy": policy,
        "reference": reference,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=1e-3),
        "my_prompts": ["is this bad?"],
        "tasks": Dataset.from_list(CHAT),
        "harmful": Dataset.from_list(CHAT[1:2]),
    }
    if "lora" in source:
        from peft import LoraConfig

        names["lora"] = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    if "trainer.add_callback" in source:
        names["trainer"] = Trainer(
            policy,
            args=TrainingArguments("out", report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}]),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
    return names


def bind_calls(source: str) -> int:
    """Check the arguments of calls of public names; return the number of calls."""
    bound = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            target = getattr(star_dss_plugin, node.func.id)
            keywords = {k.arg: k.value for k in node.keywords}
            inspect.signature(target).bind(*node.args, **keywords)
            bound += 1
    return bound


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize("source", blocks("python"))
def test_python_runs(source, workdir, tokenizer, model_dir):
    if any(mark in source for mark in NOT_EXECUTED):
        assert bind_calls(source)
        return
    if re.search(r"\b(trl|star_dss_trl|lora)\b", source):
        pytest.importorskip("trl")
        pytest.importorskip("peft")
    if '"scored"' in source:
        write_scored(model_dir, shards="load_scored" in source)
    source = source.replace('"Qwen/Qwen3-0.6B"', repr(str(model_dir)))
    source = re.sub(r'"(qwen3guard-gen-0\.6b|demo)"', '"test-words"', source)
    source = source.replace('output_dir="out"', SMALL)
    names = names_for(source, tokenizer)
    exec(compile(source, "snippet", "exec"), names)
    if isinstance(names.get("guard"), dict):
        StarDSSOptions(guard=names["guard"]).validate()
    if hooks := {hook for hook in HOOK_KINDS if hook in names}:
        module = type("Module", (), {h: staticmethod(names[h]) for h in hooks})
        plugins = Plugins()
        plugins.register(module, Origin("shown", "docs", "0"))
        assert sum(map(len, plugins.listing()[0].names.values()))


def test_every_kind_of_use_is_shown():
    shown = "".join(block.values[0] for block in blocks("python"))
    for call in ("StarDSSTrainer(", "attach(", "star_dss_loss(", "score_dataset(", " Trainer("):
        assert call in shown


# YAML and TOML

YAML_TEXTS = [
    *blocks("yaml"),
    *(
        pytest.param(path.read_text(), id=str(path.relative_to(ROOT)))
        for path in sorted((ROOT / "examples").rglob("*.yaml"))
    ),
]


@pytest.mark.parametrize("text", YAML_TEXTS)
def test_yaml_is_valid_configuration(text, tmp_path):
    found = yaml.safe_load(text)
    if "apiVersion" in found:
        command = shlex.split(found["spec"]["entrypoint"])
        check_command("entrypoint", command)
    elif "toy" in found:
        StarDSSOptions(**found["star_dss"]).validate()
    elif "star_dss" in found:
        (plugin,) = found["plugins"]
        source = (ROOT / "integrations" / "star_dss_axolotl" / "args.py").read_text()
        assert f'PLUGIN = "{plugin}"' in source
        StarDSSOptions(**found["star_dss"]).validate()
    elif "model_name_or_path" in found:
        pytest.importorskip("trl")
        from star_dss_trl import sft

        config = tmp_path / "run.yaml"
        config.write_text(text + "\nbf16: false\nuse_cpu: true\n")
        _, args, _, _ = sft.parse(["--config", str(config)])
        assert args.guard == found["guard"]
        assert args.star_dss_active
    else:
        StarDSSOptions(**found).validate()


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_names_our_entry_points(text):
    assert ENTRY_POINT_GROUP in tomllib.loads(text)["project"]["entry-points"]


# Command lines


def commands():
    """Return (page, line, inline) of every command; continued lines are joined."""
    found = []
    for page, text in pages_without_fences():
        lines = re.sub(r" *\\\n *", " ", text)
        for line in re.findall(r"^    (\S.*)$", lines, flags=re.MULTILINE):
            found.append((str(page), line, False))
        for code in re.findall(r"`(star-dss [^`]+)`", text):
            found.append((str(page), " ".join(code.split()), True))
    for block in blocks("bash"):
        for line in re.sub(r" *\\\n *", " ", block.values[0]).splitlines():
            found.append((str(block.id), line, False))
    return found


def words_of(line: str) -> list[str]:
    """Return the words of a command line."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a drawing or a sentence
        return []


STAR_DSS_COMMANDS = [
    (page, line, inline) for page, line, inline in commands() if "star-dss" in words_of(line)
]


def check_command(where: str, words: list[str], *, partial: bool = False) -> None:
    """Parse `star-dss …` with the command's own parser, without running it."""
    words = words[words.index("star-dss") + 1 :]
    command, path = get_command(cli.app), ["star-dss"]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{where}: no command {' '.join(path)} {words[0]}"
        path.append(words.pop(0))
        command = command.commands[path[-1]]
    if "…" in words:
        # An ellipsis is dropped unless it is the value of an option.
        kept = [w != "…" or before.startswith("-") for before, w in zip(["", *words], words)]
        words = list(itertools.compress(words, kept))
        partial = True
    if path[-1] == "sft":
        return
    try:
        if partial:
            context = command.make_context(path[-1], [], resilient_parsing=True)
            context.resilient_parsing = False  # it was needed for missing arguments only
            # In prose an option may lack its value: any value is added.
            command.make_parser(context).parse_args([*words, "1"])
        else:
            command.make_context(path[-1], list(words))
    except Exception as error:
        pytest.fail(f"{where}: star-dss {' '.join(path[1:])}: {error}")


@pytest.mark.parametrize(("page", "line", "inline"), STAR_DSS_COMMANDS)
def test_commands_are_parsed(page, line, inline):
    if "COMMAND" not in line:
        check_command(f"{page}: {line}", words_of(line), partial=inline)


@pytest.mark.parametrize(
    "line", ["star-dss scor x", "star-dss score x --gard y …", "star-dss report"]
)
def test_a_wrong_command_line_is_detected(line):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command("here", line.split())


def test_the_flags_of_sft_are_parsed(tmp_path):
    pytest.importorskip("trl")
    from star_dss_trl import sft

    config = tmp_path / "run.yaml"
    config.write_text((ROOT / "examples" / "sft.yaml").read_text() + "bf16: false\nuse_cpu: true\n")
    shown = [
        words_of(line)
        for _, line, inline in STAR_DSS_COMMANDS
        if "star-dss sft" in line and not inline
    ]
    assert shown
    for words in shown:
        words = words[words.index("sft") + 1 :]
        words[words.index("--config") + 1] = str(config)
        sft.parse(words)


def test_extras_targets_scripts_and_sessions_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    makefile = (ROOT / "Makefile").read_text()
    seen = set()
    for page, text in pages_without_fences():
        for extras in re.findall(r"star-dss-plugin\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), page
            seen.add("extra")
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", text, flags=re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page}: make {target}"
            seen.add("make")
        for script in re.findall(r"python ((?:benchmarks|scripts|examples)/\S+?\.py)", text):
            assert (ROOT / script).is_file(), f"{page}: {script}"
            seen.add("script")
        for module in re.findall(r"launch (?:--\S+ \d+ )?-m ([\w.]+)", text):
            path = ROOT / "integrations" / (module.replace(".", "/") + ".py")
            assert path.is_file(), f"{page}: {module}"
            seen.add("module")
        for session in re.findall(r"nox -s ([\w-]+)", text):
            assert f'name="{session}"' in (ROOT / "noxfile.py").read_text(), f"{page}: {session}"
            seen.add("session")
    assert seen == {"extra", "make", "script", "module", "session"}


def test_names_in_the_text_exist():
    """Every `star_dss_plugin.x.y` in prose and in directives can be imported."""
    for page, text in ((p, p.read_text()) for p in PAGES):
        for name in set(re.findall(r"\bstar_dss_plugin(?:\.\w+)+", text)):
            *module, attribute = name.split(".")
            if attribute in ("py", "safetensors"):
                continue
            try:
                importlib.import_module(name)
            except ImportError:
                assert hasattr(importlib.import_module(".".join(module)), attribute), (page, name)
