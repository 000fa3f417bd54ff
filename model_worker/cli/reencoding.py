"""What `kvbank reencode` does once a model is to be loaded."""

import kvbank
from kvbank.copying import Progress, renew
from kvbank.wire.scalars import Scalar
from model_worker.attachment.loading import device_named
from model_worker.attachment.model_names import lasting
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.reencode_options import ReencodeOptions
from model_worker.embed import embedder
from model_worker.embed.spec import lasting_spec
from model_worker.model import MemoryModel
from model_worker.remember.reencoding import Reencoding


def reencoded(client: kvbank.Client, name: str, options: ReencodeOptions, progress: Progress) -> kvbank.Bank:
    """Give the bank of a name the K-V of a model, and return the bank; one that has them is returned as it is.

    Raises what loading a model raises, kvbank.FailedPrecondition for a bank with a chunk without text, and
    kvbank.AlreadyExists where another model is under way.
    """
    quiet_libraries()
    seen = client.get_bank(name)
    about: dict[str, Scalar] = {} if options.embed is None else {"embedder": lasting_spec(options.embed)}
    made = kvbank.TextMemory(client, name).embedder() if options.embed is None else embedder(options.embed)
    with MemoryModel.from_pretrained(
        lasting(options.model),
        memory=client,
        bank=(),
        device=device_named(options.device),
        dtype=options.dtype,
        adapter=options.adapter,
        embedder=made,
        compressor=options.compressor,
        attach_options=None if options.layers is None else {"layers": options.layers},
    ) as model:
        local = model.window, model.sinks
        parts = model.attachment, model.tokenizer, model.settings
        renewal = Reencoding(client, seen, *parts, local=local, about=about)
        return seen if renewal.is_done() else renew(client, seen, renewal, progress)
