"""Half of the layers of a pretrained model keep what all of them recall; single layers do not tell which half."""

from collections.abc import Iterator

import pytest

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.loading import load_model
from model_worker.errors import ModelNotFound
from model_worker.evaluate.choosing_layers import bytes_per_token
from model_worker.evaluate.planted import Planting, plant
from model_worker.evaluate.recall_by_layers import RecallByLayers
from model_worker.text_files import reference_text
from model_worker.user_text import encode_text

# What `kvbank layers --choose` finds, and the five layers whose memory alone helps most (`kvbank layers`).
HALF = (0, 5, 6, 7, 8, 10, 11, 14, 17, 18, 19, 20, 21, 22, 23)
BEST_ALONE = (17, 18, 20, 23, 24)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Attachment]:
    """Yield SmolLM2-135M-Instruct with memory in all layers, where its weights are in the cache."""
    try:
        model, tokenizer = load_model("smollm2")
    except ModelNotFound as error:
        pytest.skip(str(error))
    attachment = attach(model, tokenizer, mode="per_layer", retrieval_layers=range(30))
    yield attachment
    attachment.detach()


@pytest.mark.slow
def test_half_of_the_layers_keep_the_recall(smollm2: Attachment) -> None:
    ids = encode_text(smollm2.tokenizer, reference_text()[:60_000])
    facts = plant(smollm2.tokenizer, ids, Planting(chunk=64), 8, seed=1)
    asked = RecallByLayers(smollm2, facts, ids, context="window", hits=1)
    every, half, alone, none = (asked.told(own).right.sum() for own in (range(30), HALF, BEST_ALONE, ()))
    assert every >= 7
    assert half >= 0.95 * every
    assert (alone, none) == (0, 0)
    assert 2 * bytes_per_token(smollm2, HALF) == bytes_per_token(smollm2, tuple(range(30))) == 46_080
