"""Which engine a guard uses, and engine options that are refused."""

import pytest

from star_dss_plugin import ConfigError, load_guard
from star_dss_plugin.engines import selection

server = pytest.importorskip(
    "star_dss_plugin.engines.server", reason="needs httpx2 (pip install 'star-dss-plugin[server]')"
)


@pytest.mark.parametrize(
    ("engine", "options", "more", "message"),
    [
        ("vlm", None, {}, "Unknown engine 'vlm'. Did you mean 'vllm'"),
        ("local", {"retries": 3}, {}, "'retries', but engine is 'local'"),
        ("http://", None, {}, "URL without a host"),
        ("http://h:99999", None, {}, "URL without a host"),
        ("http://me:hush@h", None, {}, "credentials"),
        ("http://h?key=hush", None, {}, "credentials"),
        ("http://h", {"retry": 1}, {}, "Did you mean 'retries'"),
        ("http://h", {"api_key": "hush"}, {}, "Unknown option of a server engine 'api_key'"),
        ("http://h", {"retries": "hush"}, {}, "retries must be a number of at least 0"),
        ("http://h", {"concurrency": 0}, {}, "concurrency must be a number of at least 1"),
        ("http://h", {"timeout": True}, {}, "timeout must be a number"),
        ("http://h", {"api_key_env": 3}, {}, "api_key_env must be a string"),
        ("http://h", "{bad", {}, "not valid JSON"),
        ("http://h", "3", {}, "engine_options is a int"),
        ("http://h", None, {"device": "cuda"}, "decides by itself where the guard"),
        ("http://h", None, {"dtype": "float16"}, "dtype it was started with"),
        ("vllm", {"dtype": "half", "model": "x"}, {}, "sets dtype, model"),
        ("vllm", {"hf_token": "hush"}, {}, "log in"),
        (3, None, {}, "Unknown engine 3"),
    ],
)
def test_invalid_engine_options_are_refused(engine, options, more, message):
    with pytest.raises(ConfigError, match=message) as error:
        selection.choose_engine(engine, options, **more)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "guard",
    [
        "demo",
        "qwen3guard-stream-0.6b",
        "harmaug",
        {"preset": "demo", "engine": "http://h"},
    ],
)
def test_a_guard_that_computes_by_itself_takes_no_engine(guard):
    given = {} if isinstance(guard, dict) else {"engine": "http://h"}
    with pytest.raises(ConfigError, match="computes by itself and takes no engine") as error:
        load_guard(guard, engine_options={"api_key": "hush"}, **given)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "guard",
    [
        {"preset": "demo", "engine_options": "hush"},
        {"model": "x", "engine_options": "hush"},
        {"preset": "demo", "api_key": "hush"},
    ],
)
def test_options_that_no_guard_takes_are_named_without_their_values(guard):
    with pytest.raises(ConfigError, match=list(guard)[1]) as error:
        load_guard(guard)
    assert "hush" not in str(error.value)


def test_memory_options_do_not_change_the_identity():
    """Cached scores stay valid if a run may use more or less of a device's memory."""
    fewer = {"gpu_memory_utilization": 0.5, "max_model_len": 4096, "quantization": "fp8"}
    found = selection.choose_engine("vllm", fewer).identity("m")
    assert found == selection.choose_engine("vllm", {"quantization": "fp8"}).identity("m")
    assert found != selection.choose_engine("vllm").identity("m")
