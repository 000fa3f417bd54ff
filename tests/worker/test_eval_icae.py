"""`kvbank eval icae` and `icae-latency`: figures are those that plain arithmetic over plain models gives."""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu import corpus_bleu
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvbank.console import ending
from model_worker.errors import InputError
from model_worker.evaluate.adapter import Evaluation, measure, plan
from model_worker.evaluate.continuation import Continuation, continuation
from model_worker.evaluate.findings import findings, margins
from model_worker.evaluate.latency import measure_latency, random_model
from model_worker.evaluate.restoration import Reader, Restoration, restoration
from model_worker.icae import Icae, IcaeConfig, combine, loss, restore
from model_worker.icae.decode import losses
from model_worker.icae.layout import restore_row
from tests.support import command
from tests.worker.tiny import VOCABULARY, sharpen, tokenizer, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BOS, EOS, CLOSE = 3, 1, 1e-4
FORMS = pytest.mark.parametrize("interface", ["soft", "kv"])


def base(positions: int = 256) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **special, num_hidden_layers=2, max_position_embeddings=positions))
    sharpen(net, 0)
    return net.eval()


def adapter(net: Any, interface: str = "soft", slots: int = 2) -> Icae:
    """Make an adapter that does something."""
    made = Icae.create(net, IcaeConfig(slots, 4, interface=interface), rank=4, seed=slots)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return made


def texts(count: int, length: int) -> list[list[int]]:
    return [[BOS + 1 + token % 90 for token in tokens(length, seed)[0].tolist()] for seed in range(count)]


def words(ids: Any) -> str:
    return " ".join(f"w{token}" for token in ids)


def plain_loss(net: Any, ids: list[int], scored: int) -> float:
    """Nats per token of the last ones, by the model itself."""
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0]
    return float(nn.functional.cross_entropy(logits[-scored - 1 : -1], torch.tensor(ids[-scored:])))


@FORMS
@torch.no_grad()
def test_restoration_is_what_each_reader_says(interface: str) -> None:
    """Losses, what is written, and whose slots the other reader has: those half the list away."""
    net = base()
    icae, given = adapter(net, interface), texts(4, 8)
    found = restoration(icae, given, words)
    assert (found.tokens, found.slots) == (8, 2)
    slots = icae.encode(given)
    for index, text in enumerate(given):
        total, count = losses(icae, [restore_row(icae, slots[index], text, ends=False)])
        assert found.own.nats[index] == pytest.approx(float(total / count), abs=CLOSE)
        total, _ = losses(icae, [restore_row(icae, slots[(index + 2) % 4], text, ends=False)])
        assert found.other.nats[index] == pytest.approx(float(total / count), abs=CLOSE)
        assert found.plain.nats[index] == pytest.approx(plain_loss(net, [BOS, *text], 8), abs=CLOSE)
        assert found.own.prefix is not None
        written = restore(icae, slots[index], max_new_tokens=8)
        assert found.own.prefix[index] == pytest.approx(agreement(written, text) / 8)
    assert (
        found.own.bleu
        == corpus_bleu(
            [words(restore(icae, own, max_new_tokens=8)) for own in slots], [[words(text) for text in given]]
        ).score
    )


def agreement(written: list[int], text: list[int]) -> int:
    return next((i for i, token in enumerate(text) if written[i : i + 1] != [token]), len(text))


def test_the_exact_part_ends_at_the_first_error() -> None:
    """Readers here always write token 0."""
    net = base()
    nn.init.zeros_(net.lm_head.weight)
    found = restoration(adapter(net), [[0] * 8, [0, 0, 5, 0, 0, 0, 0, 0], [5] * 8], words)
    for own in (found.own, found.other, found.plain):
        assert own.prefix is not None
        assert own.exact is not None
        assert own.prefix.tolist() == [1.0, 0.25, 0.0]
        assert own.exact.tolist() == [1.0, 0.0, 0.0]
        assert own.right.tolist() == [1.0, 0.875, 0.0]


@torch.no_grad()
def test_more_pieces_spend_more_slots_on_the_same_text() -> None:
    icae, given = adapter(base()), texts(3, 8)
    halves = restoration(icae, given, words, parts=2)
    assert (halves.tokens, halves.slots) == (8, 4)
    slots = [combine(icae.encode([text[:4], text[4:]])) for text in given]
    total, count = losses(icae, [restore_row(icae, o, t, ends=False) for o, t in zip(slots, given, strict=True)])
    torch.testing.assert_close(halves.own.nats, (total / count).double(), atol=CLOSE, rtol=0)
    torch.testing.assert_close(halves.plain.nats, restoration(icae, given, words).plain.nats)


def test_a_model_without_bos_writes_nothing_unprompted() -> None:
    net = base()
    net.config.bos_token_id = None
    found = restoration(adapter(net), texts(2, 8), words)
    assert found.plain.prefix is None
    assert found.plain.bleu is None
    assert found.own.prefix is not None


@FORMS
@torch.no_grad()
def test_continuation_reads_what_it_says(interface: str) -> None:
    """Following tokens are the same behind all of the context, its slots, its last tokens and nothing."""
    net = base()
    icae, documents = adapter(net, interface), texts(3, 30)
    found = continuation(icae, documents, context=16, follow=10, leave=3)
    assert (found.context, found.budget) == (16, 4)
    for index, ids in enumerate(documents):
        before, after = ids[4:20], ids[20:]
        for values, context in ((found.full, before), (found.last, before[-4:]), (found.none, [])):
            assert values[index] == pytest.approx(plain_loss(net, [BOS, *context, *after], 7), abs=CLOSE)
        [slots] = icae.encode([before])
        own = float(loss(icae, slots, after, "lm", leave=3))
        assert found.slots[index] == pytest.approx(own, abs=CLOSE)


def test_a_plan_stays_inside_the_model() -> None:
    icae = adapter(base(positions=64))
    what = plan(icae, follow=20, leave=4)
    assert (what.lengths, what.span, what.contexts) == ((2, 4, 6, 8, 16), 8, (8, 16, 32))
    assert plan(icae, follow=40, leave=4).contexts == (8, 16)  # 32 + 40 tokens are too many
    assert plan(adapter(base(positions=16)), follow=8, leave=4).parts == (1, 2)  # four pieces: 8 slots, a row, 8 tokens
    with pytest.raises(InputError, match="does not fit"):
        plan(icae, span=80)
    with pytest.raises(InputError, match="follow above leave"):
        plan(icae, follow=4, leave=4)


@pytest.mark.slow
@pytest.mark.parametrize("more", [0, 3, 9])
@pytest.mark.parametrize("config", [IcaeConfig(2, 4), IcaeConfig(2, 4, lm_row=True), IcaeConfig(2, 4, "kv", "spread")])
def test_what_is_planned_can_be_measured(config: IcaeConfig, more: int) -> None:
    """Up to the last position, which the decoder refuses to pass."""
    icae = Icae.create(base(positions=config.needed() + more), config, rank=1)
    what = plan(icae, follow=3, leave=1)
    found = measure(icae, texts(2, what.document), what, words)
    shown = {fact.name[0]: fact for fact in findings(found)}
    assert (what.parts == (1,)) == (shown["4"].figures == "no more slots fit the model's positions")


def test_content_is_natural_shuffled_and_random() -> None:
    """Shuffled text has the same tokens; random text avoids special ones."""
    icae, documents = adapter(base()), texts(4, 80)
    what = plan(icae, follow=16, leave=4)
    seen: list[str] = []

    def decode(ids: Any) -> str:
        seen.append(words(ids))
        return seen[-1]

    steps: list[tuple[int, int]] = []
    special = [token for token in range(VOCABULARY) if token not in (94, 95, 96)]  # nor are these in the documents
    found = measure(icae, documents, what, decode, special=special, progress=lambda *done: steps.append(done))
    assert steps == [(i + 1, 12) for i in range(12)]
    assert [own.tokens for own in found.lengths] == [2, 4, 6, 8, 16]
    assert [own.slots for own in found.parts] == [2, 4, 8]
    assert found.contents["natural"] is found.parts[0]
    assert [own.budget for own in found.continuations] == [2, 4, 8]
    whole = sorted(words(ids[:8]) for ids in documents)
    assert set(whole) <= set(seen)
    mixed = [text for text in seen if sorted(text.split()) in [sorted(own.split()) for own in whole]]
    assert len(set(mixed)) == 2 * len(whole)  # as it was, and in another order
    assert len({text for text in seen if set(text.split()) <= {"w94", "w95", "w96"}}) >= 3
    assert json.loads(json.dumps(found.summary()))["restoration_by_slots"][2]["slots"] == 8
    with pytest.raises(InputError, match="each of"):
        measure(icae, [ids[:-40] for ids in documents], what, words)


def reader(nats: float, right: float, prefix: float) -> Reader:
    """Two texts with a little noise, so that there are intervals."""
    noise = torch.tensor([-0.001, 0.001], dtype=torch.float64)
    return Reader(nats + noise, right - noise, prefix + noise, noise.abs(), 100 * prefix)


def evaluation(sign: float) -> Evaluation:
    """Make an evaluation with all findings of the paper, or (-1) the opposite of each."""

    def restored(count: int, slots: int, right: float) -> Restoration:
        return Restoration(
            count,
            slots,
            reader(2.0, right, 0.5),
            reader(2.0 + sign, 0.3, 0.5 - 0.1 * sign),
            reader(2.0 + sign, 0.3, 0.5 - 0.1 * sign),
        )

    whole = restored(32, 8, 0.5)
    noise = torch.tensor([-0.001, 0.001], dtype=torch.float64)
    after = [
        Continuation(n, n // 4, 2 + noise, 2 + sign + noise, 2 + 2 * sign + noise, 2 + 3 * sign + noise)
        for n in (32, 128)
    ]
    return Evaluation(
        [restored(8, 8, 0.5 + 0.1 * sign), whole],
        [whole, restored(32, 32, 0.5 + 0.1 * sign)],
        {"natural": whole, "shuffled": restored(32, 8, 0.5 - 0.1 * sign), "random": restored(32, 8, 0.5 - 0.2 * sign)},
        after,
    )


def test_facts_are_shown_or_fail_by_their_figures() -> None:
    for sign, expected in ((1.0, True), (-1.0, False)):
        found = evaluation(sign)
        assert [fact.shown for fact in findings(found)] == [expected] * 7, sign
        assert [fact.shown for fact in margins(found)] == [expected] * 2
    assert [fact.shown for fact in margins(evaluation(0.5))] == [False, True]


def test_latency_has_every_contender_at_every_length() -> None:
    steps: list[tuple[int, int]] = []
    rows = measure_latency(
        random_model("tiny"),
        [12, 24],
        slots=3,
        prompt=5,
        answer=4,
        rounds=2,
        progress=lambda *done: steps.append(done),
    )
    assert steps == [(i + 1, 6) for i in range(6)]
    # Slots and the FT row before the prompt; with K-V the row alone.
    assert [(row.tokens, row.contender, row.read) for row in rows] == [
        (12, "full", 17),
        (12, "slots", 9),
        (12, "slots' K-V", 6),
        (24, "full", 29),
        (24, "slots", 12),
        (24, "slots' K-V", 6),
    ]
    for row in rows:
        full = next(own for own in rows if own.tokens == row.tokens and own.contender == "full")
        assert row.ratio == pytest.approx(full.first / row.first)
        assert row.whole_ratio == pytest.approx(full.whole / row.whole)
        assert min(row.first, row.whole) > 0
    with pytest.raises(InputError, match="no shape"):
        random_model("9b")


@pytest.fixture
def kvbank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command's entry point in this process; return code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvbank", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            ending.run(command.application())
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.slow
def test_the_command(kvbank: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Models and adapters from folders are measured on any text: one JSON document, pictures, tables, and one-line
    refusals."""
    net = base()
    net.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for slots in (2, 4):
        adapter(net, slots=slots).save_pretrained(tmp_path / f"k{slots}")
    (tmp_path / "text.txt").write_text(words(texts(1, 600)[0]))
    given = ["eval", "icae", "--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--documents", 3]
    given += ["--adapter", tmp_path / "k2", "--follow", 12, "--leave", 2, "--span", 8]
    code, out, _ = kvbank(*given, "--adapter", tmp_path / "k4", "--plots", tmp_path / "plots", "--json")
    assert code == 0
    first, second = json.loads(out)
    assert (first["slots"], second["slots"]) == (2, 4)
    assert first["adapter"] == str(tmp_path / "k2")
    assert len(first["facts"]) == 7
    lengths = {own["tokens"]: own for own in first["restoration_by_length"]}
    document = 44
    starts = [(600 - document) * index // 2 for index in range(3)]
    pieces = [texts(1, 600)[0][at : at + document] for at in starts]
    plain = sum(plain_loss(net, [BOS, *ids[:8]], 8) for ids in pieces) / 3
    assert lengths[8]["plain"]["nats"] == pytest.approx(plain, abs=CLOSE)
    assert lengths[8]["plain"] == second["restoration_by_length"][3]["plain"]
    restored = ["accuracy, own slots", "accuracy, another text's slots", "accuracy, no slots"]
    for name, lines in (("length", restored), ("slots", restored), ("continuation", ["its slots", "nothing"])):
        picture = ET.parse(tmp_path / "plots" / f"icae-{name}.svg")
        told = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
        assert (told.count("k2"), told.count("k4")) == (1, 1)
        assert [told.count(line) for line in lines] == [2] * len(lines)  # in the panel of each adapter
    code, out, _ = kvbank(*given)
    assert code == 0
    assert all(part in out for part in ("restored", "continued", "6b 32 tokens as 8 slots", "at least 0.9 nats"))
    code, out, err = kvbank(*given, "--adapter", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert "there is no adapter folder" in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["icae", "--device", "banana"], "device 'banana' is not auto, cpu or cuda"),
        (["icae", "--device", "cuda:77"], "no CUDA device 'cuda:77'"),
        (["icae", "--plots", "{file}"], "{file} cannot be the folder of the pictures"),
        (["icae", "--plots", "{file}/below"], "cannot be the folder of the pictures"),
        (["icae-latency", "--device", "banana"], "device 'banana' is not auto, cpu or cuda"),
        (["icae-latency", "--dtype", "int8"], "dtype 'int8' is not one that a model computes in"),
        (["icae-latency", "--dtype", "nn"], "dtype 'nn' is not one that a model computes in"),
    ],
)
def test_wrong_options_are_told_first(
    kvbank: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], words: str
) -> None:
    """Options are checked before the model, which is not there, is even looked for."""
    (tmp_path / "file").touch()
    given = [argument.replace("{file}", str(tmp_path / "file")) for argument in arguments]
    code, out, err = kvbank("eval", *given, "--model", tmp_path / "model")
    assert (code, out) == (1, "")
    [line] = err.strip().splitlines()
    assert words.replace("{file}", str(tmp_path / "file")) in line


def test_the_latency_command(kvbank: Callable[..., tuple[int, str, str]]) -> None:
    given = [
        "eval",
        "icae-latency",
        "--model",
        "random:tiny",
        "--chunk",
        16,
        "--slots",
        4,
        "--answer",
        2,
        "--rounds",
        1,
    ]
    code, out, _ = kvbank(*given, "--json")
    assert code == 0
    assert [row["read"] for row in json.loads(out)] == [32, 21, 17]
    code, out, err = kvbank("eval", "icae-latency", "--model", "random:9b")
    assert code == 1
    assert "no shape '9b'" in err
