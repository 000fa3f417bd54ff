"""Hugging Face generate() over a real memory, with its options, and the window during long texts."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextIteratorStreamer, TextStreamer

import kvbank
from model_worker.attachment.attention import _SPARE, RetrievedKV, retrieval_causal_attention
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from model_worker.window.queries import Queries
from tests.support.diagonal import rotated
from tests.worker.tiny import ListMemory, attached, bank, build, recalled, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
CHUNK, WINDOW = 8, 24


@pytest.fixture
def chat(client: kvbank.Client) -> Iterator[MemoryModel]:
    """Let a model read 64 tokens into a bank."""
    with MemoryModel(
        build("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=CHUNK, window=WINDOW, top_k=4
    ) as chat:
        assert chat.read(tokens(64, seed=2)[0].tolist()) == 64
        yield chat


PROMPT = tokens(20, seed=3)[0].tolist()
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def plain(chat: MemoryModel, prompt: list[int]) -> str:
    """Feed the same prompt in the same pieces, without the memory."""
    return str(chat.generate(prompt, cache=chat.cache(memory=False), **GREEDY))


def test_greedy_is_repeatable_and_uses_the_memory(chat: MemoryModel) -> None:
    first = chat.generate(PROMPT, **GREEDY)
    assert chat.memory.stats.recalls > 0
    assert chat.client.get_bank(chat.memory.bank).usage.chunks > 64 // CHUNK  # the prompt was remembered too
    assert first != plain(chat, PROMPT)


def test_sampling_with_a_seed(chat: MemoryModel) -> None:
    quiet = chat.with_bank(chat.memory.bank)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        cache = MemoryCache(chat.attachment, Quiet(quiet), window=WINDOW)
        texts.append(chat.generate(PROMPT, cache=cache, do_sample=True, temperature=2.0, max_new_tokens=12))
    assert texts[0] == texts[1] != texts[2]


class Quiet:
    """A real memory of which one only recalls, so that runs can be compared."""

    def __init__(self, memory: object):
        self._memory = memory

    def __getattr__(self, name: str) -> object:
        return (lambda rows: None) if name == "remember" else getattr(self._memory, name)


def test_streaming_is_the_same_text(chat: MemoryModel, capsys: pytest.CaptureFixture[str]) -> None:
    memory = Quiet(chat.with_bank(chat.memory.bank))
    text = chat.generate(PROMPT, cache=MemoryCache(chat.attachment, memory, window=WINDOW), **GREEDY)
    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cache = MemoryCache(chat.attachment, memory, window=WINDOW)
    thread = Thread(target=chat.generate, args=(PROMPT,), kwargs={"cache": cache, "streamer": streamer, **GREEDY})
    thread.start()
    assert "".join(streamer).strip() == text
    thread.join()
    printer = TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    chat.generate(PROMPT, cache=MemoryCache(chat.attachment, memory, window=WINDOW), streamer=printer, **GREEDY)
    assert capsys.readouterr().out.strip() == text


def test_row_in_a_batch_is_the_row_alone(model: Models) -> None:
    """Left pads, and a memory of other length for each row."""
    net, long, short = model("llama_gqa"), tokens(10, seed=4), tokens(6, seed=5)
    pad = torch.zeros(1, 4, dtype=torch.long)
    ids = torch.cat([long, torch.cat([pad, short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    with attached(net) as attachment:
        memories = [
            recalled(
                [encode(attachment, tokens(7, seed=6)[0].tolist()), encode(attachment, tokens(5, seed=7)[0].tolist())]
            ),
            recalled([encode(attachment, tokens(3, seed=8)[0].tolist())]),
        ]

        def run(rows: list[int], ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
            cache = MemoryCache(attachment)
            cache.set_memory([memories[row] for row in rows])
            return list(net.generate(ids, attention_mask=mask, past_key_values=cache, **options).logits)

        both = run([0, 1], ids, mask)
        for row, alone in enumerate((long, short)):
            for together, single in zip(both, run([row], alone, torch.ones_like(alone)), strict=True):
                assert worst(together[row], single[0]) <= 1e-5


def test_batch_of_prompts_over_banks(chat: MemoryModel) -> None:
    """Rows have a bank each; their chunks go there and nowhere else."""
    names = [bank(), bank()]
    memory = chat.with_bank(names)
    cache = MemoryCache(chat.attachment, memory, window=WINDOW)
    prompts = ["w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24", "w30 w31 w32"]
    texts = chat.generate(prompts, cache=cache, **GREEDY)
    cache.flush()
    assert len(texts) == 2
    for name, prompt, text in zip(names, prompts, texts, strict=True):
        stored = sorted(chat.client.list_chunks(name), key=lambda c: c.start)
        words = " ".join(c.text for c in stored).split()
        assert words[: len(prompt.split())] == prompt.split()
        assert [c.start for c in stored] == [sum(c.original_length for c in stored[:i]) for i in range(len(stored))]
        assert set(text.split()) <= {*words, text.split()[-1]}


def test_window_holds_during_a_long_text(model: Models) -> None:
    """Windows never exceed their bound; what leaves comes in order, complete, with its offsets."""
    net, prompt = model("llama_gqa"), tokens(6)
    with attached(net) as attachment:
        memory = ListMemory(CHUNK)
        cache = MemoryCache(attachment, memory, window=WINDOW)
        seen: list[int] = []
        handle = net.base_model.register_forward_hook(lambda *_: seen.append(cache.physical))
        out = net.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False, max_new_tokens=60
        )[0].tolist()
        handle.remove()
        cache.flush()
    assert max(seen) == WINDOW
    assert [i for c in memory.rows[0] for i in c.token_ids] == out[:-1]  # the last token was never fed
    assert [c.start for c in memory.rows[0]] == list(range(0, len(out) - 1, CHUNK))


@pytest.mark.parametrize("positions", ["continual", "zero", "original"])
def test_counting_from_the_window_changes_nothing(positions: str) -> None:
    """Long conversations forget the ids of what has left; logits, offsets and chunks stay what they were."""
    net, ids, runs = build("llama_gqa", positions=32), tokens(40), []
    with attached(net, positions=positions) as attachment, torch.no_grad():
        for every in (1000, 7):
            memory = ListMemory(4)
            cache = MemoryCache(attachment, memory, window=16)
            parts = []
            for step, part in enumerate(ids.split(1, 1)):
                if step % every == every - 1:
                    cache.count_from_window()
                    assert cache.get_seq_length() == cache.physical
                parts.append(net(part, past_key_values=cache).logits)
            cache.flush()
            runs.append((torch.cat(parts, 1), [(c.start, c.token_ids) for c in memory.rows[0]]))
    assert worst(runs[0][0], runs[1][0]) <= 1e-5
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize(
    ("family", "positions"),
    rotated(
        [("llama_gqa", "continual"), ("llama_gqa", "original"), ("llama_gqa", "zero"), ("llama_yarn", "zero")],
        1,
        every=2,
    ),
)
def test_rebase_keeps_the_output(family: str, positions: str) -> None:
    """Beyond the trained length keys are moved back; a model trained for longer is the yardstick."""
    ids, logits = tokens(60), []
    for trained in (32, 512):
        net = build(family, positions=trained)
        with attached(net, positions=positions) as attachment, torch.no_grad():
            cache = MemoryCache(attachment, ListMemory(4, recalls=False), window=16)
            cache.set_memory([recalled([encode(attachment, tokens(6, seed=9)[0].tolist())])])
            parts, highest = [], 0
            for part in ids.split(1, 1):
                parts.append(net(part, past_key_values=cache).logits)
                highest = max(highest, int(cache.columns.positions.max()))
            assert (highest < 32) == (trained == 32)
            logits.append(torch.cat(parts, 1))
    assert worst(*logits) <= 1e-4


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param((torch.no_grad, torch.no_grad), marks=pytest.mark.slow, id="no grad"),
        pytest.param((torch.no_grad, torch.inference_mode), id="inference"),
    ],
)
def test_decoding_without_gradients_gives_the_same(modes: tuple[Callable[[], Any], ...]) -> None:
    """Retrieved tokens stay where they are then; more tokens than the room behind them."""
    net, ids = build("llama_gqa", positions=512), tokens(2 * _SPARE + 10)
    with attached(net, positions="continual") as attachment:
        chunks = [encode(attachment, tokens(6, seed=seed)[0].tolist()) for seed in (8, 9)]

        def decode(modes: tuple[Callable[[], Any], ...]) -> torch.Tensor:
            cache = MemoryCache(attachment, None)
            cache.set_memory([recalled(chunks)])
            logits = []
            for part, mode in zip(ids.split(ids.shape[1] // len(modes), 1), modes, strict=True):
                with mode():
                    logits += [net(one, past_key_values=cache).logits.detach() for one in part.split(1, 1)]
            return torch.cat(logits, 1)

        assert worst(decode(modes), decode((torch.enable_grad, torch.enable_grad))) <= 1e-5


def test_retrieved_tokens_are_not_copied_for_each_token() -> None:
    """Seen by the backend: they stay in one place until there is no room behind them."""
    retrieved = RetrievedKV(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    places, query, module = [], torch.randn(1, 2, 1, 4), torch.nn.Module()
    module.layer_idx = 0

    def backend(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> Any:
        places.append((key.data_ptr(), value.data_ptr()))
        return query, None

    with torch.no_grad():
        for length in range(3, 3 + _SPARE + 2):
            local = torch.randn(1, 2, length, 4)
            retrieval_causal_attention(backend, module, query, local, local, None, retrieved)
    assert len(set(places[:-1])) == 1
    assert places[-1] != places[0]


def test_what_was_recalled_before_is_freed(model: Models) -> None:
    """Rotated keys of a memory go with it, and do not wait for the next forward."""
    net = model("llama_gqa")
    with attached(net) as attachment, torch.no_grad():
        memory = recalled([encode(attachment, tokens(6, seed=9)[0].tolist())])
        cache = MemoryCache(attachment, None)
        for later in ([], memory):
            cache.set_memory([memory])
            net(tokens(2), past_key_values=cache)
            rotated = [weakref.ref(held.keys) for held in cache.recalled.retrieved(cache.columns).values()]
            cache.set_memory([later])
            gc.collect()
            assert rotated
            assert not any(key() is not None for key in rotated)
            cache.reset()


def test_a_copy_of_an_attached_model_takes_no_cache_of_the_model(model: Models) -> None:
    """Hooks are copied with a model, but its memory is that of the first one."""
    net = model("llama_gqa")
    with attached(net) as attachment, torch.no_grad(), pytest.raises(InputError, match="another attachment"):
        copy.deepcopy(net)(tokens(2), past_key_values=MemoryCache(attachment))


def test_a_recall_is_due_again_after_the_cadence() -> None:
    """Tokens that come one by one are counted from the last recall, not from the first token."""
    queries, one, valid = Queries(ListMemory(4)), torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    due = []
    for step in range(9):
        if queries.due(one, valid):
            queries.recalled()
            due.append(step)
        queries.append(one, valid)
    assert due == [0, 4, 8]


def test_beam_search_is_refused(chat: MemoryModel) -> None:
    for prompt in (PROMPT, PROMPT[:CHUNK]):  # fed in pieces, and in one
        with pytest.raises(InputError, match="beam search"):
            chat.generate(prompt, num_beams=2, max_new_tokens=3)


def test_prompts_that_make_no_sense(chat: MemoryModel) -> None:
    for prompt in ("", [], [""]):
        with pytest.raises(InputError, match=r"empty|no prompt"):
            chat.generate(prompt)
    used = chat.cache()
    chat.generate([5], cache=used, max_new_tokens=2)
    with pytest.raises(InputError, match="tokens already"):
        chat.generate([5], cache=used)


@pytest.mark.parametrize("masked", [True, False])
def test_positions_that_do_not_go_on_are_an_error(model: Models, masked: bool) -> None:
    """Caches that are fed again from the start, or with a gap, would hold tokens twice, or at distances that were not
    meant."""
    net, ids = model("llama_gqa"), tokens(12, rows=2)
    with attached(net) as attachment, torch.no_grad():

        def feed(cache: MemoryCache, columns: slice, seen: int, positions: torch.Tensor | None) -> None:
            mask = torch.ones(2, seen + len(range(*columns.indices(12)))).long() if masked else None
            net(ids[:, columns], attention_mask=mask, position_ids=positions, past_key_values=cache)

        for first, later in [(0, 0), (0, 5), (0, 3), (7, 12)]:
            cache = MemoryCache(attachment, ListMemory(4), window=8)
            feed(cache, slice(0, 4), 0, torch.arange(first, first + 4)[None])
            with pytest.raises(InputError, match=f"position {later} in row 0 does not go on .*: {first + 4} follows"):
                feed(cache, slice(4, 8), 4, torch.arange(later, later + 4)[None])
            feed(cache, slice(4, 8), 4, torch.arange(first + 4, first + 8)[None])  # nothing was kept of it
        cache = MemoryCache(attachment, ListMemory(4), window=8)
        with pytest.raises(InputError, match="position 9 in row 1"):
            feed(cache, slice(0, 4), 0, torch.tensor([[0, 1, 2, 3], [0, 1, 9, 10]]))


def test_a_window_that_was_emptied_goes_on(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(12)
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(4), window=8)
        net(ids[:, :6], past_key_values=cache)
        cache.flush()
        with pytest.raises(InputError, match="position 0 in row 0"):
            net(ids[:, 6:], position_ids=torch.arange(6)[None], past_key_values=cache)
        net(ids[:, 6:], past_key_values=cache)
        cache.count_from_window()
        net(ids[:, :1], past_key_values=cache)


def test_generation_that_feeds_all_again_is_an_error() -> None:
    """Gradient checkpointing leaves this in a configuration."""
    net, ids = build("llama_gqa"), tokens(8)
    net.generation_config.use_cache = net.config.use_cache = False
    with attached(net) as attachment:
        for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
            with pytest.raises(InputError, match=r"use_cache=False|all 17 tokens"):
                net.generate(ids, past_key_values=MemoryCache(attachment), max_new_tokens=4, do_sample=False, **mask)


def test_local_tokens_are_not_copied_for_each_token(model: Models) -> None:
    """Look at what a layer holds: the next token is written behind those that are there, until a chunk leaves."""
    with attached(model("llama_gqa"), positions="continual") as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(6, recalls=False), window=24)
        places = []
        for one in tokens(26).split(1, 1):
            before = cache.layers[0].keys.clone() if places else None
            attachment.model(one, past_key_values=cache)
            layer = cache.layers[0]
            assert layer.raw_keys is not None
            places.append(tuple(part.data_ptr() for part in (layer.keys, layer.values, layer.raw_keys)))
            if before is not None and len(places) <= 24:
                assert torch.equal(layer.keys[:, :, :-1], before)
        assert [len(set(place)) for place in zip(*places[1:24], strict=True)] == [1, 1, 1]
        assert places[24] != places[23]


@pytest.mark.parametrize("positions", ["continual", "near:5"])
def test_decoding_while_chunks_leave_is_the_same_in_one_place(model: Models, positions: str) -> None:
    """Compare logits with those of forwards that keep gradients, for which all is put together anew."""
    with attached(model("llama_gqa"), positions=positions) as attachment:

        def decode(mode: Callable[[], Any]) -> torch.Tensor:
            cache = MemoryCache(attachment, ListMemory(6, cadence=5), window=15, sinks=2)
            with mode():
                return torch.cat([attachment.model(x, past_key_values=cache).logits for x in tokens(60).split(1, 1)], 1)

        assert worst(decode(torch.no_grad), decode(torch.enable_grad).detach()) <= 1e-5
