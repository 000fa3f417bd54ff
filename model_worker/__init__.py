"""Attach a memory to a language model, compress what the model reads, write that to a bank, and recall it.

from model_worker import MemoryModel

with MemoryModel.from_pretrained("kvbank-small", memory="./memory", bank="notes") as model:
    model.read(open("long.txt").read())
    print(model.generate("The number of Torvel Makin is", max_new_tokens=8))

Names load at first use, torch and transformers with them; the file `__init__.pyi` lists the names.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
