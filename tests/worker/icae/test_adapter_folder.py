"""Folders of adapters are saved and loaded, bound to their base, and refused where they would make other slots."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model_worker.attachment.digest import reader_of
from model_worker.errors import InputError, ModelNotFound
from model_worker.icae import Icae, IcaeConfig, answer, continue_, loss, restore, to_kv
from model_worker.icae.decode import logits
from model_worker.icae.layout import restore_row
from model_worker.icae.official import import_official
from tests.worker.icae.adapters import EVERY_FORM, KV, SOFT, SPREAD, made, same, small, text
from tests.worker.tiny import build

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@EVERY_FORM
def test_saved_and_loaded(config: IcaeConfig, tmp_path: Path) -> None:
    """Bit-equal slots, the same digest and configuration; frozen unless it is to be trained further."""
    base = build("llama_gqa")
    icae = made(base, config)
    icae.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("a card")
    icae.save_pretrained(tmp_path / "adapter")  # again, over it
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "icae_config.json",
        "icae_memory.safetensors",
    ]
    assert (tmp_path / "adapter" / "README.md").read_text() == "a card"
    again = Icae.from_pretrained(base, tmp_path / "adapter")
    same(again.encode([text(25)])[0], icae.encode([text(25)])[0], 0.0)
    assert again.config == icae.config
    assert again.digest == icae.digest
    assert not [n for n, p in again.named_parameters() if p.requires_grad]
    further = Icae.from_pretrained(base, tmp_path / "adapter", trainable=True)
    trained = {n for n, p in further.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in icae.named_parameters() if p.requires_grad}
    assert "memory" in trained
    rows = load_file(tmp_path / "adapter" / "icae_memory.safetensors")
    assert torch.equal(rows["memory_token_embed.weight"], icae.memory.detach())


def test_digest_is_of_what_makes_slots(tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    own = icae.digest
    assert made(base).digest == own
    assert made(base, alpha=16).digest != own
    assert made(base, IcaeConfig(4, 4)).digest != own
    assert made(base, IcaeConfig(4, 3, base="another name")).digest == own
    with torch.no_grad():
        icae.memory[0, 0] += 1
        moved = icae.digest
        assert moved != own
        next(p for n, p in icae.named_parameters() if "lora_A" in n)[0, 0] += 1
        assert icae.digest not in (own, moved)


def test_another_base_is_refused(tmp_path: Path) -> None:
    made(build("llama_gqa")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="trained for another base"):
        Icae.from_pretrained(build("llama_gqa", seed=1), tmp_path)
    said = json.loads((tmp_path / "icae_config.json").read_text())
    (tmp_path / "icae_config.json").write_text(json.dumps(said | {"base_digest": "", "digest": ""}))
    assert Icae.from_pretrained(build("llama_gqa", seed=1), tmp_path).config.base_digest == ""
    narrow = small(hidden_size=16)
    with pytest.raises(InputError, match="32 wide, this model 16"):
        Icae.from_pretrained(narrow, tmp_path)
    deep = small(num_key_value_heads=1)
    with pytest.raises(InputError, match="does not fit this model"):
        Icae.from_pretrained(deep, tmp_path)


def test_the_dtype_is_part_of_the_base(tmp_path: Path) -> None:
    made(build("llama_gqa")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another dtype is another base: .* \(now bfloat16\)"):
        Icae.from_pretrained(build("llama_gqa").bfloat16(), tmp_path)


@pytest.mark.parametrize(
    ("interface", "positions", "needed", "most"),
    [("soft", "contiguous", 41, 7), ("soft", "spread", 41, 7), ("kv", "contiguous", 41, 7), ("kv", "spread", 65, 4)],
)
def test_spans_beyond_the_models_positions_are_refused(
    interface: str, positions: str, needed: int, most: int, tmp_path: Path
) -> None:
    """Adapters are refused when they are made and when they are loaded; what encoder and decoder use fits to the last
    position."""
    config = IcaeConfig(8, interface=interface, positions=positions)
    fits = small(max_position_embeddings=needed)
    icae = made(fits, config)
    (slots,) = icae.encode([text(config.capacity)])
    row = restore_row(icae, slots, text(config.capacity), ends=False)
    assert row.start + len(row) == needed
    icae.save_pretrained(tmp_path)
    Icae.from_pretrained(fits, tmp_path)
    fits.config.max_position_embeddings = needed - 1
    said = f"8 slots of 4 tokens need {needed} positions, this model has {needed - 1}: at rate 4 at most 7 slots fit"
    with pytest.raises(InputError, match=said):
        made(fits, config)
    with pytest.raises(InputError):
        Icae.from_pretrained(fits, tmp_path)
    assert config.fitting(40) == most
    with pytest.raises(InputError, match="too much for any slot"):
        IcaeConfig(1, 50).check_fits(51)
    IcaeConfig(1000).check_fits(None)


@EVERY_FORM
@torch.no_grad()
def test_what_runs_beyond_the_models_positions_is_refused(config: IcaeConfig) -> None:
    """Slots of three spans, text and new tokens fit to the last position, whatever asks for them; a default is what
    fits."""
    ids, before = text(25), 25 if config is SPREAD else 12
    last = before + 1 + 25  # the slots, a row, the text
    icae = made(small(max_position_embeddings=last, eos_token_id=None), config)
    (slots,) = icae.encode([ids])
    assert (icae.limit, icae.config.before(25), icae.config.restoring(25)) == (last, before, last)
    assert len(restore(icae, slots)) == 26
    assert torch.isfinite(loss(icae, slots, ids))
    assert torch.isfinite(loss(icae, slots, [*ids, 5, 5], "lm"))  # no row, and the last token is read by nothing
    assert len(continue_(icae, slots, [5])) == len(answer(icae, [slots], [])) == 26
    said = f"need {last + 1} positions, this model has {last}"
    with pytest.raises(InputError, match=said):
        restore(icae, slots, max_new_tokens=27)
    with pytest.raises(InputError, match=said):
        loss(icae, slots, [*ids, 5, 5])
    with pytest.raises(InputError, match=said):
        logits(icae, [restore_row(icae, slots, [*ids, 5])])
    with pytest.raises(InputError, match=said):
        continue_(icae, slots, [5], max_new_tokens=27)
    with pytest.raises(InputError, match=f"need {before + 27} positions"):
        answer(icae, [slots], [5] * 26)
    several = [slots] * 5
    with pytest.raises(InputError, match=f"need {5 * before + 3} positions") as caught:
        answer(icae, several, [5, 6])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="60 slots stand on more than the 38 positions"):
        to_kv(made(small(max_position_embeddings=38)), torch.zeros(60, 32))


def test_a_context_is_as_long_as_can_be_restored() -> None:
    for config in (SOFT, KV, SPREAD, IcaeConfig(5, 1), IcaeConfig(3, 7)):
        for positions in range(config.needed(), 3 * config.needed()):
            most = config.longest(positions)
            assert config.restoring(most) <= positions < config.restoring(most + 1)
    assert SOFT.longest(1) == 0


ENTRIES = ("slots", "rate", "interface", "positions", "base_digest", "format")


WRONG_ENTRIES = (
    ({"format": 2}, "format 2"),
    ({"colour": "red"}, "colour"),
    ({"slots": 5}, "need 8"),
    ({"interface": "lines"}, "interface"),
    ({"rate": 4.0}, "rate is 4.0"),
    ({"rate": True}, "rate is True"),
    ({"lm_row": "false"}, "lm_row is 'false'"),
    ({"prefix_ids": "123"}, "prefix_ids is '123'"),
    ({"prefix_ids": [99999]}, "not 99999"),
    ({"suffix_ids": [-1]}, "not -1"),
    ({"positions": "spread"}, "do not belong together"),
    ({"digest": 5}, "digest is 5"),
)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    base = build("llama_gqa")
    with pytest.raises(ModelNotFound, match="no adapter folder"):
        Icae.from_pretrained(base, tmp_path / "missing")
    made(base).save_pretrained(tmp_path)
    config = (tmp_path / "icae_config.json").read_text()
    for wrong, match in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\x80", "damaged"),
        *((json.dumps(json.loads(config) | wrong), match) for wrong, match in WRONG_ENTRIES),
        *((json.dumps({n: v for n, v in json.loads(config).items() if n != name}), name) for name in ENTRIES),
    ):
        (tmp_path / "icae_config.json").write_text(wrong)
        with pytest.raises(InputError, match=match):
            Icae.from_pretrained(base, tmp_path)
    (tmp_path / "icae_config.json").write_text(config)
    (tmp_path / "icae_memory.safetensors").write_bytes(b"not at all")
    with pytest.raises(InputError, match="damaged"):
        Icae.from_pretrained(base, tmp_path)
    (tmp_path / "icae_config.json").unlink()  # as a kill in the middle of a save leaves it
    with pytest.raises(ModelNotFound, match=r"no icae_config\.json"):
        Icae.from_pretrained(base, tmp_path)


def test_weights_that_are_not_those_of_the_adapter_are_refused_and_the_base_stays(tmp_path: Path) -> None:
    """peft leaves a missing one untrained, and copies one with a name of the base into the base."""
    base = build("llama_gqa")
    made(base).save_pretrained(tmp_path)
    file, digest = tmp_path / "adapter_model.safetensors", reader_of(base).digest
    whole = load_file(file)
    some = next(name for name in whole if "lora_A" in name)
    for wrong, match in (
        ({name: t for name, t in whole.items() if name != some}, "it has nothing, the model takes"),
        ({**whole, some.replace("layers.0", "layers.9"): whole[some].clone()}, "the model takes nothing"),
        ({**whole, "base_model.model.model.norm.weight": torch.zeros(32)}, "the model takes nothing"),
        ({**whole, some: whole[some][:1].clone()}, r"it has \(1, 32\), the model takes \("),
        ({**whole, some: whole[some].to(torch.int8)}, "is of torch.int8"),
        ({**whole, some: whole[some].flip(0).contiguous()}, "do not belong together"),
        ({name: t.half() for name, t in whole.items()}, "do not belong together"),
    ):
        save_file(wrong, file)
        with pytest.raises(InputError, match=match):
            Icae.from_pretrained(base, tmp_path)
        assert reader_of(base).digest == digest
    save_file(whole, file)
    Icae.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("bias", "all"),
        ("modules_to_save", ["embed_tokens"]),
        ("use_dora", True),
        ("an_option_of_a_later_peft", 1),
        ("peft_type", "IA3"),
        ("lora_alpha", None),
        ("lora_alpha", 640.0),
        ("use_rslora", True),
        ("target_modules", "((("),
        ("target_modules", [["q_proj"]]),
        ("layers_pattern", "layers"),
        ("rank_pattern", None),
        ("lora_alpha", 10**400),
    ],
)
def test_settings_that_would_make_other_slots_of_the_same_weights_are_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    base = build("llama_gqa")
    made(base).save_pretrained(tmp_path)
    file, digest = tmp_path / "adapter_config.json", reader_of(base).digest
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"{name}|no LoRA|alpha is a number|do not belong|damaged|does not fit"):
        Icae.from_pretrained(base, tmp_path)
    assert reader_of(base).digest == digest


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_lora_weights", "gaussian"), ("auto_mapping", {"base_model_class": "L"}), ("use_dora", None)],
)
def test_settings_that_do_not_touch_slots_are_taken(name: str, value: Any, tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert Icae.from_pretrained(base, tmp_path).digest == icae.digest


def test_the_digest_follows_what_is_set_afterwards() -> None:
    icae = made(build("llama_gqa"))
    own = icae.digest
    icae.encoder.disable_adapter_layers()
    assert icae.digest != own
    icae.encoder.enable_adapter_layers()
    assert icae.digest == own
    icae.memory.data.add_(1)  # as a fused optimiser does, without a new version
    icae.requires_grad_(False)
    assert icae.digest != own
    own = icae.digest
    icae.config = replace(icae.config, positions="spread")
    assert icae.digest != own


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are found by hub id, here in the hub's local cache; an id that is not there is one error."""
    base, commit = build("llama_gqa"), "0" * 40
    icae = made(base)
    cached = tmp_path / "hub" / "models--some--adapter"
    icae.save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Icae.from_pretrained(base, "some/adapter").digest == icae.digest
    with pytest.raises(ModelNotFound, match="adapter 'some/thing' cannot be loaded: ") as caught:
        Icae.from_pretrained(base, "some/thing")
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_adapter(tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    icae.memory = nn.Parameter(icae.memory.detach().to("meta"))  # cannot be written
    with pytest.raises(NotImplementedError):
        icae.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_ends_half_way_is_refused(tmp_path: Path) -> None:
    """Folders with some new files and some old ones are no adapter until the adapter is saved again."""
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    rows = tmp_path / "icae_memory.safetensors"
    rows.rename(tmp_path / "aside")
    (rows / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="icae_memory"):
        icae.save_pretrained(tmp_path)
    (rows / "in the way").rmdir()
    rows.rmdir()
    (tmp_path / "aside").rename(rows)
    with pytest.raises(ModelNotFound, match=r"no icae_config\.json"):
        Icae.from_pretrained(base, tmp_path)
    icae.save_pretrained(tmp_path)
    assert Icae.from_pretrained(base, tmp_path).digest == icae.digest


def test_official_files(tmp_path: Path) -> None:
    """Folders that are no official checkpoint are refused. The numbers of an import are compared in tests/golden."""
    with pytest.raises(ModelNotFound, match="no file"):
        import_official(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "text").write_text("words")
    with pytest.raises(InputError, match="not a safetensors file"):
        import_official(tmp_path / "text", tmp_path / "out")
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(InputError, match="no official ICAE"):
        import_official(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
