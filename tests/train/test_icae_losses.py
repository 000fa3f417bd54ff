"""Losses of ICAE's training, against the plain model over embeddings."""

import pytest
import torch

from model_worker.icae import IcaeConfig
from model_worker.icae.objectives import Objectives, collate
from tests.support.diagonal import diagonal
from tests.train.icae_runs import BOS, adapter, mixed, nats_by_hand, words


def test_losses_are_those_of_the_plain_model_over_embeddings():
    icae = adapter(IcaeConfig(slots=4, prefix_ids=(BOS, 40, 41), suffix_ids=(42,)))
    for sample in mixed():
        found = Objectives(icae)(**collate([sample]))
        torch.testing.assert_close(found["loss"] * found["tokens"][0], nats_by_hand(icae, sample))
        assert int(found["tokens"]) == len(sample.scored)


def test_labels_count_the_scored_tokens_and_no_others():
    batch = collate(mixed())
    assert (batch["labels"] != -100).sum(-1).tolist() == [17, 4, 12, 6, 9]
    assert batch["labels"][2, :12].tolist() == words(20, 4)[8:]


def test_a_long_context_is_split_equally():
    assert [end.stop - end.start for end in adapter().spans(17)] == [9, 8]


@pytest.mark.parametrize(("interface", "positions"), [("soft", "contiguous"), ("soft", "spread"), ("kv", "spread")])
def test_a_batch_gives_what_its_samples_give_alone(interface: str, positions: str):
    """Padding is masked in a batch: else memory tokens of short contexts would attend to padding, as in the authors'
    v1."""
    icae = adapter(IcaeConfig(slots=4, interface=interface, positions=positions, prefix_ids=(BOS,)))
    model = Objectives(icae)
    together = model(**collate(mixed()))
    alone = [model(**collate([sample])) for sample in mixed()]
    torch.testing.assert_close(together["nats"], torch.cat([one["nats"] for one in alone]), rtol=1e-4, atol=1e-4)
    total = sum(len(sample.scored) for sample in mixed())
    torch.testing.assert_close(together["loss"], together["nats"].sum() / total)


@pytest.mark.parametrize(("interface", "tied"), diagonal(["soft", "kv"], {"untied": False, "tied": True}))
def test_gradient_checkpointing_gives_the_plain_gradient(interface: str, tied: bool):
    """Sharing one object with its adapter switched off gives wrong gradients: the recomputation runs with the adapter
    on."""
    found = []
    for checkpointed in (False, True):
        icae = adapter(IcaeConfig(slots=4, interface=interface, positions="spread"), tie_word_embeddings=tied)
        model = Objectives(icae)
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        model(**collate(mixed()))  # the first time, layers are probed
        runs: list[str] = []
        for name, part in (("encoder", icae.encoder.get_base_model()), ("decoder", icae.decoder)):
            part.model.layers[0].mlp.register_forward_pre_hook(lambda *_, name=name, runs=runs: runs.append(name))
        model(**collate(mixed()))["loss"].backward()
        assert runs.count("encoder") == runs.count("decoder") == (2 if checkpointed else 1)  # it does recompute
        found.append({name: p.grad for name, p in icae.named_parameters() if p.requires_grad})
    plain, recomputed = found
    assert all(gradient is not None and gradient.abs().sum() > 0 for n, gradient in plain.items() if "memory" in n)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_gradients_reach_lora_and_rows_only():
    icae = adapter()
    Objectives(icae)(**collate(mixed()))["loss"].backward()
    for name, parameter in icae.named_parameters():
        trained = "lora_" in name or name == "memory"
        assert (parameter.grad is not None) == trained == parameter.requires_grad, name
    assert all(p.grad is None for p in icae.base_model.parameters())
