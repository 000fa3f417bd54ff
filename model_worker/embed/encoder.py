"""A local encoder of transformers as an embedder, a plain one or one of Sentence Transformers.

This file owns the rule that whatever is wrong with an encoder's folder shows when the folder is opened: the encoder is
run then, on a short text and on the longest that it takes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from model_worker.errors import InputError, ModelNotFound
from model_worker.user_text import readable

# How one vector is made of the last hidden states, by the names that Sentence Transformers has for that.
_POOLINGS = {"mean": "mean", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean"}
_POOLINGS |= {"cls": "cls", "cls_token": "cls", "max": "max", "max_tokens": "max", "lasttoken": "last"}
# Tokens of the longest text that is tried; chunks are not longer than that as a rule.
_LONGEST_TRIED = 1024


class EncoderEmbedder:
    """Embeds a text by the pooled and normalised last hidden state of a local encoder.

    Tokens beyond the encoder's longest text are left out. pooling: `mean`, `cls`, `max` or `last` token; by default
    what the folder says (`1_Pooling/config.json`, as Sentence Transformers writes it), else the mean. Raises
    ModelNotFound for a folder that cannot be loaded, InputError for a model that gives no embeddings.
    """

    def __init__(self, folder: str | Path, pooling: str | None = None):
        from model_worker.attachment.digest import reader_of

        self._folder = Path(folder).expanduser().absolute()
        self.pooling = pooling or _pooling(self._folder)
        self._model, self._tokenizer = _loaded(self._folder)
        self._longest = _longest(self._model, self._tokenizer)
        self.dimension = self._tried()
        reader = reader_of(self._model, self._tokenizer).digest
        self.digest = xxhash.xxh3_128_hexdigest(f"{self.pooling} {reader}".encode())

    def earlier(self) -> list["EncoderEmbedder"]:
        """Return the earlier forms of this embedder, which older banks were written with: all pooling was the mean."""
        return [] if self.pooling == "mean" else [EncoderEmbedder(self._folder, "mean")]

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Return a row for each of `texts`; a text without a token, in a batch of such, gives the zero vector."""
        import torch

        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        batch = self._batch(texts)
        if not batch["input_ids"].shape[1]:  # there is no token in any of the texts
            return np.zeros((len(texts), self.dimension), np.float32)
        with torch.no_grad():
            hidden = self._model(**batch, return_dict=True).last_hidden_state
            pooled = _pooled(hidden, batch["attention_mask"], self.pooling)
            vectors: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=-1).float().numpy()
            return vectors

    def _batch(self, texts: list[str]) -> Any:
        return self._tokenizer(
            [readable(text) for text in texts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._longest,
            return_attention_mask=True,
            return_tensors="pt",
            split_special_tokens=True,
        )

    def _tried(self) -> int:
        """Return the dimension that the model gives to texts of different lengths. Raises InputError."""
        long = " ".join(["probe"] * min(self._longest or _LONGEST_TRIED, _LONGEST_TRIED))
        self.dimension = 0
        try:
            found = self.embed(["A probe.", long])
        except Exception as error:  # the model of others: whatever it runs into, it is no encoder
            raise InputError(f"{self._folder} is of no use as an embedder: {type(error).__name__}: {error}") from error
        if not np.isfinite(found).all() or not found.any(axis=1).all():
            raise InputError(f"{self._folder} is of no use as an embedder: its vectors are zero or no numbers")
        return int(found.shape[1])


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer, ready to encode several texts at once."""
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} is not the folder of an encoder: it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).eval()
    except Exception as error:  # the files of others, read by libraries that fail with whatever they run into
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelNotFound(f"encoder {folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is not None and len(tokenizer) > len(table):
        raise InputError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, and its model knows {len(table)}")
    if tokenizer.pad_token is None:  # pads are masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def _longest(model: Any, tokenizer: Any) -> int | None:
    """Count the tokens of the longest text that the model has positions for; None where there is no bound."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    positions = getattr(model.config, "max_position_embeddings", None)
    if table is not None and getattr(table, "padding_idx", None) is not None:  # RoBERTa counts from behind the pad
        positions = table.num_embeddings - table.padding_idx - 1
    bounds = [bound for bound in (tokenizer.model_max_length, positions) if bound is not None and 0 < bound < 1 << 30]
    return min(bounds, default=None)


def _pooling(folder: Path) -> str:
    """Read the pooling that the folder asks for; the mean where it asks for none. Raises InputError."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_bytes())
    except FileNotFoundError:
        return "mean"
    except ValueError as error:
        raise InputError(f"{folder / '1_Pooling' / 'config.json'} is damaged: {error}") from None
    begin = "pooling_mode_"
    modes = [key.removeprefix(begin) for key, value in said.items() if key.startswith(begin) and value is True]
    modes += [said["pooling_mode"]] if isinstance(said.get("pooling_mode"), str) else []
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise InputError(f"{folder} asks for a pooling that there is not here: {', '.join(modes) or 'none'}")
    return _POOLINGS[modes[0]]


def _pooled(hidden: Any, mask: Any, pooling: str) -> Any:
    """Pool hidden states `[n, T, d]` under a mask `[n, T]` whose pads are on the right, to `[n, d]`."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None]
        return hidden.take_along_dim(last, 1)[:, 0] * mask.any(1, keepdim=True)
    if pooling == "max":
        return hidden.masked_fill(mask[..., None] == 0, -1e9).amax(1)
    weights = mask[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
