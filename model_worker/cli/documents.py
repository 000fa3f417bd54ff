"""Documents are read by a model into a bank with K-V here, for `kvbank remember --model`."""

from collections.abc import Mapping
from pathlib import Path

import kvbank
from model_worker.attachment.loading import device_named
from model_worker.attachment.model_names import lasting
from model_worker.cli.new_embedder import new_embedder
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.targets import embedder_of_banks
from model_worker.embed.spec import lasting_spec
from model_worker.errors import InputError
from model_worker.model import MemoryModel, Progress
from model_worker.remember.known import known_of
from model_worker.remember.memory import Memory
from model_worker.window.chunking import chunks

# Chunks that one request may name.
_MOST_IDS = 1000


class ModelDocuments:
    """Reads documents with one model into one bank, which is made if it is not there.

    model, loading: the name of the model, and its device, dtype and adapter by the names of `load_model`. embed: how
    the bank is searched; None: as the bank says, and as new conversations are for a new one. compressor, layers: as in
    `kvbank chat`. Raises BankMismatch for a bank of another model or embedder, and what loading a model raises.
    """

    def __init__(
        self,
        client: kvbank.Client,
        bank: str,
        model: str,
        *,
        embed: str | None = None,
        compressor: str = "none",
        layers: Path | None = None,
        loading: Mapping[str, str | None],
    ) -> None:
        quiet_libraries()
        spec = lasting_spec(embed or _about(client, bank) or new_embedder())
        self._client, self._bank = client, bank
        self._model = MemoryModel.from_pretrained(
            lasting(model),
            memory=client,
            bank=(),
            device=device_named(loading.get("device") or "auto"),
            dtype=loading.get("dtype"),
            adapter=loading.get("adapter"),
            embed=spec,
            compressor=compressor,
            strict=True,
            attach_options=None if layers is None else {"layers": layers},
        )
        self._memory = Memory(self._model.attachment, client, bank, self._model.tokenizer, self._model.settings)
        self._memory.open(metadata={"embedder": spec})

    def add(self, text: str, source: str, keep: bool, progress: Progress) -> tuple[int, int, int]:
        """Read a document under a name, from the first token on that the bank does not have of it.

        Returns how many chunks were written, how many were known, and how many of an earlier state were removed. These
        go before the rest is read, since it is read anew; keep: they stay. progress: called with (tokens done, all).
        Raises InvalidArgument for a text that has no tokens, or one that the model does not know.
        """
        model, before = self._model, self._memory.stats.written
        try:
            ids = model.ids(text)
        except InputError as error:
            raise kvbank.InvalidArgument(f"{source}: the model cannot read it: {error}") from error
        wanted = list(chunks(ids, model.chunk, model.ends))
        known = known_of(self._client, self._bank, source, wanted)
        removed = 0
        if not keep:
            for begin in range(0, len(known.others), _MOST_IDS):
                removed += self._client.delete_chunks(self._bank, known.others[begin : begin + _MOST_IDS])
        if known.tokens < len(ids):
            model.read(ids, progress, memory=self._memory, source=source, begin=known.tokens)
        written = self._memory.stats.written - before
        return written, len(wanted) - written, removed

    def close(self) -> None:
        """Let the model go."""
        self._model.close()


def _about(client: kvbank.Client, bank: str) -> str | None:
    """Return the embedder that a bank is searched by; None where it does not say, or is not there."""
    try:
        return embedder_of_banks(client, [bank])
    except kvbank.BankNotFound:
        return None
