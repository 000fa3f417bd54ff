"""What evaluations have in common: their service ends with them, and their journal is of what was measured."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from kvbank.console.ending import Failed
from model_worker.cli.measured_model import MeasuredModel
from model_worker.cli.measuring import decides, measured_worker
from tests.worker.tiny import build, tokenizer


def test_a_terminated_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that SIGTERM stops the service and deletes its folder; before that, that the model's own settings decide."""
    folder, places = tmp_path / "model", tmp_path / "places"
    build("llama_gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    options = MeasuredModel(model=str(folder), chunk=8, window=16)
    before = signal.getsignal(signal.SIGTERM)

    def measured() -> None:
        with measured_worker(options) as model:
            assert list(places.iterdir())
            first = json.dumps(decides(model), sort_keys=True)
            model.settings = replace(model.settings, min_share=0.5)
            assert json.dumps(decides(model), sort_keys=True) != first
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(Failed, match="terminated") as ended:
        measured()
    assert ended.value.code == 143
    assert list(places.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
