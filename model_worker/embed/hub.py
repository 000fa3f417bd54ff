"""The folder of an encoder by the encoder's name: a folder here, or the hub's files of it in the hub's cache."""

from pathlib import Path

from model_worker.attachment.model_names import meant, model_folder
from model_worker.errors import ModelNotFound, first_line

# What an encoder is loaded from. Weights of other formats, which a repository may hold beside these, are not fetched.
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_OTHERS = ["onnx/*", "openvino/*"]


def encoder_folder(name: str) -> Path:
    """Return the folder of an encoder: of a pretrained one by name, a path, or what the hub or its cache has of an id.

    Raises ModelNotFound for a folder that is not there, and for a name that the hub cannot serve; InputError for the
    name or folder of a language model.
    """
    return model_folder(name, "encoder") or _fetched(name)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_OTHERS))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_FILES, "*.bin"], ignore_patterns=_OTHERS))
    except Exception as error:  # of the hub's client, its connection and its cache
        raise ModelNotFound(
            f"there is no encoder's folder {name!r} here, and it cannot be had from the hub: "
            f"{type(error).__name__}: {first_line(error)}{meant(name)}"
        ) from error
    return folder
