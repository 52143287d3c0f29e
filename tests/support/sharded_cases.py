"""Cases that are trained sharded and in one process: trainer options and the keys of `OWN`."""

from __future__ import annotations

OWN = (
    *("plain", "lora", "early", "untied", "context", "differs", "resume"),
    *("rare", "rows", "stream", "files", "vision", "padded", "fixed", "experts", "alone"),
    "optimizer_first",
)
"""Keys of a case that are neither options of a trainer nor of STAR-DSS."""

CASES = {
    "trl": {},
    "trl-lora": {"lora": True},
    "trl-untied": {"untied": True},
    # Nothing but training follows the passes that compute the reference.
    "trl-no-eval": {"eval_strategy": "no"},
    "trl-untied-no-eval": {"untied": True, "eval_strategy": "no"},
    "trl-untied-own-optimizer": {"untied": True, "eval_strategy": "no", "optimizer_first": True},
    "trl-adapter-full": {"lora": True, "kl_estimator": "full", "reference": "adapter"},
    "trl-adapter-k2": {"lora": True, "reference": "adapter"},
    "trl-copy-full": {"kl_estimator": "full", "reference": "copy"},
    "trl-named-full": {"kl_estimator": "full", "reference": "MODEL"},
    "trl-checkpointing": {"gradient_checkpointing": True},
    "trl-context": {"context": 2},
    "trl-packed": {"packing": True, "max_length": 64},
    # Batches of equal length, because gloo exchanges equal shapes only, and of odd length.
    "trl-padded": {"padded": 33},
    "trl-padded-lora": {"padded": 33, "lora": True},
    "trl-padded-checkpointing": {
        "padded": 33,
        "gradient_checkpointing": True,
        "average_tokens_across_devices": False,
    },
    "trl-padded-adapter-full": {
        "padded": 33,
        "lora": True,
        "kl_estimator": "full",
        "reference": "adapter",
    },
    # Batches of two rows with a fixed length, and the load-balancing loss of experts.
    "trl-fixed-experts": {
        "padded": 33,
        "fixed": 48,
        "experts": True,
        "per_device_train_batch_size": 2,
    },
    "trl-padded-rejection": {"padded": 33, "loss_type": "rejection"},
    "trl-padded-packed": {"padded": 33, "packing": True, "max_length": 64},
    # Without the exchange of parts in evaluations.
    "trl-padded-alone": {"padded": 33, "alone": True},
    "trl-padded-skipping": {"padded": 33, "resume": True},
    # Stopped after one epoch.
    "trl-padded-resumed": {
        "padded": 33,
        "resume": True,
        "ignore_data_skip": True,
        "train_sampling_strategy": "sequential",
    },
    # An epoch of six rows is not a whole number of steps.
    "trl-padded-stream": {
        "padded": 33,
        "kl_estimator": "full",
        "reference": "MODEL",
        "stream": 1,
        "rows": 6,
    },
    # Two files with different numbers of rows.
    "trl-padded-uneven": {
        "padded": 33,
        "lora": True,
        "reference": "adapter",
        "stream": 2,
        "files": [4, 3],
    },
    "plain-padded": {"padded": 33, "plain": True},
    "plain-padded-adapter-full": {
        "padded": 33,
        "plain": True,
        "lora": True,
        "kl_estimator": "full",
        "reference": "adapter",
    },
    "plain": {"plain": True},
    "plain-lora": {"plain": True, "lora": True},
    "plain-copy-full": {"plain": True, "kl_estimator": "full", "reference": "copy"},
    "plain-named-full": {"plain": True, "kl_estimator": "full", "reference": "MODEL"},
    # ZeRO-3 partitions a model as it loads only if it is loaded after the arguments were made.
    "plain-early": {"plain": True, "early": True},
    "plain-untied": {"plain": True, "untied": True},
    "trl-untied-lora": {"untied": True, "lora": True},
    "trl-untied-named": {"untied": True, "kl_estimator": "full", "reference": "MODEL"},
    "trl-untied-copy": {"untied": True, "kl_estimator": "full", "reference": "copy"},
    "trl-untied-stream": {"untied": True, "reference": "MODEL", "stream": 1},
    "plain-adapter-full": {
        "plain": True,
        "lora": True,
        "kl_estimator": "full",
        "reference": "adapter",
    },
    "plain-adapter-k2": {"plain": True, "lora": True, "reference": "adapter"},
    # Half of the micro-batches have no token with a KL weight, and not on the same ranks.
    "plain-adapter-rare": {"plain": True, "lora": True, "reference": "adapter", "rare": True},
    "trl-adapter-rare": {"lora": True, "reference": "adapter", "rare": True},
    # Batches of one row: half of them have no image, and the ranks' numbers of images differ.
    "trl-images": {"vision": "gemma3"},
    "trl-images-adapter": {
        "vision": "gemma3",
        "lora": "all-linear",
        "kl_estimator": "full",
        "reference": "adapter",
    },
    "trl-images-tiles": {"vision": "smolvlm", "lora": "all-linear", "reference": "adapter"},
    "trl-images-named": {"vision": "smolvlm", "reference": "MODEL"},
    "trl-images-whole": {"vision": "gemma3", "kl_estimator": "full", "reference": "MODEL"},
    # One process trains on a data set of the same rows, in the order in which two read the stream.
    "trl-stream": {"lora": True, "reference": "adapter", "stream": 1},
    "trl-stream-shards": {"lora": True, "reference": "adapter", "stream": 2},
    # The second process has one row less in each epoch, and in the evaluation.
    "trl-stream-uneven": {"lora": True, "reference": "adapter", "stream": 2, "files": [4, 3]},
    "plain-stream-uneven": {"plain": True, "reference": "MODEL", "stream": 2, "files": [4, 3]},
    # The ranks stop in the middle of different epochs.
    "trl-stream-resumed": {
        "lora": True,
        "reference": "adapter",
        "stream": 2,
        "files": [6, 3],
        "resume": True,
    },
    "trl-stream-empty": {"lora": True, "reference": "adapter", "stream": 2, "files": [8, 0]},
    "plain-stream": {"plain": True, "reference": "MODEL", "stream": 1},
    "trl-other-stream": {"lora": True, "reference": "adapter", "stream": 1, "differs": "rows"},
    # The key says how the second rank differs from the first.
    "trl-other-option": {"differs": "chunk_size"},
    "trl-other-rows": {"differs": "rows"},
    "trl-other-scores": {"differs": "scores"},
    "trl-other-guard": {"differs": "guard"},
    "trl-other-evaluation": {"differs": "evaluation"},
    "trl-scored-there": {"differs": "scored"},
    "trl-killed": {"differs": "killed"},
    "plain-other-model": {"plain": True, "differs": "model"},
    "plain-other-adapter": {"plain": True, "lora": True, "differs": "seed"},
    "trl-resumed": {"resume": True},
    "plain-resumed": {"plain": True, "resume": True},
}
