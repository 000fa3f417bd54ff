"""ICAE against the authors' code: slots, logits, losses, the K-V of the slots, greedy texts.

Tolerances as the vectors' README asks (fp32): slots 5e-5, logits 3e-4, loss 3e-5, keys and values 2e-4, ids exactly.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model_worker.icae import Icae, IcaeConfig, Slots, answer, continue_, loss, restore, to_kv
from model_worker.icae.decode import generate, logits
from model_worker.icae.layout import Row, answer_row, continue_row, restore_row
from model_worker.icae.official import import_official
from tests.golden.vectors import Case, icae_case, icae_cases, worst
from tests.support.diagonal import rotated

SLOTS, LOGITS, LOSS, KV = 5e-5, 3e-4, 3e-5, 2e-4
CASES = {path: icae_case(path).about for path in icae_cases()}
MODELS = sorted({about["model"] for about in CASES.values()})
every_case = pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
every_source = pytest.mark.parametrize("source", ["folder", pytest.param("official", marks=pytest.mark.slow)])
some_sources = pytest.mark.parametrize("source", ["official", pytest.param("folder", marks=pytest.mark.slow)])


class Recorded:
    """The decoder's sequence of a case, taken apart."""

    def __init__(self, case: Case):
        self.case, self.ids = case, case.tensors["prompt_answer_ids"].tolist()
        about, labels = case.about, case.tensors["labels"]
        first = self.ids.index(about["first_mem_id"])
        after = first + about["slots"]
        self.prefix, self.rest = self.ids[:first], self.ids[after:]
        self.lm_row = self.rest[0] == about["lm_token_id"]
        rows = {about[f"{name}_token_id"] for name in ("ae", "lm", "ft")}
        self.text = [token for token in self.rest if token not in rows]
        self.scored = int((labels != -100).sum())

    @property
    def config(self) -> IcaeConfig:
        about = self.case.about
        return IcaeConfig(about["k"], about["mean_compression_rate"], lm_row=self.lm_row, prefix_ids=tuple(self.prefix))

    def row(self, icae: Icae, slots: Slots) -> Row:
        """Lay the same sequence out by our layout."""
        text, scored = self.text, self.scored
        if self.case.about["objective"] == "ae":
            return restore_row(icae, slots, self.without_end(text))
        if self.case.about["objective"] == "lm":
            return continue_row(icae, slots, text, leave=len(text) - scored)
        return answer_row(icae, slots, text[:-scored], self.without_end(text[-scored:]))

    def without_end(self, ids: list[int]) -> list[int]:
        assert ids[-1] == self.case.about["eos_id"]
        return ids[:-1]

    def greedy(self, icae: Icae, slots: Slots) -> list[int]:
        most = max(12, len(self.case.tensors["greedy_ids"]))
        if self.case.about["objective"] == "ae":
            return restore(icae, slots, max_new_tokens=most)
        if self.case.about["objective"] == "lm":
            return continue_(icae, slots, self.text[: -self.scored], max_new_tokens=most)
        return answer(icae, [slots], self.text[: -self.scored], max_new_tokens=most)


def base_of(case: Case) -> Any:
    base = AutoModelForCausalLM.from_pretrained(case.folder / "base", dtype=torch.float32).eval()
    base.config.bos_token_id, base.config.eos_token_id = case.about["bos_id"], case.about["eos_id"]
    return base


def load(case: Case, config: IcaeConfig, folder: Path, source: str = "folder") -> Icae:
    """Load the recorded adapter as a folder of ours: put together by hand, or imported from the authors' layout."""
    if source == "official":
        lora = load_file(case.folder / "adapter" / "adapter_model.safetensors")
        flat = {"icae." + name.replace(".weight", ".default.weight"): tensor for name, tensor in lora.items()}
        copies = {f"decoder.{name}": t for name, t in load_file(case.folder / "base" / "model.safetensors").items()}
        rows = load_file(case.folder / "memory.safetensors")
        save_file({**flat, **copies, **rows}, folder / "flat.safetensors")
        made = import_official(
            folder / "flat.safetensors",
            folder / "own",
            rate=config.rate,
            alpha=json.loads((case.folder / "adapter" / "adapter_config.json").read_text())["lora_alpha"],
            base=base_of(case),
            prefix_ids=config.prefix_ids,
        )
        assert made.slots == config.slots
        if config.lm_row:
            said = json.loads((folder / "own" / "icae_config.json").read_text())
            (folder / "own" / "icae_config.json").write_text(json.dumps(said | {"lm_row": True}))
    else:
        shutil.copytree(case.folder / "adapter", folder / "own")
        shutil.copy(case.folder / "memory.safetensors", folder / "own" / "icae_memory.safetensors")
        (folder / "own" / "icae_config.json").write_text(config.to_json())
    return Icae.from_pretrained(base_of(case), folder / "own")


@every_source
@every_case
@torch.no_grad()
def test_authors_numbers(path: Path, source: str, tmp_path: Path) -> None:
    """Equal spans, slots after the final norm, the decoder's sequence, labels, logits and loss, the K-V of slots."""
    case = icae_case(path)
    have, about, recorded = case.tensors, case.about, Recorded(case)
    icae = load(case, recorded.config, tmp_path, source)
    (slots,) = icae.encode([have["input_ids"].tolist()])
    assert slots.soft is not None
    assert len(slots.lengths) == about["num_segments"]
    assert slots.lengths[0] == about["segment_length"]
    found = {"slots": worst(slots.soft, have["memory_slots"])}
    row = recorded.row(icae, slots)
    assert row.labels.tolist() == have["labels"].tolist()
    (own,) = logits(icae, [row])
    found["logits"] = worst(own, have["logits"])
    recorded_loss = have["loss"][0]
    if about["objective"] == "lm":
        mean = loss(icae, slots, recorded.text, "lm", leave=len(recorded.text) - recorded.scored)
    elif about["objective"] == "ae":
        mean = loss(icae, slots, recorded.without_end(recorded.text))
    else:
        mean = torch.nn.functional.cross_entropy(own[:-1], row.labels[1:])
    found["loss"] = worst(mean, recorded_loss)
    kv = to_kv(icae, slots.soft)
    places = torch.arange(len(slots))[None]
    for layer, (keys, values) in kv.items():
        rotated = icae.reader.ropes[layer].rotate(keys[None], places)[0]
        found[f"keys {layer}"] = worst(keys, have["slot_keys_norope"][layer])
        found[f"rotated keys {layer}"] = worst(rotated, have["slot_keys_rope"][layer])
        found[f"values {layer}"] = worst(values, have["slot_values"][layer])
    assert sorted(kv) == list(range(len(have["slot_values"])))
    print(case.name, {name: f"{error:.1e}" for name, error in found.items()})
    bounds = {"slots": SLOTS, "logits": LOGITS, "loss": LOSS}
    assert all(error <= bounds.get(name, KV) for name, error in found.items()), found


@some_sources
@pytest.mark.parametrize("path", rotated([*CASES], 0, every=2), ids=lambda p: p.stem)
def test_authors_greedy(path: Path, source: str, tmp_path: Path) -> None:
    case, recorded = icae_case(path), Recorded(icae_case(path))
    icae = load(case, recorded.config, tmp_path, source)
    with torch.no_grad():
        (slots,) = icae.encode([case.tensors["input_ids"].tolist()])
    expected = case.tensors["greedy_ids"].tolist()
    ended = expected[-1] == case.about["eos_id"]
    assert recorded.greedy(icae, slots) == expected[: len(expected) - ended]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_batch(name: str, tmp_path: Path) -> None:
    """Contexts of a model in one padded batch, and their restorations in another, are as recorded."""
    cases = [icae_case(path) for path, about in CASES.items() if about["model"] == name]
    icae = load(cases[0], Recorded(cases[0]).config, tmp_path)
    slots = icae.encode([case.tensors["input_ids"].tolist() for case in cases])
    for case, own in zip(cases, slots, strict=True):
        assert own.soft is not None
        assert worst(own.soft, case.tensors["memory_slots"]) <= SLOTS
    pairs = [(c, s) for c, s in zip(cases, slots, strict=True) if c.about["objective"] == "ae"]
    if not pairs:
        return
    rows = [Recorded(case).row(icae, own) for case, own in pairs]
    for (case, _), own in zip(pairs, logits(icae, rows), strict=True):
        assert worst(own, case.tensors["logits"]) <= LOGITS
    texts = generate(icae, [restore_row(icae, own, (), ends=False) for _, own in pairs], 12)
    for (case, _), text in zip(pairs, texts, strict=True):
        expected = case.tensors["greedy_ids"].tolist()
        assert text == expected[: len(expected) - (expected[-1] == case.about["eos_id"])]


@pytest.mark.parametrize("path", [p for p, about in CASES.items() if about["objective"] == "ae"], ids=lambda p: p.stem)
@torch.no_grad()
def test_kv_in_place_of_slots(path: Path, tmp_path: Path) -> None:
    """Slots that stand first may be read as embeddings or as their K-V: the same logits and the same text."""
    case, recorded = icae_case(path), Recorded(icae_case(path))
    icae = load(case, recorded.config, tmp_path)
    (slots,) = icae.encode([case.tensors["input_ids"].tolist()])
    assert slots.soft is not None
    n, whole = len(slots), recorded.row(icae, slots)
    kv = to_kv(icae, slots.soft)

    def after(count: int | None) -> Row:
        return Row(whole.embeds[n:count], whole.labels[n:count], n, kv, slots.positions)

    (own,) = logits(icae, [after(None)])
    assert worst(own, case.tensors["logits"][n:]) <= LOGITS
    expected = case.tensors["greedy_ids"].tolist()
    (text,) = generate(icae, [after(n + 1)], 12)
    assert text == expected[: len(expected) - (expected[-1] == case.about["eos_id"])]
