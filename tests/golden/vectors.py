"""Where the golden vectors are, and how a test reads a case. KVBANK_GOLDEN names another folder of the same layout."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OWN, KINDS = Path(__file__).parent, ("homer", "icae", "memlong", "tova")


def golden(named: str | None) -> Path:
    """Return the folder of the vectors: our own, or the one that is named, which has at least one kind of them."""
    folder = Path(named) if named else OWN
    if not any((folder / kind).is_dir() for kind in KINDS):
        raise FileNotFoundError(f"KVBANK_GOLDEN: {folder} has none of the folders {', '.join(KINDS)}")
    return folder


GOLDEN = golden(os.environ.get("KVBANK_GOLDEN"))


@dataclass(frozen=True)
class Case:
    """One recorded run with its description, its tensors, and the folder they come from."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    def wrong(self) -> bool:
        """Tell whether the release's own output is wrong, or missing because the release crashed."""
        return self.about["matching_would_be_wrong"] is True or "official_error" in self.about


def memlong_folders() -> list[Path]:
    """List every recorded forward pass of MemLong."""
    return sorted(path.parent for path in (GOLDEN / "memlong" / "b_attention").glob("*/case.json"))


def memlong_case(folder: Path) -> Case:
    about = json.loads((folder / "case.json").read_text())
    return Case(folder.name, about, load_file(folder / "tensors.safetensors"), folder)


def memlong_model(case: Case) -> tuple[LlamaForCausalLM, dict[int, Tensor]]:
    """Return the model of a case, and its gates `[Hq]` in (0, 1) by layer."""
    config = case.about["config"]
    own = {
        k: config[k]
        for k in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "rms_norm_eps",
        )
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            **own,
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        )
    )
    weights = load_file(case.folder / "weights.safetensors")
    gates = {int(name.split(".")[2]): weights.pop(name) for name in list(weights) if name.endswith("output_gate")}
    model.load_state_dict(weights)
    return model.eval(), {layer: torch.sigmoid(gate.flatten()) for layer, gate in gates.items()}


def tova_cases() -> list[Path]:
    """List every recorded run of TOVA, whether or not it is ours to match."""
    return sorted((GOLDEN / "tova").glob("*.json"))


def tova_case(path: Path) -> Case:
    return Case(path.stem, json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")), path.parent)


def worst(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; shapes must be equal."""
    assert got.shape == expected.shape
    return float((got.float() - expected.float()).abs().max())


def icae_cases() -> list[Path]:
    """List every recorded run of ICAE."""
    return sorted((GOLDEN / "icae" / "cases").glob("*.json"))


def icae_case(path: Path) -> Case:
    about = json.loads(path.read_text())
    folder = path.parents[1] / "models" / about["model"]
    return Case(
        path.stem,
        about | json.loads((folder / "icae.json").read_text()),
        load_file(path.with_suffix(".safetensors")),
        folder,
    )


def homer_folders() -> list[Path]:
    """List every recorded run of HOMER."""
    return sorted(path.parent for path in (GOLDEN / "homer").glob("*/case.json"))


def homer_case(folder: Path) -> Case:
    about = json.loads((folder / "case.json").read_text())
    return Case(folder.name, about, load_file(folder / "tensors.safetensors"), folder)


def homer_model(case: Case) -> LlamaForCausalLM:
    """Return the model of a case, with the case's rope scaling."""
    folder = case.folder.parent / "models" / case.about["model"]
    raw = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}
    linear, yarn = case.about["rope_scaling"], case.about["yarn"]
    if linear is not None:
        rope |= {"rope_type": linear["type"], "factor": float(linear["factor"])}
    if yarn is not None:
        # Deviation: the authors' patch ignores the model's rope_theta and always takes base 10000.
        rope |= {"rope_type": "yarn", "factor": float(yarn["scale"]), "rope_theta": 10000.0}
        rope["original_max_position_embeddings"] = yarn["original_max_position_embeddings"]
        raw["max_position_embeddings"] = yarn["max_position_embeddings"]
    for name in ("rope_scaling", "rope_parameters"):
        raw.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**raw, rope_parameters=rope))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None  # as in the reference run: greedy texts have their full length
    return model.eval()
