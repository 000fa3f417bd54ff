"""The checkpoints of a run of the Trainer: which are complete, and what of them cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from model_worker.errors import InputError, first_line

_UNREADABLE = (OSError, EOFError, UnpicklingError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError)


@contextmanager
def readable(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch says of a damaged or foreign file, which is a page, into an InputError of one line."""
    try:
        yield
    except _UNREADABLE as error:
        raise InputError(f"the checkpoint {checkpoint} cannot be resumed from: {first_line(error)}") from None


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first: those with the state, which the Trainer writes last."""
    found = [path.parent for path in out.glob("checkpoint-*/trainer_state.json") if path.parent.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def last_checkpoint(out: Path) -> Path:
    """Return the checkpoint that a run goes on from. Raises InputError where there is none."""
    if found := checkpoints(out):
        return found[-1]
    raise InputError(f"there is no complete checkpoint in {out} to resume from")


def check_complete(checkpoint: Path) -> None:
    """Raise InputError for a folder that is no checkpoint or has no optimiser: the Trainer would begin a new one."""
    for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).is_file():
            raise InputError(f"{checkpoint} is not a complete checkpoint: it has no {name}")
    with readable(str(checkpoint)):
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def start_of(out: Path, resume: bool) -> Path | None:
    """Return the checkpoint to go on from, None for a new run: nothing of an earlier run is overwritten unasked.

    Raises InputError for a folder that is not empty or, with `resume`, has no checkpoint.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: --out is the folder of the run")
    if resume:
        return last_checkpoint(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give another folder, or --resume")
    return None


def make_run_folder(out: Path) -> None:
    """Make the folder of a run. Raises InputError where it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be the folder of a run: {error.strerror}") from None
