"""Who reads: the digest that binds K-V pairs to one model.

This file owns the rule that K-V of another model never match: everything that changes what a key means goes into the
digest. Weights are hashed as they are in memory, by value (a bf16 file loaded as float32 agrees with itself), never
taken from the file's name or time, since weights may have been changed after loading.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Reader:
    """Digest of a reading model and the parts it was made of."""

    digest: str
    parts: dict[str, str]


def reader_of(model: nn.Module, tokenizer: object | None = None) -> Reader:
    """Hash architecture, weights, rope, tokenizer and active adapter of `model` (bf16: about 1.5 GB/s)."""
    config = model.config.to_dict()  # type: ignore[operator,union-attr]
    base, adapter = _split_parameters(model)
    parts = {
        "architecture": _hash_json([config.get("model_type"), _architecture(config)]),
        "weights": _hash_tensors(base),
        "rope": _hash_json([config.get("rope_parameters"), config.get("rope_theta"), config.get("rope_scaling")]),
        "tokenizer": tokenizer_digest(tokenizer),
        "adapter": _adapter_digest(model, adapter),
    }
    return Reader(_hash_json(parts), parts)


def tokenizer_digest(tokenizer: object | None) -> str:
    """Hash of vocabulary and rules; `none` when the model is used without a tokenizer."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash_json(tokenizer.get_vocab())  # type: ignore[attr-defined]
    content = json.loads(backend.to_str())
    return _hash_json({**content, "padding": None, "truncation": None})  # those are left there by the last call


def state_token(model: nn.Module) -> int:
    """Cheap fingerprint that moves whenever parameters are replaced or written, or an adapter is switched.

    It hashes no weights (microseconds a parameter), so it may move without the digest changing.
    """
    state: list[object] = []
    pending = [model]
    while pending:  # a walk without names: `named_parameters` is ten times slower, and this runs at every chunk
        module = pending.pop()
        state += [(id(p), p.data_ptr(), p._version) for p in module._parameters.values() if p is not None]
        if hasattr(module, "base_layer"):
            state.append(_tuner_state(module))
        pending.extend(m for m in module._modules.values() if m is not None)
    return hash(tuple(state))


# Fields of a config that do not change what a key means; all others count, also those that a future model brings.
_NOT_ARCHITECTURE = re.compile(
    r"_.*|rope_.*|(torch_)?dtype|transformers_version|use_cache|architectures|kvbank|(pad|bos|eos)_token_id"
    r"|output_.*|return_dict|id2label|label2id|problem_type|is_encoder_decoder|chunk_size_feed_forward"
    r"|initializer_range|.*dropout"
)


def _architecture(config: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if not _NOT_ARCHITECTURE.fullmatch(name)}


def _split_parameters(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of the base model under their plain names, and those that adapters added."""
    tuners = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    base: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        owner = next((t for t in tuners if name.startswith(f"{t}.")), None)
        if owner is not None and not name.startswith(f"{owner}.base_layer."):
            added[name] = parameter
        else:
            base[name.replace(".base_layer.", ".").removeprefix("base_model.model.")] = parameter
    return base, added


def _tuner_state(module: nn.Module) -> tuple[str, ...]:
    """What a peft layer says of itself; a switch shows here before any weight moves."""
    said = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(str(getattr(module, name, "")) for name in said)


def _adapter_digest(model: nn.Module, added: dict[str, Tensor]) -> str:
    tuners = [module for module in model.modules() if hasattr(module, "base_layer")]
    active = sorted({str(a) for t in tuners for a in getattr(t, "active_adapters", ())})
    if not active or all(getattr(t, "disable_adapters", False) for t in tuners):
        return "none"
    used = {name: p for name, p in added.items() if any(f".{a}." in f"{name}." for a in active)}
    scaling = [str(sorted(getattr(t, "scaling", {}).items())) for t in tuners]
    merged = [str(getattr(t, "merged_adapters", ())) for t in tuners]
    return _hash_json([active, scaling, merged, _hash_tensors(used)])


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for piece in _pieces(tensor):
            digest.update(piece.to(device="cpu", dtype=torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _pieces(tensor: Tensor, rows: int = 1 << 22) -> Iterable[Tensor]:
    """A float32 copy of a whole embedding may not fit beside a large model."""
    return tensor.detach().reshape(-1).split(rows)


def _hash_json(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
