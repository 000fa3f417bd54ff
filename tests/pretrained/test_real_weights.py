"""The real pretrained models, where they are in the cache of the machine."""

import numpy as np
import torch

from model_worker.attachment.loading import load_model
from model_worker.embed import embedder
from tests.support.weights import weights


def test_smollm2_knows_what_it_was_trained_on_and_its_chat_template() -> None:
    weights("smollm2")
    model, tokenizer = load_model("smollm2")
    assert (model.dtype, model.config.num_hidden_layers, len(tokenizer)) == (torch.float32, 30, 49_152)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False)
    assert turn.endswith("<|im_start|>user\nHello.<|im_end|>\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_minilm_finds_a_paraphrase() -> None:
    weights("minilm")
    found = embedder("minilm").embed(["How old is she?", "Her age is forty.", "The ship left the harbour."])
    assert found.shape == (3, 384)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2]
