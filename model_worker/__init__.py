"""Model workers: attach a memory to a language model, compress what it reads, write it, recall it.

from model_worker import MemoryModel

with MemoryModel.from_pretrained("kvbank-small", memory="./memory", bank="notes") as model:
    model.read(open("long.txt").read())
    print(model.generate("The number of Torvel Makin is", max_new_tokens=8))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_worker.attachment.attachment import Attachment, attach
    from model_worker.model import Losses, MemoryModel
    from model_worker.remember.memory import Memory
    from model_worker.window.cache import MemoryCache
    from model_worker.window.local import TovaRule

__all__ = ["Attachment", "Losses", "Memory", "MemoryCache", "MemoryModel", "TovaRule", "attach"]

_HOME = {
    "Attachment": "attachment.attachment",
    "attach": "attachment.attachment",
    "Losses": "model",
    "Memory": "remember.memory",
    "MemoryCache": "window.cache",
    "MemoryModel": "model",
    "TovaRule": "window.local",
}


def __getattr__(name: str) -> Any:
    """Importing the package stays cheap: torch and transformers come with the first name that needs them."""
    if name in _HOME:
        return getattr(import_module(f"model_worker.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
