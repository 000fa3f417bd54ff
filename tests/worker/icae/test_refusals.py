"""ICAE refuses bases, configurations and settings that make no sense."""

import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from model_worker.errors import InputError
from model_worker.icae import Icae, IcaeConfig
from tests.worker.icae.adapters import SOFT, made
from tests.worker.tiny import VOCABULARY, build

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_the_vocabulary_stays_as_it_is() -> None:
    base = build("llama_gqa")
    icae = made(base)
    for model in (base, icae.decoder, icae.encoder.get_base_model()):
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY
        assert model.get_output_embeddings().out_features == VOCABULARY
    for wrong in ([VOCABULARY], [-1]):
        with pytest.raises(InputError, match="token ids"):
            icae.encode([wrong])
    with pytest.raises(InputError, match="empty"):
        icae.encode([[5], []])
    assert icae.encode([]) == []


def test_created_alike_from_a_seed() -> None:
    """Rows are as wide as the base's embeddings, or standard normal where asked; the caller's generator stays."""
    base = build("llama_gqa")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    icae = Icae.create(base, IcaeConfig(63, 3), rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert icae.digest == Icae.create(base, IcaeConfig(63, 3), rank=4).digest
    assert icae.digest != Icae.create(base, IcaeConfig(63, 3), rank=4, seed=1).digest
    width = base.get_input_embeddings().weight.std().item()
    assert icae.memory.std().item() == pytest.approx(width, rel=0.1)
    normal = Icae.create(base, IcaeConfig(63, 3, memory_init="normal"), rank=4)
    assert normal.memory.std().item() == pytest.approx(1, rel=0.1)
    wide = Icae.create(base, IcaeConfig(63, 3), rank=4, targets="all-linear")
    assert len([n for n, _ in wide.named_parameters() if "lora_A" in n]) == 7 * 4
    with pytest.raises(InputError, match="LoRA cannot be put"):
        Icae.create(base, SOFT, rank=4, targets=["nothing_like_it"])


def test_a_base_that_is_none() -> None:
    wrapped: Any = get_peft_model(build("llama_gqa"), LoraConfig(r=2, target_modules=["q_proj"]))
    for base in (wrapped, wrapped.get_base_model()):
        with pytest.raises(InputError, match="adapter already"):
            Icae.create(base, SOFT, rank=4)
    with pytest.raises(InputError, match="not a causal LM"):
        Icae.create(build("llama_gqa").model, SOFT, rank=4)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the package works; making an adapter says what is missing."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'kvbank\[icae\]'"):
        Icae.create(build("llama_gqa"), SOFT, rank=4)
    with pytest.raises(InputError, match=r"pip install 'kvbank\[icae\]'"):
        Icae.from_pretrained(build("llama_gqa"), "somewhere")


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"rate": 0}, {"positions": "far"}, {"memory_init": "ones"}, {"format": 0}], ids=str
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        IcaeConfig(**{"slots": 4, **wrong})
