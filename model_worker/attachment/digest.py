"""The digest that binds K-V pairs to the model that reads them, and fingerprints that notice when it no longer holds.

This file owns the rule that K-V of another model never match: everything that changes what a key means goes into the
digest. Weights are hashed as they are in memory, by value (a bf16 file loaded as float32 agrees with itself), never
taken from the file's name or time, since weights may have been changed after loading.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from model_worker.attachment.model_parts import config_of, plain
from model_worker.attachment.weights import is_tuner, live_tensors, weights_of
from model_worker.errors import UnsupportedModel

_SAMPLED = 16  # elements of each tensor that a sample takes
_COLUMNS = 4096  # of the table whose sums are a fingerprint
_ORDINARY = (nn.Parameter, Tensor)


@dataclass(frozen=True, slots=True)
class Reader:
    """Digest of a reading model and the parts it was made of."""

    digest: str
    parts: dict[str, str]


def reader_of(model: nn.Module, tokenizer: object | None = None) -> Reader:
    """Hash architecture, weights, rope, tokenizer and active adapter of `model` (bf16: about 1.5 GB/s).

    Raises UnsupportedModel for a model with weights that cannot be read (see weights.py).
    """
    config = config_of(model).to_dict()
    weights = weights_of(model, plain(model))
    parts = {
        "architecture": _hash_json([config.get("model_type"), _architecture(config)]),
        "weights": _hash_tensors(weights.base),
        "rope": _hash_json([config.get("rope_parameters"), config.get("rope_theta"), config.get("rope_scaling")]),
        "tokenizer": tokenizer_digest(tokenizer),
        "adapter": _adapter_digest(model, weights.adapters),
    }
    if weights.others:  # most models have none, and keep the digest that they had before these counted
        parts["buffers and modules"] = _hash_tensors(weights.others)
    return Reader(_hash_json(parts), parts)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash vocabulary and rules; return `none` when the model is used without a tokenizer."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash_json(tokenizer.get_vocab())
    content = json.loads(backend.to_str())
    return _hash_json({**content, "padding": None, "truncation": None})  # those are left there by the last call


def state_token(model: nn.Module) -> int:
    """Return a cheap fingerprint that moves when weights are replaced or written, or an adapter is switched.

    The fingerprint is of where tensors are and of torch's count of their writes. No weight is read for it (microseconds
    a tensor), so it may move without the digest changing, and misses writes through `.data`: `WeightViews` sees those.
    """
    state: list[object] = []
    pending = [model]
    while pending:  # a walk without names: `named_parameters` is ten times slower
        module = pending.pop()
        state.append(type(module))
        for tensor in live_tensors(module):
            state.append((id(tensor), tensor.data_ptr() if _is_ordinary(tensor) else 0, version_of(tensor)))
        if is_tuner(module):
            state.append(tuner_state(module))
        pending.extend(m for m in module._modules.values() if m is not None)
    return hash(tuple(state))


def version_of(tensor: Tensor) -> int:
    """Return how often torch counted a write to `tensor`; -1 for an inference tensor, whose writes are not counted."""
    return -1 if tensor.is_inference() else tensor._version


class WeightViews:
    """The values of a model's weights, as they are at each look.

    The views are made once, since making them costs more than reading through them, over the tensors that are there
    then: `state_token` sees whether these were replaced.
    """

    def __init__(self, model: nn.Module):
        self._samples: dict[Any, list[Tensor]] = defaultdict(list)
        self._all: list[Tensor | memoryview] = []
        for module in model.modules():
            for tensor in live_tensors(module):
                flat = tensor.detach()
                if not _is_ordinary(tensor) or not tensor.is_contiguous():
                    self._all.append(flat)
                    continue
                self._samples[tensor.dtype, tensor.device].append(_strided(flat))
                flat = flat.reshape(-1).view(torch.uint8)
                self._all.append(flat.numpy().data if flat.device.type == "cpu" else flat)

    def sampled(self) -> bytes:
        """Return 16 values of each tensor that is a plain one, as bytes."""
        return b"".join(_bytes_of(torch.cat(views)) for views in self._samples.values())

    def fingerprint(self) -> str:
        """Hash every byte, as it is stored, at the speed of the memory.

        On a CPU the bytes are hashed; elsewhere sums of rows and columns are, so that the weights stay where they are.
        """
        digest = xxhash.xxh3_128()
        for view in self._all:
            if isinstance(view, memoryview):
                digest.update(view)
            elif not _is_ordinary(view):
                for piece in _pieces(view):
                    digest.update(piece)
            else:
                flat = view.reshape(-1).view(torch.uint8)
                digest.update(_bytes_of(flat) if flat.device.type == "cpu" else _sums(flat))
        return digest.hexdigest()


def _is_ordinary(tensor: Tensor) -> bool:
    """Tell whether the bytes of `tensor` are its values, which those of packed and quantised ones are not alone."""
    return type(tensor) in _ORDINARY and not tensor.is_quantized


def _strided(tensor: Tensor) -> Tensor:
    """Return a view of at most 16 values, evenly spread over a contiguous tensor."""
    count = min(tensor.numel(), _SAMPLED)
    return tensor.as_strided((count,), (max(1, tensor.numel() // max(1, count)),))


def _sums(flat: Tensor) -> bytes | memoryview:
    """Sum bytes `[N]` as 32-bit numbers in rows and columns: any change of one value, and of the order, shows."""
    rest = flat.numel() % (4 * _COLUMNS)
    table = flat[: flat.numel() - rest].view(torch.int32).view(-1, _COLUMNS)
    sums = [table.sum(dim, dtype=torch.int64) for dim in (0, 1)]
    return _bytes_of(torch.cat([x.view(torch.uint8) for x in sums] + [flat[flat.numel() - rest :]]))


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    """Return the bytes of a tensor as they are stored."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data


# Fields of a config that do not change what a key means; all others count, also those that a future model brings.
_NOT_ARCHITECTURE = re.compile(
    r"_.*|rope_.*|(torch_)?dtype|transformers_version|use_cache|architectures|kvbank|(pad|bos|eos)_token_id"
    r"|output_.*|return_dict|id2label|label2id|problem_type|is_encoder_decoder|chunk_size_feed_forward"
    r"|initializer_range|.*dropout"
)


def _architecture(config: dict[str, object]) -> dict[str, object]:
    """Return the fields of a configuration that change what a key means."""
    return {name: value for name, value in config.items() if not _NOT_ARCHITECTURE.fullmatch(name)}


def tuner_state(module: nn.Module) -> tuple[str, ...]:
    """Return what a peft layer says of itself; a switch shows there before any weight moves."""
    said = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(str(getattr(module, name, "")) for name in said)


def _adapter_digest(model: nn.Module, added: dict[str, Tensor]) -> str:
    """Hash the active adapters, whose tensors are in `added`; return `none` without one."""
    tuners = [module for module in model.modules() if is_tuner(module)]
    active = sorted({str(a) for t in tuners for a in getattr(t, "active_adapters", ())})
    if not active or all(getattr(t, "disable_adapters", False) for t in tuners):
        return "none"
    used = {name: p for name, p in added.items() if any(f".{a}." in f"{name}." for a in active)}
    scaling = [str(sorted(getattr(t, "scaling", {}).items())) for t in tuners]
    merged = [str(getattr(t, "merged_adapters", ())) for t in tuners]
    return _hash_json([active, scaling, merged, _hash_tensors(used)])


def _hash_tensors(named: dict[str, Any]) -> str:
    """Hash names, shapes and values, in the order of the names."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(named.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode() if isinstance(value, Tensor) else name.encode())
        _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    """Add a tensor, or what else a state dict may hold, to `digest`. Raises UnsupportedModel for what has no value."""
    if isinstance(value, Tensor):
        try:
            for piece in _pieces(value):
                digest.update(piece)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise UnsupportedModel(f"the weight {name} cannot be read: {error}") from error
    elif isinstance(value, dict | list | tuple):
        parts = sorted(value.items(), key=str) if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            digest.update(f"[{key}]".encode())
            _update(digest, name, part)
    elif value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.Size):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    else:
        raise UnsupportedModel(f"the weight {name} is a {type(value).__name__}, whose value cannot be known")


def _pieces(tensor: Tensor, rows: int = 1 << 22) -> Iterable[bytes | memoryview]:
    """Yield the bytes of a tensor by value: floating-point numbers as float32 (float64 as it is), others as they are.

    The bytes come in pieces, since a float32 copy of a whole embedding may not fit beside a large model.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised parameter, made of tensors
        names, context = tensor.__tensor_flatten__()
        yield repr(context).encode()
        for name in names:
            yield from _pieces(getattr(tensor, name))
        return
    if tensor.is_quantized:
        yield repr((tensor.qscheme(), tensor.dtype)).encode()
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()) if per_channel else None
        yield from (x for s in scales or () for x in _pieces(s))
        yield repr(None if per_channel else (tensor.q_scale(), tensor.q_zero_point())).encode()
        tensor = tensor.int_repr()
    by_value = tensor.is_floating_point() and tensor.dtype != torch.float64
    if not by_value:
        yield str(tensor.dtype).encode()
    for piece in torch.split(tensor.detach().reshape(-1), rows):
        yield _bytes_of(piece.to(device="cpu", dtype=torch.float32) if by_value else piece)


def _hash_json(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
