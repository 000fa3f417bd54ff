"""What the files of Sentence Transformers say of an encoder: its modules, pooling, prompts and longest text.

This file owns the rule that an encoder computes what its files say, or is refused by the name of what cannot be done
here. A folder without `modules.json` is a plain encoder of transformers, of which only `1_Pooling/config.json` is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model_worker.errors import InputError

# How one vector is made of the last hidden states, by the names that Sentence Transformers has for that.
_NAMES = {"mean": "mean", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_NAMES |= {"cls": "cls", "cls_token": "cls", "max": "max", "max_tokens": "max", "lasttoken": "last"}
# sentence_bert_config.json has had these names, after the kind of the transformer.
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
POOLINGS = tuple(dict.fromkeys(_NAMES.values()))
_PASSAGES = ("document", "passage", "corpus")
_HARMLESS = {"attn_implementation", "dtype", "torch_dtype"}  # they say how to compute, not what


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the vector of a text is made.

    transformer: the folder of model and tokenizer. pooling: `mean`, `mean_sqrt_len`, `cls`, `max` or `last`. longest:
    tokens of the longest text; None: what the model has positions for. lower, strip: what is done to a text first.
    dense: folders of the linear layers behind the pooling. dimension: how many of the first numbers are kept; None:
    all. unit: whether rows get unit length. prompts: what stands before a `query` and before a `passage`.
    prompt_counts: whether the tokens of the prompt are pooled.
    """

    transformer: Path
    pooling: str = "mean"
    longest: int | None = None
    lower: bool = False
    strip: bool = False
    dense: tuple[Path, ...] = ()
    dimension: int | None = None
    unit: bool = True
    prompts: Mapping[str, str] | None = None
    prompt_counts: bool = True

    def prompt(self, kind: str) -> str:
        """Return what stands before a text. kind: `query` or `passage`."""
        return (self.prompts or {}).get(kind, "")

    def parts(self) -> str:
        """Return what differs from a plain encoder with this pooling, without folders; empty where nothing does."""
        plain = Recipe(self.transformer)
        names = ("lower", "strip", "dimension", "unit", "prompts", "prompt_counts")
        own = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}
        return json.dumps(own, sort_keys=True) if own else ""


def recipe_of(folder: Path) -> Recipe:
    """Read the recipe of an encoder's folder. Raises InputError for files that are damaged or cannot be honoured."""
    modules = _read(folder / "modules.json", list)
    if modules is None:
        pooling, _ = _pooling(folder, folder / "1_Pooling")
        return Recipe(folder, "mean" if pooling == "mean_sqrt_len" else pooling)
    return _of_modules(folder, modules)


def _of_modules(folder: Path, modules: list[Any]) -> Recipe:
    try:
        found = [(str(own["type"]).rpartition(".")[2], folder / str(own["path"])) for own in modules]
    except (KeyError, TypeError):
        raise InputError(f"{folder / 'modules.json'} is damaged: a module has no type and path") from None
    kinds = [kind for kind, _ in found]
    strange = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")]
    if strange:
        raise InputError(f"{folder} asks for a module that there is not here: {', '.join(strange)}")
    if kinds[:2] != ["Transformer", "Pooling"] or not {"Transformer", "Pooling"}.isdisjoint(kinds[2:]):
        raise InputError(f"{folder} asks for modules in an order that there is not here: {', '.join(kinds)}")
    if "Normalize" in kinds[:-1]:
        raise InputError(f"{folder} asks for a Normalize that is not the last module")
    pooling, counts = _pooling(folder, found[1][1])
    made = replace(_of_transformer(found[0][1]), pooling=pooling, prompt_counts=counts, strip=True)
    made = replace(made, dense=tuple(path for kind, path in found if kind == "Dense"))
    return _simplest(_with_settings(folder, made, "Normalize" in kinds))


def _of_transformer(folder: Path) -> Recipe:
    """Return what `sentence_bert_config.json` says of the transformer. Raises InputError."""
    paths = (folder / f"sentence_{kind}_config.json" for kind in _KINDS)
    path = next((path for path in paths if path.is_file()), None)
    said = {} if path is None else _read(path, dict) or {}
    arguments = {key: said.get(f"{key}_args") or {} for key in ("model", "tokenizer", "config")}
    if not all(isinstance(own, dict) for own in arguments.values()):
        raise InputError(f"{path} is damaged: arguments are named")
    unknown = [f"{key}_args.{name}" for key, own in arguments.items() for name in own if name not in _HARMLESS]
    if said.get("transformer_task", "feature-extraction") != "feature-extraction":
        unknown.append(f"transformer_task {said['transformer_task']}")
    if unknown:
        raise InputError(f"{path} asks for what there is not here: {', '.join(unknown)}")
    longest = said.get("max_seq_length")
    if not (longest is None or _counts(longest)):
        raise InputError(f"{path} is damaged: max_seq_length is {longest!r}")
    return Recipe(folder, longest=longest, lower=said.get("do_lower_case") is True)


def _with_settings(folder: Path, recipe: Recipe, normalised: bool) -> Recipe:
    """Return the recipe with what `config_sentence_transformers.json` says. Raises InputError."""
    path = folder / "config_sentence_transformers.json"
    said = _read(path, dict) or {}
    likeness = said.get("similarity_fn_name") or "cosine"
    if likeness not in ("cosine", "dot", "dot_product") and not normalised:
        raise InputError(f"{folder} asks for a similarity that there is not here: {likeness}")
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise InputError(f"{path} is damaged: prompts are texts by name")
    if default is not None and default not in list(prompts):
        raise InputError(f"{folder} has no prompt of the name {default!r}, which it asks for")
    passage = next((name for name in _PASSAGES if name in prompts), default)
    query = "query" if "query" in prompts else default
    named = {kind: prompts[name] for kind, name in (("query", query), ("passage", passage)) if prompts.get(name)}
    kept = said.get("truncate_dim")
    if not all(isinstance(text, str) for text in named.values()):
        raise InputError(f"{path} is damaged: prompts are texts by name")
    if not (kept is None or _counts(kept)):
        raise InputError(f"{path} is damaged: truncate_dim is {kept!r}")
    unit = normalised or likeness == "cosine"
    return replace(recipe, unit=unit, prompts=named or None, dimension=kept)


def _simplest(recipe: Recipe) -> Recipe:
    """Return the recipe with the mean in the place of its multiple, where the length of the rows is lost anyway."""
    if recipe.pooling == "mean_sqrt_len" and recipe.unit and not recipe.dense:
        return replace(recipe, pooling="mean")
    return recipe


def _pooling(folder: Path, path: Path) -> tuple[str, bool]:
    """Read the pooling, the mean where none is asked for, and whether prompts are pooled. Raises InputError."""
    said = _read(path / "config.json", dict)
    if said is None:
        return "mean", True
    begin = "pooling_mode_"
    modes = [key.removeprefix(begin) for key, value in said.items() if key.startswith(begin) and value is True]
    modes += [said["pooling_mode"]] if isinstance(said.get("pooling_mode"), str) else []
    poolings = {_NAMES.get(mode) for mode in modes}
    pooling = next(iter(poolings), None)
    if len(poolings) != 1 or pooling is None:
        raise InputError(f"{folder} asks for a pooling that there is not here: {', '.join(modes) or 'none'}")
    return pooling, said.get("include_prompt") is not False


def _counts(value: object) -> bool:
    """Return whether a value of a file is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read(path: Path, kind: type) -> Any:
    """Return what a file in JSON says, or None where there is no file. Raises InputError for what is not of `kind`."""
    try:
        said = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(said, kind):
        raise InputError(f"{path} is damaged: it has no {kind.__name__}")
    return said
