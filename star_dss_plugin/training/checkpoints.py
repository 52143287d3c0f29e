"""Whether a trainer's checkpoint was written to its end, asked before it is resumed from.

transformers writes a checkpoint file by file into its final place, `trainer_state.json` last. A run
that is killed, or out of disk space, while it saves leaves a folder that looks like the others; the
trainer then fails with the first file it misses, or goes on with a new optimizer and says nothing.
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
"""What the trainer writes with `torch.save`: zip archives, whose end says what is in them."""


def check_checkpoint(asked: str | os.PathLike[str] | bool, output_dir: str) -> None:
    """Refuse to resume from anything but a complete checkpoint.

    Reads headers and small files only: what is missing or cut off is found, a flipped bit is not.

    Args:
        asked: What `Trainer.train` got as `resume_from_checkpoint`; True: the last one.
        output_dir: Of the run.

    Raises:
        CheckpointError: Which checkpoint, what it lacks, and from which one to resume.
    """
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
            f"({lacking}). A run that is killed, or out of disk space, while it saves leaves this. "
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
    """Return which part of a checkpoint is missing or cut off; None if it is complete."""
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
    """Return a missing file that the other files require."""
    if _STATE not in names:
        return _STATE
    # DeepSpeed, FSDP and several adapters have folders of their own, which the trainer judges.
    if any(path.is_dir() for path in folder.iterdir()):
        return None
    if not any(name.endswith(_WEIGHTS) and not name.startswith(_NO_WEIGHTS) for name in names):
        return "every file of weights"
    # With save_only_model none of these is there. Where some are, transformers would start the
    # others anew, and another run comes out.
    together = {
        "optimizer.pt": any(name.endswith(("optimizer.pt", "optimizer.bin")) for name in names),
        "scheduler.pt": "scheduler.pt" in names,
        "rng_state.pth": any(name.startswith("rng_state") for name in names),
    }
    lost = [name for name, there in together.items() if not there]
    return lost[0] if lost and len(lost) < len(together) else None


def _readable(path: Path) -> bool:
    """Whether a file reaches to its end, as far as its format says where that is."""
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
