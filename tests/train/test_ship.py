"""The model of a run becomes the one that the package has."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from model_worker.attachment.loading import load_model
from model_worker.train.ship import ship, thinned


def test_a_run_is_shipped_in_bfloat16_with_its_log_and_what_is_said_of_chats(tmp_path: Path) -> None:
    model, tokenizer = load_model("kvbank-small")
    shipped = dict(model.config.kvbank)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 1.5, model.config.hidden_size))
    model.config.kvbank = {**{name: own for name, own in shipped.items() if name != "session"}, "query_tokens": 192}
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "training_log.jsonl").write_text('{"event": "begin"}\n{"step": 25}\n')
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"kvbank": {"session": {"window": 64}}}))
    (target / "README.md").write_text("by hand")
    # As a kill leaves it that comes when the old folder has made room for the new one.
    target.rename(tmp_path / "target.old")
    (tmp_path / "target.new").mkdir()

    ship(tmp_path / "run", target)
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    found, _ = load_model(str(target))
    assert found.config.kvbank == {**model.config.kvbank, "session": {"window": 64}}
    torch.testing.assert_close(found.model.norm.weight.float(), model.model.norm.weight.float(), rtol=2**-8, atol=0)
    assert (target / "README.md").read_text() == "by hand"
    assert (target / "training_log.jsonl").read_text() == '{"event": "begin"}\n{"step": 25}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "target"]
    shutil.rmtree(target)
    ship(tmp_path / "run", target)
    assert "session" not in load_model(str(target))[0].config.kvbank


def test_a_log_is_thinned_but_for_its_events() -> None:
    lines = ['{"event": "begin"}', *(f'{{"step": {step}}}' for step in range(100)), '{"event": "final"}']
    kept = thinned(lines, 400)
    assert sum(len(line) + 1 for line in kept) <= 400
    assert [kept[0], kept[-1]] == [lines[0], lines[-1]]
    assert thinned(lines, 10) == [lines[0], lines[-1]], "an end also where the events are more than there may be"
