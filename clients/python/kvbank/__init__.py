"""The SDK of kvbank, a memory that language models attend to.

    with kvbank.connect("host:7400") as client:      # or a folder: "./memory"
        client.create_bank("notes", kv=None, embedding=kvbank.EmbeddingSpec("my-embedder", 384))

Names load at first use, so that the generated stubs (`kvbank.v1`) and the command line do not pay for gRPC and numpy.
The file `__init__.pyi` lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
