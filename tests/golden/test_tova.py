"""One-shot TOVA against the authors' code, and against kvpress where the two rules agree.

The compressor reduces a chunk once, after one forward: that is the authors' rule for a prompt, so the prefill of their
decoding runs and their runs with one block are matched; their step-by-step reductions are another method. Tolerances
as the vectors' README asks: positions exact, scores 2e-6, keys, values and logits 5e-5.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from vectors import Case, tova_case, tova_cases, worst

from model_worker.attachment import Attachment, attach
from model_worker.capture import Captured
from model_worker.compress import compressor
from model_worker.compress.tova import Tova, kept_positions
from model_worker.memory import encode

SCORES, TENSORS = 2e-6, 5e-5
CASES = {path: tova_case(path).about for path in tova_cases()}
OFFICIAL = [
    path
    for path, about in CASES.items()
    if about.get("mode") == "decode" or (about.get("mode") == "blocks" and about["block"] == about["prompt_len"])
]
KVPRESS = [path for path, about in CASES.items() if "kvpress" in about]


def captured(case: Case, ids: Tensor) -> tuple[Attachment, Captured, Tensor]:
    """The chunk as one forward left it, and that forward's logits."""
    attachment = attach(LlamaForCausalLM.from_pretrained(case.folder / case.about["model"]).eval())
    with torch.no_grad():
        logits = attachment.model(ids[None]).logits[0]
    return attachment, encode(attachment, ids.tolist(), needs_queries=True), logits


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda p: p.stem)
def test_authors_prompt_reduction(path: Path) -> None:
    case = tova_case(path)
    have = case.tensors
    attachment, chunk, logits = captured(case, have["prompt_ids"])
    method = compressor(f"tova:m={case.about['cache_size']}")
    assert isinstance(method, Tova)
    payload = method.compress(chunk, attachment)
    decoding = case.about["mode"] == "decode"
    kept = have["kept_prefill"] if decoding else have["kept_blocks"][-1]
    stored = [have[f"{kind}_{'prefill' if decoding else 'final'}"] for kind in ("keys", "values")]
    errors = {"logits": worst(logits, have["prefill_logits" if decoding else "logits"])}
    for layer, (keys, values, offsets) in payload.layers.items():
        assert offsets.tolist() == kept[layer].tolist()
        if decoding:
            scores = method.scores(chunk.layers[layer], layer, attachment)
            errors[f"scores {layer}"] = worst(scores, have["scores_prefill"][layer])
        rotated = attachment.ropes[layer].rotate(keys[None], offsets[None].long())[0]
        errors[f"keys {layer}"] = worst(rotated, stored[0][layer])
        errors[f"values {layer}"] = worst(values, stored[1][layer])
    check(case, errors)


@pytest.mark.parametrize("path", KVPRESS, ids=lambda p: p.stem)
def test_kvpress(path: Path) -> None:
    """kvpress always keeps the last token, whose recorded score is artificial: it is left out on both sides."""
    case = tova_case(path)
    have, budget = case.tensors, case.about["n_kept"]
    attachment, chunk, logits = captured(case, have["input_ids"])
    last = len(chunk) - 1
    errors = {"logits": worst(logits, have["logits"])}
    for layer, seen in chunk.layers.items():
        rope = attachment.ropes[layer]
        scores = Tova(budget).scores(seen, layer, attachment)
        theirs = have["scores"][layer, :, :last]
        errors[f"scores {layer}"] = worst(scores[:last].expand_as(theirs), theirs)
        for head in have["kept_indices"][layer]:
            assert [*kept_positions(scores[:last], budget - 1).tolist(), last] == sorted(head.tolist())
        errors[f"plain keys {layer}"] = worst(seen.keys, have["prerope_keys_full"][layer])
        rotated = rope.rotate(seen.keys[None], torch.arange(len(chunk))[None])[0]
        errors[f"keys {layer}"] = worst(rotated, have["keys_full"][layer])
        errors[f"values {layer}"] = worst(seen.values, have["values_full"][layer])
        kept = have["kept_indices"][layer, 0].sort().values
        packed = rope.rotate(seen.keys[None, :, kept], torch.arange(budget)[None])[0]
        errors[f"packed keys {layer}"] = worst(packed, have["rerotated_keys"][layer])
        errors[f"packed values {layer}"] = worst(seen.values[:, kept], have["rerotated_values"][layer])
    check(case, errors)


def check(case: Case, errors: dict[str, float]) -> None:
    scores = max((e for name, e in errors.items() if name.startswith("scores")), default=0.0)
    tensors = max(e for name, e in errors.items() if not name.startswith("scores"))
    print(f"{case.name}: scores {scores:.1e}, keys, values and logits {tensors:.1e}")
    assert scores <= SCORES, errors
    assert tensors <= TENSORS, errors
