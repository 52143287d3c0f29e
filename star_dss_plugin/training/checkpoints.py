"""Check before a run resumes that a trainer's checkpoint was written completely.

transformers writes a checkpoint's files one by one into its final folder, `trainer_state.json`
last. A run that is killed or out of disk space while it saves leaves an incomplete folder. Resuming
from it fails at the first missing file, or silently starts with a new optimizer.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from star_dss_plugin.errors import CheckpointError

__all__ = ["check_checkpoint"]

_STATE = "trainer_state.json"
_JSON = (_STATE, "config.json", "adapter_config.json")
_INDEX = ".index.json"
_WEIGHTS = (".safetensors", ".bin")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler")
_ZIPPED = (
    "pytorch_model",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.",
    "scheduler.pt",
    "scaler.pt",
    "rng_state",
)
"""Files of `torch.save`: zip archives, whose directory is at their end."""


def check_checkpoint(
    resume_from_checkpoint: str | os.PathLike[str] | bool, output_dir: str
) -> None:
    """Check that the checkpoint to resume from is complete.

    Reads headers and small files only: it finds missing and truncated files, not flipped bits.

    Args:
        resume_from_checkpoint: The argument of `Trainer.train`; True: the last checkpoint.
        output_dir: The run's output folder.

    Raises:
        CheckpointError: A file is missing or truncated. The message names the newest complete
            checkpoint.
    """
    asked = resume_from_checkpoint
    folder = _last(output_dir) if isinstance(asked, bool) else Path(asked)
    if not folder.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint is {str(asked)!r}, which is no folder. "
            + _advice(_newest_whole(Path(output_dir)))
        )
    if lacking := _lacking(folder):
        others = _newest_whole(folder.parent, without=folder)
        raise CheckpointError(
            f"Training cannot resume from the checkpoint {folder}: it was not written to its end "
            f"({lacking}). A run that is killed or out of disk space while it saves leaves this. "
            f"Remove that folder. {_advice(others)}"
        )


def _last(output_dir: str) -> Path:
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if last is None:
        raise CheckpointError(
            f"resume_from_checkpoint is on, but {output_dir} holds no checkpoint. Leave it out to "
            "start from the beginning, or name the folder of a checkpoint."
        )
    return Path(last)


def _advice(whole: Path | None) -> str:
    if whole is None:
        return (
            "There is no whole checkpoint beside it, so start without resume_from_checkpoint; "
            "scores and reference log-probabilities are still in the cache."
        )
    return f"The newest whole checkpoint is {whole}: resume from that one."


def _newest_whole(output_dir: Path, without: Path | None = None) -> Path | None:
    """Return the complete checkpoint with the highest step."""
    found = {}
    for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir() and path != without:
            found[int(step)] = path
    newest_first = (found[step] for step in sorted(found, reverse=True))
    return next((path for path in newest_first if _lacking(path) is None), None)


def _lacking(folder: Path) -> str | None:
    """Return what a checkpoint lacks, for messages; None if it is complete."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if missing := _missing(folder, names):
        return f"{missing} is missing"
    for name in sorted(names):
        if not _readable(folder / name):
            return f"{name} cannot be read to its end"
    for name in sorted(names):
        if name.endswith(_INDEX):
            parts = set(json.loads((folder / name).read_bytes()).get("weight_map", {}).values())
            if lost := sorted(parts - names):
                return f"{lost[0]} is missing"
    return None


def _missing(folder: Path, names: set[str]) -> str | None:
    """Return the name of a required file that is missing; None if none is."""
    if _STATE not in names:
        return _STATE
    # DeepSpeed, FSDP and several adapters write subfolders, which the trainer itself checks.
    if any(path.is_dir() for path in folder.iterdir()):
        return None
    if not any(name.endswith(_WEIGHTS) and not name.startswith(_NO_WEIGHTS) for name in names):
        return "every file of weights"
    # save_only_model writes none of these. If only some are missing, transformers would initialize
    # them anew, and the run would differ.
    together = {
        "optimizer.pt": any(name.endswith(("optimizer.pt", "optimizer.bin")) for name in names),
        "scheduler.pt": "scheduler.pt" in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    lost = [name for name, there in together.items() if not there]
    return lost[0] if lost and len(lost) < len(together) else None


def _readable(path: Path) -> bool:
    """Return whether a file is complete, as far as its format tells."""
    if path.name in _JSON or path.name.endswith(_INDEX):
        try:
            return isinstance(json.loads(path.read_bytes()), dict)
        except (ValueError, RecursionError):
            return False
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return True
        except SafetensorError:
            return False
    return not path.name.startswith(_ZIPPED) or zipfile.is_zipfile(path)
