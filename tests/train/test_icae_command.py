"""`kvbank train icae` and what goes with it, as a user calls it."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbank.console import ending
from model_worker.icae import Icae
from model_worker.train.checkpoints import checkpoints
from tests.support import command
from tests.train.icae_runs import adapter, base_model, tokenizer, words


@pytest.fixture
def kvbank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvbank", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            ending.run(command.application())
        code = ended.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    base_model().save_pretrained(folder)
    with_chat = tokenizer()
    with_chat.chat_template = "w40 {{ messages[0].content }} w41"
    with_chat.save_pretrained(folder)
    return folder


def test_the_command_pretrains_resumes_and_finetunes(kvbank: Any, tiny_folder: Path, tmp_path: Path):
    texts, asked, run = tmp_path / "texts.jsonl", tmp_path / "asked.jsonl", tmp_path / "run"
    texts.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in words(40, s))}) + "\n" for s in range(6)))
    asked.write_text(json.dumps({"input": "w12 w13", "prompt": "w14", "answer": "w15"}) + "\n")
    pretrain = ["train", "icae", "--model", tiny_folder, "--data", texts, "--out", run, "--slots", 4, "--rank", 2]
    pretrain += [
        "--min-lm",
        8,
        "--passes",
        3,
        "--batch",
        3,
        "--lr",
        "1e-3",
        "--save-every",
        4,
        "--json",
        "--device",
        "cpu",
    ]

    code, out, error = kvbank(*pretrain, "--eval-data", texts)
    assert code == 0, error
    report = json.loads(out)
    assert report["steps"] == 6
    assert set(report["evaluation"]) == {"loss", "ae_loss", "lm_loss"}
    code, _, error = kvbank(*pretrain)
    assert code == 1
    assert "not empty" in error
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    shutil.rmtree(run / "checkpoint-6")
    code, out, error = kvbank(*pretrain, "--resume")
    assert code == 0, error
    assert json.loads(out)["digest"] == report["digest"]  # the last two steps again, to the same weights

    finetune = ["train", "icae", "--model", tiny_folder, "--task", "finetune", "--adapter", report["adapter"]]
    code, out, error = kvbank(*finetune, "--data", asked, "--out", tmp_path / "ft", "--device", "cpu", "--bf16")
    assert code == 0, error
    assert "ft_loss" in out
    config = json.loads((tmp_path / "ft" / "adapter" / "icae_config.json").read_text())
    assert (config["slots"], config["prefix_ids"], config["suffix_ids"]) == (4, [40], [41])

    code, out, _ = kvbank("train", "icae", "--help")
    assert code == 0
    assert all(word in out for word in ("input", "prompt", "answer", "lm_loss", "dtype", "Example"))
    code, _, error = kvbank(*finetune, "--data", texts, "--out", tmp_path / "wrong", "--device", "cpu")
    assert code == 1
    assert f"{texts}:1: the field 'input' is missing" in error.replace("\n", "")


def test_bad_input_to_the_command_is_one_line(kvbank: Any, tiny_folder: Path, tmp_path: Path):
    texts, blank, packed, run = (tmp_path / name for name in ("a.txt", "blank.txt", "book.txt.gz", "run"))
    texts.write_text("w12 w13 w14 " * 40)
    blank.write_text("")
    packed.write_bytes(gzip.compress(texts.read_bytes())[:-12])
    asked, long = tmp_path / "asked.jsonl", {"input": "w12 " * 20, "prompt": "w14", "answer": "w15 " * 120}
    asked.write_text("".join(json.dumps({**long, "answer": answer}) + "\n" for answer in ("w15", long["answer"])))
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "file").write_text("")
    command = ["train", "icae", "--model", tiny_folder, "--device", "cpu", "--slots", 4, "--rank", 2, "--steps", 1]
    for more, said in (
        (["--data", texts, "--out", texts], "is a file: --out is the folder of the run"),
        (["--data", texts, "--out", texts / "run"], "cannot be the folder of a run"),
        (["--data", texts, "--out", run, "--lr", "-1"], "above 0, not -1.0"),
        (["--data", texts, "--out", run, "--lr", "0"], "above 0, not 0.0"),
        (["--data", texts, "--out", run, "--alpha", "nan"], "not nan and 0.05"),
        (["--data", texts, "--out", run, "--alpha", "0"], "alpha is a number above 0"),
        (["--data", packed, "--out", run], "book.txt.gz: "),
        (["--data", blank, "--out", run], "blank.txt has no text"),
        (["--data", texts, "--out", run, "--slots", 26], "26 slots of 4 tokens need 131 positions"),
        (["--data", texts, "--out", run, "--context", 102], "needs 131 positions to be restored"),
        (["--data", asked, "--out", run, "--task", "finetune"], "asked.jsonl:2: the slots of `input`"),
        (["--data", texts, "--out", run, "--resume"], "no complete checkpoint in"),
        (["--data", texts, "--out", tmp_path / "no run", "--resume"], "no complete checkpoint in"),
        (["--data", texts, "--out", tmp_path / "no run"], "is not empty"),
    ):
        code, out, error = kvbank(*command, *more)
        flat = " ".join(error.split())
        assert code == 1, (more, error)
        assert said.replace(" ", "") in flat.replace(" ", ""), (more, error)
        assert "Traceback" not in error
        assert not out
        assert not run.exists()


def test_an_official_checkpoint_is_imported_tried_and_bound(kvbank: Any, tiny_folder: Path, tmp_path: Path):
    trained = adapter()
    trained.save_pretrained(tmp_path / "ours")
    lora = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    flat = {"icae." + name.replace(".weight", ".default.weight"): tensor for name, tensor in lora.items()}
    flat |= load_file(tmp_path / "ours" / "icae_memory.safetensors") | {"decoder.model.norm.weight": torch.ones(32)}
    official, out = tmp_path / "official.safetensors", tmp_path / "there" / "imported"
    save_file(flat, official)
    command = ["icae", "import", official, out, "--prefix-ids", "7,40", "--suffix-ids", "41", "--json"]

    for more, said in (
        (["--model", "kvbank-small"], "is 32 wide, this model 192"),
        (["--rate", 99, "--model", tiny_folder], "fit"),
        (["--suffix-ids", "4x"], "--suffix-ids takes token ids between commas, not '4x'"),
        (["--suffix-ids", "61", "--model", tiny_folder], "which has 61, not 61"),
        (["--alpha", "nan"], "alpha is a number above 0"),
    ):
        code, _, error = kvbank(*command, *more)
        assert code == 1, more
        assert said in " ".join(error.split())
        assert not out.exists()
    code, printed, error = kvbank(*command, "--model", tiny_folder)
    assert code == 0, error
    report = json.loads(printed)
    assert (report["slots"], report["prefix_ids"], report["suffix_ids"]) == (4, [7, 40], [41])
    imported = Icae.from_pretrained(base_model(), out)
    assert imported.digest == report["digest"]
    [own], [theirs] = imported.encode([words(12)]), trained.encode([words(12)])
    assert torch.equal(own.soft, theirs.soft)
    assert json.loads((out / "icae_config.json").read_text())["digest"] == imported.digest
    save_file(flat | {"icae.base_model.model.lora_magnitude_vector": torch.ones(2)}, tmp_path / "dora")
    for wrong, said in (
        (["icae", "import", official, out], "is there already"),
        (["icae", "import", official, official / "under"], "cannot be written"),
        (["icae", "import", tmp_path / "dora", tmp_path / "b"], "is no plain LoRA"),
    ):
        code, _, error = kvbank(*wrong)
        assert code == 1
        assert said in " ".join(error.split())


@pytest.mark.parametrize(("form", "slots"), [([], 25), (["--interface", "kv", "--positions", "spread"], 15)])
def test_the_default_slots_fit_the_model(kvbank: Any, tiny_folder: Path, tmp_path: Path, form: list[str], slots: int):
    """Positions of the model are 128: for 25 slots, a row and 100 tokens, or for twice 60 tokens and a row."""
    (tmp_path / "a.txt").write_text("w12 w13 w14 " * 40)
    command = ["train", "icae", "--model", tiny_folder, "--device", "cpu", "--rank", 2, "--steps", 1, *form]
    code, _, error = kvbank(*command, "--data", tmp_path / "a.txt", "--out", tmp_path / "run", "--json")
    assert code == 0, error
    assert json.loads((tmp_path / "run" / "adapter" / "icae_config.json").read_text())["slots"] == slots
