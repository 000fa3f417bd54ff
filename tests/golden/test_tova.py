"""TOVA against the authors' code: one-shot, block by block, and at decode time; and against kvpress where rules agree.

Tolerances as the vectors' README asks: positions exact, scores 2e-6, keys, values and logits 5e-5.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.compress import Payload, compressor
from model_worker.compress.tova import Tova
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.selection import kept_positions
from model_worker.window.tova import TovaRule
from tests.golden.vectors import Case, tova_case, tova_cases, worst
from tests.support.diagonal import rotated

SCORES, TENSORS = 2e-6, 5e-5
CASES = {path: tova_case(path).about for path in tova_cases()}
DECODE = [path for path, about in CASES.items() if about.get("mode") == "decode"]
BLOCKS = [path for path, about in CASES.items() if about.get("mode") == "blocks"]
KVPRESS = [path for path, about in CASES.items() if "kvpress" in about]


def captured(case: Case, ids: Tensor) -> tuple[Attachment, Captured, Tensor]:
    """Return the chunk as one forward left it, and that forward's logits."""
    attachment = attach(LlamaForCausalLM.from_pretrained(case.folder / case.about["model"]).eval())
    with torch.no_grad():
        logits = attachment.model(ids[None]).logits[0]
    return attachment, encode(attachment, ids.tolist(), needs_queries=True), logits


@pytest.mark.parametrize("path", rotated(DECODE, 1, every=2), ids=lambda p: p.stem)
def test_authors_prompt_reduction(path: Path) -> None:
    """Compressing reduces a chunk once, which is the authors' rule for a prompt."""
    case = tova_case(path)
    have = case.tensors
    attachment, chunk, logits = captured(case, have["prompt_ids"])
    method = compressor(f"tova:m={case.about['cache_size']}")
    assert isinstance(method, Tova)
    errors = {"logits": worst(logits, have["prefill_logits"])}
    for layer, seen in chunk.layers.items():
        errors[f"scores {layer}"] = worst(method.scores(seen, layer, attachment), have["scores_prefill"][layer])
    payload = method.compress(chunk, attachment)
    errors |= compare(attachment, payload, have["kept_prefill"], have["keys_prefill"], have["values_prefill"])
    check(case, errors)


@pytest.mark.parametrize("path", rotated(BLOCKS, 0, every=2), ids=lambda p: p.stem)
def test_authors_blocks(path: Path) -> None:
    """Compressing with `block=b` gives the recorded logits and every reduction in the cache; with one block the
    one-shot compressor does so too."""
    case = tova_case(path)
    have, about = case.tensors, case.about
    ids, budget, block = have["prompt_ids"], about["cache_size"], about["block"]
    attachment = attach(LlamaForCausalLM.from_pretrained(case.folder / about["model"]).eval())
    cache = MemoryCache(attachment, window=len(ids), local=TovaRule(budget))
    logits = []
    for part, kept in zip(ids.split(block), have["kept_blocks"], strict=True):
        logits.append(step(attachment, cache, part))
        same_positions(cache, kept)
    errors = {"logits": worst(torch.cat(logits), have["logits"])}
    methods = [f"tova:m={budget},block={block}"] + ["tova:m=" + str(budget)] * (block == len(ids))
    for spec in methods:
        method = compressor(spec)
        chunk = encode(attachment, ids.tolist(), needs_queries=method.needs_queries)
        payload = method.compress(chunk, attachment)
        found = compare(attachment, payload, have["kept_blocks"][-1], have["keys_final"], have["values_final"])
        errors |= {f"{spec} {name}": error for name, error in found.items()}
    check(case, errors)


@pytest.mark.parametrize("path", rotated(DECODE, 0, every=2), ids=lambda p: p.stem)
def test_authors_decoding(path: Path) -> None:
    """Decoding with a `MemoryCache` and the rule of TOVA gives the recorded logits, scores and tokens in the cache
    after every step."""
    case = tova_case(path)
    have, budget = case.tensors, case.about["cache_size"]
    attachment = attach(LlamaForCausalLM.from_pretrained(case.folder / case.about["model"]).eval())
    rule = Watched(budget)
    cache = MemoryCache(attachment, window=budget, local=rule)
    errors = {"prefill logits": worst(step(attachment, cache, have["prompt_ids"]), have["prefill_logits"])}
    same_positions(cache, have["kept_prefill"])
    for index, token in enumerate(have["forced_ids"]):
        before = len(rule.seen)
        orders = [torch.cat([at, at.new_tensor([len(have["prompt_ids"]) + index])]).argsort() for at in held(cache)]
        errors[f"logits {index}"] = worst(step(attachment, cache, token[None])[0], have["step_logits"][index])
        assert cache.get_seq_length() - 1 == have["query_position"][index + 1]
        same_positions(cache, have["kept_steps"][index])
        for layer, (scores, order) in enumerate(
            zip(rule.seen[before:], orders, strict=False)
        ):  # none while there is room
            errors[f"scores {index} {layer}"] = worst(scores[order], have["scores_steps"][index, layer, : len(order)])
    for layer, kept in enumerate(cache.layers):
        kept.settle()
        errors[f"keys {layer}"] = worst(kept.keys[0], have["keys_final"][layer])
        errors[f"values {layer}"] = worst(kept.values[0], have["values_final"][layer])
    check(case, errors)


@dataclass(frozen=True)
class Watched(TovaRule):
    """The rule, and the scores it saw, in the order in which tokens are held."""

    seen: list[Tensor] = field(default_factory=list)

    def scores(self, weights: Tensor, kv_heads: int, valid: Tensor | None = None) -> Tensor:
        scores = super().scores(weights, kv_heads, valid)
        self.seen.append(scores[0, 0])
        return scores


def held(cache: MemoryCache) -> list[Tensor]:
    """Positions of the tokens in each layer: in no order while single tokens come and go."""
    return [layer.positions[0, 0] for layer in cache.layers]


def step(attachment: Attachment, cache: MemoryCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return attachment.model(ids[None], past_key_values=cache).logits[0]


def same_positions(cache: MemoryCache, kept: Tensor) -> None:
    for positions, expected in zip(held(cache), kept, strict=True):
        assert sorted(positions.tolist()) == [p for p in expected.tolist() if p >= 0]


def compare(attachment: Attachment, payload: Payload, kept: Tensor, keys: Tensor, values: Tensor) -> dict[str, float]:
    errors = {}
    for layer, (own_keys, own_values, offsets) in payload.layers.items():
        assert offsets.tolist() == [p for p in kept[layer].tolist() if p >= 0]  # padded with -1
        rotated = attachment.ropes[layer].rotate(own_keys[None], offsets[None].long())[0]
        errors[f"keys {layer}"] = worst(rotated, keys[layer])
        errors[f"values {layer}"] = worst(own_values, values[layer])
    return errors


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
