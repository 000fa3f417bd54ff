"""A pretrained model is fetched here from the Hugging Face hub, all files of one commit.

What was fetched before, also in part, is not fetched again: the hub's client goes on where it was.
"""

import shutil
from pathlib import Path

from model_worker.errors import ModelNotFound
from model_worker.pretrained.catalogue import Hub
from model_worker.pretrained.checksums import check_sha256
from model_worker.pretrained.watch import Progress, watched

# Seconds for the hub's first answer.
_FIRST_ANSWER_S = 10.0


def fetch_from_hub(hub: Hub, downloads: Path, progress: Progress) -> tuple[Path, str]:
    """Fetch the files of a repository below `downloads`; return their folder, and the commit.

    Raises ModelNotFound where the hub cannot be reached, ends in the middle, or gives other files than expected.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = str(HfApi().model_info(hub.repository, timeout=_FIRST_ANSWER_S).sha)
        folder = downloads / commit
        with watched(folder, "from the hub, MiB", hub.size, progress):
            snapshot_download(hub.repository, revision=commit, local_dir=folder, allow_patterns=list(hub.files))
    except Exception as error:  # the client fails with errors of its own, of its HTTP library and of the system
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk's
        raise ModelNotFound(f"{hub.repository} cannot be had from the hub: {_reason(error)}") from error
    for name, expected in hub.sha256.items():
        check_sha256(folder / name, expected)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes of what it fetched
    return folder, commit


def _reason(error: Exception) -> str:
    said = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
