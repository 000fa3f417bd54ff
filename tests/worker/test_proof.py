"""Attach proves itself on the model at hand: families that do not exist yet are exact, or refused with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from model_worker.attaching import attach
from model_worker.errors import UnsupportedModel
from tests.worker import zoo
from tests.worker.tiny import VOCABULARY, build, tokens


class Future(LlamaAttention):
    """Llama's attention in pieces, each of which a family may do otherwise."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key, value = self.turned(query, key, value, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        query, key, value, attention_mask = self.changed(query, key, value, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        out = self.after(out, query, key, value, attend, attention_mask, kwargs)
        return self.o_proj(out.reshape(*shape[:-2], -1)), weights

    def turned(self, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return query, key, value

    def changed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return query, key, value, mask

    def after(self, out: Tensor, *_: Any) -> Tensor:
        return out


class Same(Future):
    """A cache in which nothing is otherwise, so that what is refused below is refused for its difference."""


class TurnedValues(Future):
    def turned(self, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return query, key, apply_rotary_pos_emb(value, value, *rotation)[0]


class LogarithmOfTheLength(Future):
    """Scores grow with the number of keys, as in some models for long contexts."""

    def changed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        return query * torch.log(torch.tensor(1.0 + key.shape[2])), key, value, mask


class MaskOfItsOwn(Future):
    """A penalty for distance in the mask, as ALiBi has it, on top of rotary positions."""

    def changed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        queries, keys = query.shape[2], key.shape[2]
        age = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        return query, key, value, torch.where(age >= 0, -0.5 * age, -torch.inf)[None, None]


class TwoCalls(Future):
    def after(
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, attend: Any, mask: Any, kwargs: Any
    ) -> Tensor:
        second, _ = attend(self, query.flip(-1), key, value, mask, scaling=self.scaling, **kwargs)
        return out - 0.5 * second


class SelfFirst(Future):
    """Each token's own value once more, and the mean of all others' outside of attention."""

    def after(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        mean = value.cumsum(2)[:, :, -query.shape[2] :].transpose(1, 2)
        return out + 0.1 * mean.repeat_interleave(self.num_key_value_groups, dim=2)


class SharedKeys(Future):
    """Odd layers attend to the keys of the layer below."""

    shared: dict[int, tuple[Tensor, Tensor]] = {}  # noqa: RUF012

    def changed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        if self.layer_idx % 2 == 0:
            self.shared[self.layer_idx] = key, value
        else:
            key, value = self.shared[self.layer_idx - 1]
        return query, key, value, mask


def made_of(attention: type[Future]) -> PreTrainedModel:
    net = build("llama_gqa")
    for index, layer in enumerate(net.base_model.layers):
        own = attention(net.config, index)
        own.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = own
    return net.eval()


def test_a_family_without_differences_is_taken() -> None:
    net, llama, ids = made_of(Same), build("llama_gqa"), tokens(8)
    assert torch.equal(net(ids).logits, llama(ids).logits)
    attach(net).detach()


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (TurnedValues, "free of position"),
        (LogarithmOfTheLength, "remembered are not the same"),
        (MaskOfItsOwn, "remembered are not the same"),
        (TwoCalls, "runs 2 times"),
        (SelfFirst, "remembered are not the same"),
        (SharedKeys, "K-V of another layer"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_that_differs_is_refused(attention: type[Future], reason: str, dtype: torch.dtype) -> None:
    net = made_of(attention).to(dtype)
    with pytest.raises(UnsupportedModel, match=reason):
        attach(net)
    assert net.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("dbrx", torch.bfloat16), ("dbrx", torch.float16), ("granitemoe_swa", torch.bfloat16)],
)
def test_experts_that_rounding_chooses_are_no_other_attention(family: str, dtype: torch.dtype) -> None:
    """Routers of these models choose other experts on the first text with a memory, or at other positions."""
    attach(zoo.build(family, seed=1).to(dtype)).detach()


def test_a_state_beside_the_cache_is_refused() -> None:
    """States that a layer keeps outside of keys and values do not come back with a memory."""
    net = build("llama_gqa")

    class Recurrent(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.2 * x.cumsum(1)

    layer = net.base_model.layers[1]
    layer.mlp = Recurrent(layer.mlp)
    with pytest.raises(UnsupportedModel, match="remembered are not the same"):
        attach(net)


@pytest.mark.parametrize("training", [True, False])
def test_the_proof_leaves_the_model_as_it_was(training: bool, model: Callable[[str], PreTrainedModel]) -> None:
    """Find each module in its own mode afterwards: a part that is frozen while the rest is trained stays frozen."""
    net = build("llama_gqa").train(training)
    net.get_submodule("model.layers.1").train(not training)
    modes, state = [module.training for module in net.modules()], torch.get_rng_state()
    attach(net).detach()
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert net.config.vocab_size == VOCABULARY
