"""A local encoder of transformers as an embedder, a plain one or one of Sentence Transformers.

This file owns the rule that whatever is wrong with an encoder's folder shows when the folder is opened: the encoder is
run then, on a short text and on the longest that it takes.
"""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from model_worker.arguments import choice, of_kind
from model_worker.embed.base import Vectors
from model_worker.embed.pooling import dense_layer, pooled
from model_worker.embed.sentence_files import POOLINGS, Recipe, recipe_of
from model_worker.errors import InputError, ModelNotFound, first_line
from model_worker.user_text import readable

# Tokens of the longest text that is tried; chunks are not longer than that as a rule.
_LONGEST_TRIED = 1024


class EncoderEmbedder:
    """Embeds a text by the pooled last hidden state of a local encoder, as the encoder's files say.

    A folder of Sentence Transformers says pooling, dense layers, normalisation, prompts and the longest text; what it
    asks for and cannot be done is refused. A plain folder has the mean, at unit length. Tokens beyond the longest text
    are left out. Rows have unit length unless the folder asks for the inner product of rows that are not normalised.

    pooling: `mean`, `cls`, `max` or `last` token, in the place of the folder's. prompts: what stands before each text,
    in the place of the folder's, by `query` (what is searched for) and `passage` (what is stored), such as `"query: "`
    and `"passage: "` for E5. Raises ModelNotFound for a folder that cannot be loaded, InputError for a model that gives
    no embeddings.
    """

    def __init__(self, folder: str | Path, pooling: str | None = None, prompts: Mapping[str, str] | None = None):
        self._folder = Path(folder).expanduser().absolute()
        recipe = recipe_of(self._folder)
        if pooling is not None:
            recipe = replace(recipe, pooling=choice("pooling", pooling, POOLINGS))
        if prompts is not None:
            recipe = replace(recipe, prompts=_prompts(prompts))
        self._net = _Net(recipe)
        self._take(recipe)

    def _take(self, recipe: Recipe) -> None:
        self.name, self.pooling, self._recipe = self._folder.name, recipe.pooling, recipe
        self.dimension = self._tried()
        self.digest = xxhash.xxh3_128_hexdigest(self._described().encode())

    def _described(self) -> str:
        """Return the text whose hash is the digest: of a plain encoder only pooling and model, as older banks have."""
        recipe, net = self._recipe, self._net
        longest = "" if net.longest(recipe) == net.longest() else f" longest={net.longest(recipe)}"
        more = f" {recipe.parts()}" if recipe.parts() else ""
        return f"{recipe.pooling} {net.digest}{net.dense_digest if recipe.dense else ''}{longest}{more}"

    def earlier(self) -> list["EncoderEmbedder"]:
        """Return the earlier forms of this embedder, which older banks were written with.

        At first all pooling was the mean, and until this form nothing but the pooling of a folder was heeded.
        """
        poolings = {"mean": None, "mean" if self.pooling == "mean_sqrt_len" else self.pooling: None}
        forms = [self._with(Recipe(self._recipe.transformer, pooling)) for pooling in reversed(poolings)]
        return [form for form in forms if form.digest != self.digest]

    def _with(self, recipe: Recipe) -> "EncoderEmbedder":
        """Return another form of this embedder, over the same weights."""
        form = object.__new__(EncoderEmbedder)
        form._folder, form._net = self._folder, self._net
        form._take(recipe)
        return form

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`; a text without a token gives the zero vector."""
        return self._embed(texts, "passage")

    def embed_queries(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`, which are searched for; it differs where the encoder has prompts."""
        return self._embed(texts, "query")

    def _embed(self, texts: list[str], kind: str) -> Vectors:
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        rows: Vectors = self._net.rows(texts, self._recipe, kind).numpy()
        return rows if rows.shape[1] else np.zeros((len(texts), self.dimension), np.float32)

    def _tried(self) -> int:
        """Return the dimension that the model gives to texts of different lengths. Raises InputError."""
        longest = self._net.longest(self._recipe)
        long = " ".join(["probe"] * min(longest or _LONGEST_TRIED, _LONGEST_TRIED))
        self.dimension = 0
        try:
            found = self.embed(["A probe.", long])
        except Exception as error:  # the model of others: whatever it runs into, it is no encoder
            raise InputError(f"{self._folder} is of no use as an embedder: {type(error).__name__}: {error}") from error
        if not np.isfinite(found).all() or not found.any(axis=1).all():
            raise InputError(f"{self._folder} is of no use as an embedder: its vectors are zero or no numbers")
        return int(found.shape[1])


class _Net:
    """The weights of an encoder and its tokenizer, which all forms of an embedder share."""

    def __init__(self, recipe: Recipe):
        import torch

        from model_worker.attachment.digest import reader_of

        self._model, self._tokenizer = _loaded(recipe.transformer)
        self._cutting = threading.Lock()  # the tokenizer keeps the bounds of the last call, and refuses two threads
        self._bound = _bound(self._model, self._tokenizer)
        self._dense = torch.nn.Sequential(*map(dense_layer, recipe.dense))
        self.digest = reader_of(self._model, self._tokenizer).digest
        weights = b"".join(tensor.float().numpy().tobytes() for tensor in self._dense.state_dict().values())
        shown = xxhash.xxh3_128_hexdigest(repr(self._dense).encode() + weights)
        self.dense_digest = f" dense={shown}"

    def longest(self, recipe: Recipe | None = None) -> int | None:
        """Return the tokens of the longest text by a recipe, or of the model itself; None where there is no bound."""
        bounds = [bound for bound in (self._bound, recipe.longest if recipe else None) if bound is not None]
        return min(bounds, default=None)

    def rows(self, texts: list[str], recipe: Recipe, kind: str) -> Any:
        """Return the rows of texts, `[n, d]`; d is 0 where no text has a token. kind: `query` or `passage`."""
        import torch

        batch = self._batch([recipe.prompt(kind) + readable(text) for text in texts], recipe)
        mask = batch["attention_mask"]
        if not mask.shape[1]:
            return torch.zeros(len(texts), 0)
        if not recipe.prompt_counts and recipe.prompt(kind):
            mask = mask.clone()
            mask[:, : self._length(recipe, kind)] = 0
        with torch.no_grad():
            hidden = self._model(**batch, return_dict=True).last_hidden_state
            made = pooled(hidden, mask, recipe.pooling)
            if recipe.dense:
                made = self._dense(made.float())  # its weights are in float32, also behind a model in half precision
            made = made[:, : recipe.dimension]
            made = torch.nn.functional.normalize(made, dim=-1) if recipe.unit else made
            return made.float().masked_fill(~mask.any(1, keepdim=True), 0)

    def _length(self, recipe: Recipe, kind: str) -> int:
        """Count the tokens of a prompt, with the special ones in front of it and without those behind it."""
        ids = self._batch([recipe.prompt(kind)], recipe)["input_ids"][0].tolist()
        return len(ids) - (ids[-1] in self._tokenizer.all_special_ids)

    def _batch(self, texts: list[str], recipe: Recipe) -> Any:
        texts = [text.strip() for text in texts] if recipe.strip else texts
        with self._cutting:
            return self._tokenizer(
                [text.lower() for text in texts] if recipe.lower else texts,
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=self.longest(recipe),
                return_attention_mask=True,
                return_tensors="pt",
                split_special_tokens=True,
            )


def _prompts(given: Mapping[str, str]) -> dict[str, str] | None:
    """Return prompts without empty ones. Raises InputError for other names, and for what is no text."""
    unknown = set(of_kind("prompts", given, Mapping)) - {"query", "passage"}
    if unknown:
        raise InputError(f"prompts are those of a query and of a passage, not of {', '.join(map(repr, unknown))}")
    return {name: of_kind(f"prompts[{name!r}]", text, str) for name, text in given.items() if text} or None


def _loaded(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer, ready to encode several texts at once."""
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"{folder} is not the folder of an encoder: it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).eval()
    except Exception as error:  # the files of others, read by libraries that fail with whatever they run into
        raise ModelNotFound(
            f"encoder {folder} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    table = getattr(model.get_input_embeddings(), "weight", None)
    if table is not None and len(tokenizer) > len(table):
        raise InputError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, and its model knows {len(table)}")
    if tokenizer.pad_token is None:  # pads are masked, so that any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def _bound(model: Any, tokenizer: Any) -> int | None:
    """Count the tokens of the longest text that the model has positions for; None where there is no bound."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    positions = getattr(model.config, "max_position_embeddings", None)
    if table is not None and getattr(table, "padding_idx", None) is not None:  # RoBERTa counts from behind the pad
        positions = table.num_embeddings - table.padding_idx - 1
    bounds = [bound for bound in (tokenizer.model_max_length, positions) if bound is not None and 0 < bound < 1 << 30]
    return min(bounds, default=None)
