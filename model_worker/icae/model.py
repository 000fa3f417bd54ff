"""The in-context autoencoder, ICAE (Ge et al., arXiv 2307.06945), over any causal LM that a memory attaches to.

Encoder: the base with LoRA, read over a span of text with k trained memory rows behind it. Decoder: the base as it is,
which reads what the encoder left as if it were tokens. Both are twins of the caller's model over the same tensors (see
twin.py); that model is never changed. No id is added to the vocabulary: rows are concatenated as embeddings.

Deviations from the authors' code: BOS and EOS are the model's; batches with masks and positions; rows begin with the
spread of the base's embeddings (their standard normal is `memory_init="normal"`). Variants, named as such: the
encoder's K-V instead of its last hidden states (`interface="kv"`) and spread positions (`positions="spread"`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.digest import reader_of
from model_worker.attachment.model_parts import decoder_of, embeddings_of
from model_worker.errors import InputError
from model_worker.icae import folder as files
from model_worker.icae import lora
from model_worker.icae.base import dtype_of, first_rows, name_of, positions_of, table_of, token_of, twins_of
from model_worker.icae.capture import KVView
from model_worker.icae.config import IcaeConfig
from model_worker.icae.slots import Slots, spans, spread

ROWS = ("ae", "lm", "ft")  # after the k memory rows, in this order


class Icae(nn.Module):
    """An adapter on its base, made by `create` or `from_pretrained`; only LoRA and `memory` are trainable, in float32.

    encoder: the peft model. decoder: the frozen base. memory: `[k + 3, d]`, the k memory rows, then AE, LM and FT.
    """

    def __init__(self, base: nn.Module, encoder: Any, decoder: Any, config: IcaeConfig, memory: Tensor):
        super().__init__()
        self.encoder, self.decoder, self.config = encoder, decoder, config
        self.memory = nn.Parameter(memory)
        self.__dict__["_base"] = base  # not a part: `.to()` and `.train()` leave it alone
        self._checkpointing = False
        self._digest: tuple[object, str] | None = None
        self.eval()

    # -- made and kept --------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        base: nn.Module,
        config: IcaeConfig,
        *,
        rank: int,
        alpha: float = 32,
        dropout: float = 0.05,
        targets: Sequence[str] | str = ("q_proj", "v_proj"),
        seed: int = 0,
    ) -> "Icae":
        """Make an untrained adapter for `base`. The same seed gives the same one.

        targets: names of linear modules, or peft's `all-linear`. Raises InputError without peft, for a base that has an
        adapter already, for targets that are not there, for spans beyond the base's positions, and for an alpha or
        dropout that is none.
        """
        config.check_fits(positions_of(base))
        config.check_ids(len(table_of(base)))
        lora.check_scale(alpha, dropout)
        with files.using_peft() as peft:
            inner, decoder = twins_of(base)
            settings = peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
                bias="none",
                task_type="CAUSAL_LM",
            )
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                try:
                    encoder = peft.get_peft_model(inner, settings)
                except (ValueError, re.error) as error:
                    raise InputError(f"LoRA cannot be put on this model: {error}") from None
        rows = first_rows(decoder, config, seed)
        config = replace(config, base=config.base or name_of(base), base_digest=reader_of(base).digest)
        return cls(base, encoder, decoder, config, rows)

    @classmethod
    def from_pretrained(
        cls, base: nn.Module, name: str | Path, *, trainable: bool = False, revision: str | None = None
    ) -> "Icae":
        """Load the adapter in a folder or under a hub id onto `base`. trainable: for further training.

        Raises ModelNotFound without such a folder, InputError without peft, for a base other than its own (rounded to
        another dtype it is another), for spans beyond the base's positions, and for files that are damaged or do not
        belong together.
        """
        with files.using_peft() as peft:
            found = files.find(name, revision)
            config, rows, digest = files.read(found)
            own = reader_of(base).digest
            if config.base_digest and config.base_digest != own:
                raise InputError(
                    f"the ICAE adapter {name} was trained for another base ({config.base or 'unnamed'}, digest "
                    f"{config.base_digest}; this model is {own}): its slots mean nothing here. The same model in "
                    f"another dtype is another base: load it in the dtype of the training (now {dtype_of(base)})"
                )
            config.check_fits(positions_of(base))
            vocabulary, width = table_of(base).shape
            if rows.shape[1] != width:
                raise InputError(f"the ICAE adapter {name} is {rows.shape[1]} wide, this model {width}")
            config.check_ids(vocabulary)
            inner, decoder = twins_of(base)
            encoder = lora.load(peft, inner, found, trainable=trainable)
        icae = cls(base, encoder, decoder, config, rows.to(decoder.device))
        icae.memory.requires_grad_(trainable)
        if digest and digest != icae.digest:
            raise InputError(
                f"the files of the ICAE adapter {name} do not belong together, or one is damaged: its digest is "
                f"{icae.digest}, icae_config.json says {digest}"
            )
        return icae

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and peft its part of; folder.py says what a kill leaves."""

        def adapter(staged: Path) -> None:
            with files.using_peft():
                for own in self.encoder.peft_config.values():
                    own.base_model_name_or_path = self.config.base or None
                self.encoder.save_pretrained(str(staged), save_embedding_layers=False)
            (staged / "README.md").unlink(missing_ok=True)  # an empty form; the folder may have a card
            said = json.loads((staged / files.ADAPTER_CONFIG).read_text())
            said["target_modules"] = _sorted(said["target_modules"])  # a set: in another order in each process
            (staged / files.ADAPTER_CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")

        files.write(Path(folder), self.config, self.memory, adapter, digest=self.digest)

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Any:
        """Return the model that the adapter was made for, which is never changed."""
        return self.__dict__["_base"]

    @property
    def device(self) -> torch.device:
        """Return where the memory rows are, and with them the base."""
        return self.memory.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the base; LoRA and rows are float32."""
        dtype: torch.dtype = self.decoder.dtype
        return dtype

    @property
    def limit(self) -> int | None:
        """Return the positions that the base was made for; None where it does not say."""
        return positions_of(self.decoder)

    @property
    def bos(self) -> int | None:
        """Return the id that begins a text in the base, where it has one."""
        return token_of(self.decoder, "bos_token_id")

    @property
    def eos(self) -> int | None:
        """Return the id that ends a text in the base, the first where it has several."""
        return token_of(self.decoder, "eos_token_id")

    @property
    def stops(self) -> frozenset[int]:
        """Return all ids that end a text in the base."""
        said = getattr(self.decoder.config, "eos_token_id", None)
        return frozenset([] if said is None else [said] if isinstance(said, int) else said)

    @property
    def digest(self) -> str:
        """Return the xxh3 of adapter, rows and configuration, by value: it tells by which adapter slots were made.

        The name of the base does not count.
        """
        with files.using_peft() as peft:
            tensors = {**peft.get_peft_model_state_dict(self.encoder, save_embedding_layers=False), "rows": self.memory}
        about = self._about()
        if any(parameter.requires_grad for parameter in self.parameters()):
            return _digest(about, tensors)  # not remembered: fused optimisers move weights without a new version
        state = about, tuple((name, t.data_ptr(), t._version) for name, t in sorted(tensors.items()))
        if self._digest is None or self._digest[0] != state:
            self._digest = state, _digest(about, tensors)
        return self._digest[1]

    def _about(self) -> str:
        """Return as a text what makes slots beside the tensors."""
        layers = [module for module in self.encoder.modules() if _is_lora(module)]
        scaling = [sorted(getattr(layer, "scaling", {}).items()) for layer in layers]
        off = any(getattr(layer, "disable_adapters", False) for layer in layers)
        return f"{replace(self.config, base='').to_json()}{scaling}{'off' if off else ''}"

    @cached_property
    def reader(self) -> Attachment:
        """Attach the decoder, which makes its rotations and layouts known.

        It costs a digest of the weights, so it is done once, and only where K-V are wanted.
        """
        return attach(self.decoder, mode="per_layer", positions="continual")

    @cached_property
    def writer(self) -> Attachment:
        """Attach the encoder, as `reader` does the decoder."""
        return attach(self.encoder, mode="per_layer", positions="continual")

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "Icae":
        """Set the mode of the encoder; the decoder has no dropout, and is in train mode only to be checkpointed."""
        super().train(mode)
        self.decoder.train(mode and self._checkpointing)
        return self

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers of encoder and decoder in the backward pass, while training; as transformers' Trainer asks.

        Raises InputError for reentrant checkpointing of the interface `kv`, which would lose its gradients.
        """
        chosen = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if chosen["use_reentrant"] and self.config.interface == "kv":
            raise InputError("reentrant checkpointing loses the gradients of K-V; leave use_reentrant=False")
        for part in (self.encoder.get_base_model(), self.decoder):
            part.activation_checkpointing_enable(chosen, every_n_layers=every_n_layers, offload=offload)
        self._checkpointing = True
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again."""
        for part in (self.encoder.get_base_model(), self.decoder):
            part.activation_checkpointing_disable()
        self._checkpointing = False
        self.train(self.training)

    gradient_checkpointing_enable = activation_checkpointing_enable  # as transformers called it before 5.23
    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_activation_checkpointing(self) -> bool:
        """Tell whether layers are recomputed; the Trainer asks."""
        return self._checkpointing

    # -- what it computes -----------------------------------------------------------------------------------------

    def row(self, name: str) -> Tensor:
        """Return the trained row `ae`, `lm` or `ft`, `[d]`, in the base's dtype."""
        return self.memory[self.config.slots + ROWS.index(name)].to(self.dtype)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Return the input embeddings `[n, d]` of token ids. Raises InputError for ids that the base does not have."""
        given = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        table = embeddings_of(self.decoder)
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < table.num_embeddings:
            raise InputError(f"token ids must be in [0, {table.num_embeddings})")
        rows: Tensor = table(given)
        return rows

    def spans(self, tokens: int) -> list[slice]:
        """Cut a context of so many tokens into equal spans (see slots.py)."""
        return spans(tokens, self.config.capacity)

    def encode(self, rows: Sequence[Sequence[int]], *, batch: int = 32) -> list[Slots]:
        """Encode each context into slots: each span alone, `batch` spans a forward, padded. Differentiable."""
        cuts = [[row[cut] for cut in self.spans(len(row))] for row in rows]
        if not cuts:
            return []
        every = [span for row in cuts for span in row]
        parts = [self._forward(every[at : at + batch]) for at in range(0, len(every), batch)]
        soft = torch.cat([slots for slots, _ in parts])
        layers = {layer: _joined([kv[layer] for _, kv in parts]) for layer in parts[0][1]}
        found, at = [], 0
        for row in cuts:
            here, lengths = slice(at, at + len(row)), tuple(len(span) for span in row)
            at, positions = here.stop, self.positions(lengths)
            if self.config.interface == "soft":
                found.append(Slots(soft[here].flatten(0, 1), None, lengths, positions))
            else:
                own = {x: (_in_order(keys[here]), _in_order(values[here])) for x, (keys, values) in layers.items()}
                found.append(Slots(None, own, lengths, positions))
        return found

    def positions(self, lengths: Sequence[int]) -> Tensor:
        """Return where the decoder places the slots of spans of these lengths, `[S*k]`.

        Slots that are read as embeddings stand as tokens do, whatever positions the encoder used.
        """
        slots = self.config.slots
        if self.config.interface == "soft" or self.config.positions == "contiguous":
            return torch.arange(slots * len(lengths), device=self.device)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        at = [start + offset for start, n in zip(starts, lengths, strict=True) for offset in spread(n, slots)]
        return torch.tensor(at, device=self.device)

    def _forward(self, batch: list[Sequence[int]]) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Run the encoder over spans, padded on the left, and return the last hidden states `[spans, k, d]`.

        With the interface `kv` the K-V of each layer, `[spans, Hkv, k, D]`, are returned too.
        """
        slots, longest = self.config.slots, max(len(span) for span in batch)
        pads = [longest - len(span) for span in batch]
        ids = torch.tensor([[0] * pad + list(span) for pad, span in zip(pads, batch, strict=True)])
        rows = self.memory[:slots].to(self.dtype).expand(len(batch), -1, -1)
        embeds = torch.cat([self.embed(ids), rows], dim=1)
        # Always a mask: without one, transformers takes a jump in the positions for the start of another text.
        places = torch.arange(longest + slots, device=self.device)
        mask = (places >= torch.tensor(pads, device=self.device)[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if self.config.positions == "spread":
            at = torch.tensor([spread(len(span), slots) for span in batch], device=self.device)
            positions = torch.cat([positions[:, :longest], at], dim=1)
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        if self.config.interface == "soft":
            return decoder_of(self.encoder)(**given).last_hidden_state[:, -slots:], {}
        writer, view = self.writer, KVView()
        hidden = decoder_of(self.encoder)(**given, kvbank=view).last_hidden_state[:, -slots:]
        return hidden, view.taken(writer, range(len(writer.reports)), positions, slots)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join keys and values of several forwards as those of one."""
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


def _in_order(spans_: Tensor) -> Tensor:
    """Put K-V of spans, `[S, Hkv, k, D]`, one behind the other: `[Hkv, S*k, D]`."""
    return spans_.transpose(0, 1).flatten(1, 2)


def _digest(about: str, tensors: dict[str, Tensor]) -> str:
    """Return the xxh3 of a text and of tensors as float32, by name."""
    made = xxhash.xxh3_128(about.encode())
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name}{tuple(tensor.shape)}".encode())
        made.update(tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy().data)
    return made.hexdigest()


def _sorted(names: Any) -> Any:
    """Return a list in order, and anything else as it is."""
    return sorted(names) if isinstance(names, list) else names


def _is_lora(module: nn.Module) -> bool:
    """Tell whether `module` is a peft layer around one of the base's."""
    return hasattr(module, "base_layer")
