"""`measure` says what the model itself says, and its rows are what was stored."""

import gzip
import importlib.util
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from model_worker.attachment.loading import load_model
from model_worker.cli.commands import evaluation
from model_worker.compress import compressor
from model_worker.errors import InputError
from model_worker.evaluate.compression import METHODS, Plan, measure, with_budget
from model_worker.evaluate.documents import cut
from model_worker.evaluate.figure import draw
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.passkey import Plan as Passkeys
from model_worker.evaluate.passkey import Tuning, measure_passkeys, tells
from model_worker.evaluate.passkey_report import passkey_figure
from model_worker.evaluate.peaks import fit, measure_peaks, peak_bytes
from model_worker.text_files import reference_text
from tests.worker.tiny import tokens

Models = Callable[[str], PreTrainedModel]
CHUNK, FOLLOW = 24, 10


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_full_and_nothing_are_the_models_own_losses(model: Models, family: str) -> None:
    net = model(family)
    documents = [tokens(CHUNK + FOLLOW, seed=seed)[0].tolist() for seed in range(3)]
    seen: list[int] = []
    rows = measure(
        net,
        None,
        documents,
        Plan(CHUNK, FOLLOW, [6, CHUNK], ["window:m=N", "tova:m=N,block=5", "homer:m=N,leaf=8", "leaves"]),
        progress=lambda done, total: seen.append(done) if total == 30 else None,
    )
    assert seen == list(range(31))
    assert [r.method for r in rows[:3]] == ["nothing", "full", "window:m=6"]
    assert [r.budget for r in rows] == [0, CHUNK, 6, 6, 6, 6, CHUNK, CHUNK, CHUNK, CHUNK]
    ids = torch.tensor(documents)
    with torch.no_grad():
        whole = net(ids).logits[:, CHUNK:]
        alone = net(ids[:, CHUNK:]).logits
    for row, logits in ((rows[0], alone), (rows[1], whole)):
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, CHUNK + 1 :].flatten())
        assert row.loss == pytest.approx(float(expected), abs=1e-5)
        assert row.low < row.loss < row.high
    assert rows[1].above == rows[1].above_width == 0
    size = net.config.num_hidden_layers * 2 * net.config.num_key_value_heads * 8 * 4
    assert [r.bytes_per_token for r in rows[:3]] == [0, size, size * 6 / CHUNK]
    for row in rows[6:9]:  # nothing was dropped
        assert row.above == pytest.approx(0, abs=1e-4)
    assert rows[2].above != 0
    assert all(row.seconds > 0 for row in rows)


def test_figures_are_measured_once(model: Models) -> None:
    """Test that a run of more methods measures those alone, and that a row is the same either way."""
    documents = [tokens(CHUNK + FOLLOW, seed=seed)[0].tolist() for seed in range(2)]
    journal, seen = Journal(None, {}), model("llama_gqa")
    first = measure(seen, None, documents, Plan(CHUNK, FOLLOW, [6], ["window:m=N"]), journal=journal)
    calls: list[int] = []
    hook = seen.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        both = Plan(CHUNK, FOLLOW, [6], ["window:m=N", "sinks:m=N"])
        again = measure(seen, None, documents, both, journal=journal)
        assert again[:3] == first
        behind = len(calls)
        assert measure(seen, None, documents, both, journal=journal) == again
        attaching = len(calls) - behind
    finally:
        hook.remove()
    assert behind - attaching == len(documents)  # the loss behind what the new method kept of each
    part = journal.get("document 2, sinks:m=6")
    assert part is not None
    assert set(part) == {"loss", "bytes", "seconds"}


def test_specs_are_looked_at_before_a_model_is_loaded() -> None:
    """Test that a wrong method is refused by name, that N is the budget only as a value, and what a press needs."""
    for wrong, said in (("tova", "write tova:m=N"), ("tofu:m=N", "unknown compressor 'tofu'")):
        done = kvbank_eval("compression", "--model=nowhere", f"--method={wrong}")
        assert isinstance(done.exception, InputError)
        assert said in str(done.exception)
    if importlib.util.find_spec("kvpress") is None:
        done = kvbank_eval("compression", "--model=nowhere", "--method=press:SnapKVPress,m=N")
        assert "pip install --no-deps kvpress" in str(done.exception)
    assert with_budget("press:NonCausalAttnPress,m=N", 8) == "press:NonCausalAttnPress,m=8"
    assert with_budget("tova:N", 8) == "tova:8"


@pytest.mark.slow
def test_a_calibrated_table_for_one_run(model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`bias=measured` is calibrated on the text given, and leaves nothing where bias=auto would find it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    documents = [tokens(CHUNK + FOLLOW, seed=seed)[0].tolist() for seed in range(6)]
    rows, plain = (
        measure(
            model("llama_gqa"),
            None,
            documents,
            Plan(CHUNK, FOLLOW, [4, 8, 12], [f"homer:m=N,leaf=8,bias={bias}"]),
            calibration=tokens(600)[0].tolist(),
        )
        for bias in ("measured", "none")
    )
    assert rows[2].method == "homer:m=4,leaf=8,bias=measured"
    assert [row.loss for row in rows[2:]] != [row.loss for row in plain[2:]]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_peaks_are_what_was_held_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1 << 20)
        second = first + 1  # 8 MiB now
        del first
        return second.sum() + torch.ones(1 << 18).sum()  # 5 MiB

    assert 8 << 20 <= peak_bytes(work) < 8.1 * (1 << 20)
    assert 4 << 20 <= peak_bytes(lambda: torch.ones(1 << 20)) < 4.1 * (1 << 20)


def test_memory_of_whole_prompts(model: Models) -> None:
    """Plain prefill grows with the length, HOMER's tree by far less; lines are fitted as they should."""
    peaks = measure_peaks(model("llama_gqa"), [60, 120, 240], size=40, plain_up_to=120).peaks
    assert [p.length for p in peaks] == [60, 120, 240]
    assert peaks[2].plain is None
    assert peaks[0].plain is not None
    assert peaks[1].plain is not None
    assert peaks[1].plain > 1.8 * peaks[0].plain
    assert peaks[0].homer <= peaks[2].homer < 1.7 * peaks[0].homer
    found = fit([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert (found.a, found.b, found.residual) == pytest.approx((3.0, 2.0, 0.0), abs=1e-9)
    assert fit([1.0, 2.0, 3.0], [5.0, 8.0, 9.0]).residual == pytest.approx((2 / 9) ** 0.5, abs=1e-9)
    with pytest.raises(InputError, match="affixes"):
        measure_peaks(model("llama_gqa"), [20], size=40, plain_up_to=0)


def test_no_method_of_the_default_runs_the_model_for_each_token() -> None:
    """Test it by the blocks in which TOVA reads, of which `block=1` is an option to ask for."""
    assert getattr(compressor("tova:m=8,block=1"), "block", None) == 1
    made = [compressor(with_budget(name, 8).replace("=measured", "=none")) for name in METHODS if name != "leaves"]
    assert not [each.name for each in made if getattr(each, "block", None) == 1]


def kvbank_eval(*arguments: object) -> Result:
    return CliRunner().invoke(evaluation, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_what_is_evaluated_was_not_calibrated_on() -> None:
    """Halves of the Python reference are taken for each, where no text is given."""
    methods = ["window:m=N", "homer:m=N,leaf=16,bias=measured"]
    sizes = ["--chunk=48", "--follow=8", "--budget=8", "--documents=2"]
    done = kvbank_eval("compression", *sizes, *(f"--method={name}" for name in methods), "--json")
    assert done.exit_code == 0, done.output
    loaded, words = load_model()
    text = reference_text()
    first, second = (
        words.encode(half, add_special_tokens=False, verbose=False)
        for half in (text[: len(text) // 2], text[len(text) // 2 :])
    )
    pieces = list(cut(second, 56, 2))
    expected = measure(loaded, words, pieces, Plan(48, 8, [8], methods), calibration=first[:5000])
    found = json.loads(done.stdout)["rows"]
    assert [row["method"] for row in found] == [row.method for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row.loss for row in expected], abs=1e-5)


@pytest.mark.parametrize("command", ["compression", "homer-memory"])
@pytest.mark.parametrize("where", ["none/plot.svg", "file/plot.svg", "."])
def test_a_picture_that_cannot_be_written_is_told_first(tmp_path: Path, command: str, where: str) -> None:
    """Pictures are tried before the model, which is not there, is even looked for."""
    (tmp_path / "file").touch()
    done = kvbank_eval(command, "--model", tmp_path / "model", "--plot", tmp_path / where)
    assert isinstance(done.exception, InputError)
    assert f"cannot write {tmp_path / where}" in str(done.exception)
    assert "\n" not in str(done.exception)


def test_parameters_and_texts_are_looked_at_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(FILLER.encode())[:-20])
    for options, message in (
        (["passkey", "--pool", 2], "pool=2 has to be an odd number"),
        (["passkey", "--text", tmp_path / "text.txt"], "cannot read"),
        (["passkey", "--text", tmp_path / "cut.txt.gz"], "cannot read"),
        (["compression", "--text", tmp_path / "cut.txt.gz"], "cannot read"),
        (["compression", "--text", tmp_path / "none.txt"], "cannot read"),
    ):
        done = kvbank_eval(*options, "--model", tmp_path / "model")
        assert isinstance(done.exception, InputError)
        assert message in str(done.exception)


def test_a_number_is_told_to_its_last_digit_and_no_further() -> None:
    for answer in (" 48213", "48213.", " 48213 and 7", "48213\n9"):
        assert tells(answer, "48213")
    for answer in ("482137", " 4821", " 4821 3", "It is 48213", ""):
        assert not tells(answer, "48213")


FILLER = "The rain fell on the roof all night, and nobody came to the door. " * 400
TUNING = Tuning(size=96, leaf=128, warmup=1, merges=1, pool=17, again=True)


@pytest.mark.slow
def test_passkeys_inside_the_window() -> None:
    loaded, words = load_model()
    stages: set[str] = set()
    plan = Passkeys([80], samples=2)
    scores = measure_passkeys(loaded, words, FILLER, plan, progress=lambda stage, done, total: stages.add(stage))
    near = {score.way: score for score in scores}
    assert near["plain, all tokens"].told.right == near["plain, last tokens"].told.right == 2
    assert len(near) == 6
    assert all(score.told.asked == 2 for score in near.values())
    assert stages == {"answers", "calibrating"}
    for wrong, filler, said in (
        (Passkeys([600]), "It rained.", "too few"),
        (Passkeys([20]), FILLER, "no room"),
        (Passkeys([80], ways=["homer", "swim"]), FILLER, "there is no way 'swim'; there are: plain, all tokens; plain"),
    ):
        with pytest.raises(InputError, match=said):
            measure_passkeys(loaded, words, filler, wrong)


def test_noise_says_the_number_twice_and_nothing_else() -> None:
    """Test the prompt of the paper's task by what the model is fed, to the token."""
    loaded, words = load_model()
    fed: list[list[int]] = []
    hook = loaded.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        plan = Passkeys([160], samples=1, ways=["plain, all"], noise=True)
        [score] = measure_passkeys(loaded, words, FILLER, plan)
    finally:
        hook.remove()
    assert score.told.asked == 1
    text = words.decode(next(ids for ids in fed if len(ids) == 160))
    number = re.findall(r"\d{5}", text)
    assert len(number) == 2
    assert number[0] == number[1]
    assert text.count("We walk on.") > 1
    assert "rain" not in text
    assert re.search(rf"The number of (\w+ \w+) is {number[0]}\. Remember it\. {number[0]} is the number of \1\.", text)
    assert text.endswith("is")


@pytest.mark.slow
def test_passkeys_go_on_from_their_log(tmp_path: Path) -> None:
    """Test that each answer is a line, that ways are chosen by name, and that a longer run asks for the rest alone."""
    log = tmp_path / "log.jsonl"
    given = ["passkey", "--length=80", "--samples=2", "--trained=200", f"--log={log}", "--json"]
    first = json.loads(kvbank_eval(*given, "--way=plain, all").stdout)
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [line["key"] for line in lines] == [f"80 tokens, prompt {n}, plain, all tokens" for n in (1, 2)]
    assert [line["part"]["told"] for line in lines] == [True, True]
    assert [line["part"]["depth"] for line in lines] == [0.25, 0.75]
    done = kvbank_eval(
        *given, "--way=plain", "--way=homer, balanced", "--way=homer, balanced, cal", f"--plot={tmp_path / 'keys.svg'}"
    )
    found = json.loads(done.stdout)
    assert found["scores"][0] == first["scores"][0]
    assert found["trained"] == 200
    assert [row["way"] for row in found["scores"]] == [
        *("plain, all tokens", "plain, last tokens", "homer, balanced", "homer, balanced, calibrated")
    ]
    assert log.read_text("utf-8").count("\n") == 8
    assert "<svg" in (tmp_path / "keys.svg").read_text("utf-8")
    named = json.loads(kvbank_eval(*given, "--way=homer, balanced").stdout)
    assert [row["way"] for row in named["scores"]] == ["homer, balanced"]  # and not all that begin so
    assert "80 tokens (0.4x)" in kvbank_eval(*given[:-1], "--way=plain, all").stdout


def test_a_prompt_of_noise_is_the_same_beside_other_lengths() -> None:
    """Test that a run of more lengths goes on from prompts that it would make itself."""
    loaded, words = load_model()
    fed: list[list[int]] = []
    hook = loaded.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    prompts = []
    try:
        for lengths in ([160], [160, 333, 160]):
            fed.clear()
            measure_passkeys(loaded, words, FILLER, Passkeys(lengths, samples=2, ways=["plain, all"], noise=True))
            prompts.append([ids for ids in fed if len(ids) == 160])
    finally:
        hook.remove()
    assert len(prompts[0]) == 2
    assert prompts[0] == prompts[1]


def test_a_trained_length_without_room_is_refused() -> None:
    """Test that a question which fills the trained length alone is not asked behind the whole text instead."""
    loaded, words = load_model()
    plan = Passkeys([80], samples=1, trained=20, ways=["plain, last"])
    [score] = measure_passkeys(loaded, words, FILLER, plan)
    assert score.refused == "20 tokens have no room for text beside the question and its answer"


def test_a_figure_without_lines_is_drawn() -> None:
    """Test the figure of a run in which each length was refused."""
    refused = {"way": "homer, paper", "length": 1200, "refused": "16 leaves"}
    with warnings.catch_warnings(action="error"):
        assert "<svg" in draw(passkey_figure({"model": "m", "trained": 512, "scores": [refused]}))


def test_a_length_that_is_refused_is_noted_once() -> None:
    """Test that a way that cannot read a length is not tried with each prompt, and says why."""
    loaded, words = load_model()
    journal = Journal(None, {})
    plan = Passkeys([1200], samples=2, tuning=Tuning(size=96), ways=["homer, p"])
    plain, calibrated = measure_passkeys(loaded, words, FILLER, plan, journal)
    assert plain.refused is not None
    assert "leaves" in plain.refused
    assert plain.seconds is None
    assert calibrated.refused == plain.refused
    assert journal.get("1200 tokens, prompt 1, homer, paper") == {"refused": plain.refused}
    assert journal.get("1200 tokens, prompt 2, homer, paper") is None


@pytest.mark.slow
def test_passkeys_far_behind_it() -> None:
    """Told by a tuned tree only: neither by the plain model nor by the published one."""
    loaded, words = load_model()
    plan = Passkeys([1500], samples=4, tuning=TUNING)
    far = {score.way: score for score in measure_passkeys(loaded, words, FILLER, plan)}
    assert far["plain, all tokens"].told.right == far["homer, paper"].told.right == 0
    assert far["homer, balanced, tuned"].told.right >= 2


def test_documents_have_to_fit(model: Models) -> None:
    for documents in ([tokens(20)[0].tolist()] * 2, [tokens(CHUNK + FOLLOW)[0].tolist()]):
        with pytest.raises(InputError, match="two documents"):
            measure(model("llama_gqa"), None, documents, Plan(CHUNK, FOLLOW, [4]))


def test_pieces_are_spread_over_a_text() -> None:
    assert list(cut(range(10), 4, 2)) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert list(cut(range(10), 4, 5)) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert list(cut(range(10), 4, 1)) == [[0, 1, 2, 3]]
    assert list(cut(range(3), 4, 5)) == []
