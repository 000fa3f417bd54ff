"""The import of the authors' v2 checkpoints (getao/icae): one flat safetensors file becomes an adapter folder.

What is kept is LoRA (`icae.base_model. ... .lora_A.default.weight`, which peft's own files call `base_model. ...
.lora_A.weight`) and `memory_token_embed.weight`; what is dropped is full copies of the base, which training checkpoints
also hold. Rank, slots and targets are read from the shapes and names. The key names were taken from the authors' class,
not from a released file.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model_worker.attachment.digest import reader_of
from model_worker.errors import InputError, ModelNotFound
from model_worker.icae import folder as files
from model_worker.icae.config import IcaeConfig
from model_worker.icae.lora import check_scale

_LORA = re.compile(r"(?:icae\.)?(base_model\..+\.(?P<target>\w+)\.lora_(?P<side>[AB]))(?:\.default)?\.weight")


def import_official(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    rate: int = 4,
    alpha: float = 32,
    base: nn.Module | None = None,
    name: str = "",
    prefix_ids: tuple[int, ...] = (),
    suffix_ids: tuple[int, ...] = (),
) -> IcaeConfig:
    """Write `checkpoint` as an adapter into `folder`.

    base: the model that the checkpoint was trained for, so that any other is refused later. name: of that model.
    prefix_ids, suffix_ids: the authors' delimiters for Mistral are (1, 733, 16289, 28793) and (733, 28748, 16289,
    28793). Raises ModelNotFound without the file, InputError for another kind of file and for LoRA that is not plain.
    """
    check_scale(alpha, 0)
    lora, targets, rows = _read(Path(checkpoint))
    ranks = {tensor.shape[0] for key, tensor in lora.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise InputError(f"{checkpoint} has LoRA of several ranks: {sorted(ranks)}")
    config = IcaeConfig(
        slots=rows.shape[0] - 3,
        rate=rate,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        base=name,
        base_digest="" if base is None else reader_of(base).digest,
        memory_init="normal",
    )
    peft = _settings(name, ranks.pop(), alpha, targets)

    def adapter(staged: Path) -> None:
        save_file(lora, staged / files.ADAPTER)
        (staged / files.ADAPTER_CONFIG).write_text(json.dumps(peft, indent=2) + "\n")

    files.write(Path(folder), config, rows, adapter)
    return config


def _settings(name: str, rank: int, alpha: float, targets: set[str]) -> dict[str, Any]:
    """Return peft's `adapter_config.json` for the LoRA of a checkpoint, with the authors' dropout."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
        "fan_in_fan_out": False,
    }


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], set[str], Tensor]:
    """Read LoRA under peft's names, the modules it is on, and the rows. Raises as `import_official` does."""
    if not checkpoint.is_file():
        raise ModelNotFound(f"there is no file {checkpoint}")
    lora, targets, rows = {}, set(), None
    try:
        with safe_open(checkpoint, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if match := _LORA.fullmatch(key):
                    if (own := f"{match[1]}.weight") in lora:
                        raise InputError(f"{checkpoint} has {own} twice")
                    lora[own] = file.get_tensor(key).float()
                    targets.add(match["target"])
                elif "lora_" in key:
                    raise InputError(f"{checkpoint} is no plain LoRA: it has {key}")
                elif key == files.ROWS:
                    rows = file.get_tensor(key).float()
    except SafetensorError as error:
        raise InputError(f"{checkpoint} is not a safetensors file: {error}") from None
    if rows is None or not lora or rows.ndim != 2 or rows.shape[0] < 4:
        raise InputError(f"{checkpoint} is no official ICAE v2 checkpoint: it needs lora_ weights and {files.ROWS}")
    return lora, targets, rows
