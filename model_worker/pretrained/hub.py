"""A pretrained model is fetched here from the Hugging Face hub, all files of one commit.

What was fetched before, also in part, is not fetched again: the hub's client goes on where it was. Where the connection
ends in the middle, that client may return a folder that is not whole: so every file is compared with what the hub says
of it, its size and, for large files, its SHA-256.
"""

import shutil
from pathlib import Path
from typing import Any

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
        # Public repositories: a token of the user's is not sent.
        info = HfApi(token=False).model_info(hub.repository, files_metadata=True, timeout=_FIRST_ANSWER_S)
        files = [each for each in info.siblings or () if each.rfilename in hub.files]
        folder, names = downloads / str(info.sha), [each.rfilename for each in files]
        with watched(folder, f"{hub.repository}, MiB", sum(each.size or 0 for each in files), progress):
            snapshot_download(hub.repository, revision=info.sha, local_dir=folder, allow_patterns=names, token=False)
    except Exception as error:  # the client fails with errors of its own, of its HTTP library and of the system
        if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
            raise  # the disk's
        raise ModelNotFound(f"{hub.repository} cannot be had from the hub: {_reason(error)}") from error
    for each in files:
        try:
            _check(folder / each.rfilename, each, hub)
        except ModelNotFound:
            (folder / each.rfilename).unlink(missing_ok=True)  # else it would be found again
            raise
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes of what it fetched
    return folder, str(info.sha)


def _check(path: Path, said: Any, hub: Hub) -> None:
    """Compare a file with what the hub says of it, and with what the catalogue knows of it. Raises ModelNotFound."""
    if not path.is_file() or path.stat().st_size != said.size:
        raise ModelNotFound(f"{hub.repository} cannot be had from the hub: {said.rfilename} is not whole; try again")
    for expected in (said.lfs.sha256 if said.lfs else None, hub.sha256.get(said.rfilename)):
        if expected is not None:
            check_sha256(path, expected)


def _reason(error: Exception) -> str:
    said = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
