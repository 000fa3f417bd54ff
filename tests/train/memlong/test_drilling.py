"""Drills beside the texts: a row attends to its own chunks, its answers are learnt, and it goes on after a resume."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_worker.attaching import attach
from model_worker.errors import InputError
from model_worker.text_files import reference_text
from model_worker.train.checkpoints import checkpoints
from model_worker.train.drills import Drill, DrillRow, DrillShape
from model_worker.train.memlong.drilling import Drilling
from model_worker.train.memlong.learner import Learner
from model_worker.train.memlong.rows import Blocks
from model_worker.train.memlong.run import train_memlong
from model_worker.train.memlong.settings import MemlongTraining
from tests.train.memlong.runs import weights
from tests.worker.tiny import build, tokenizer, tokens

SIZE, ROW, ATTENDED = 4, 3, 2


class Spans(Drill):
    """Rows whose wanted tokens are those of the second block; chunk `changed` may be another one."""

    changed = -1

    def row(self) -> DrillRow:
        number = self.draw.randrange(1000)
        ids, chunks = tokens(SIZE * ROW, seed=number)[0].numpy(), tokens(SIZE, seed=number, rows=ATTENDED).numpy()
        if self.changed >= 0:
            chunks[self.changed] = 5
        wanted = np.zeros(len(ids), dtype=bool)
        wanted[SIZE : 2 * SIZE] = True
        return DrillRow(ids, wanted, chunks)


@pytest.mark.parametrize("alone", [True, False])
def test_rows_attend_to_their_own_chunks(alone: bool) -> None:
    attachment = attach(build("llama_gqa"), mode="memlong" if alone else "per_layer")
    learner = Learner(attachment, Blocks(SIZE, ROW - 1)).eval()

    def nats(changed: int = -1) -> torch.Tensor:
        drill = Spans(tokenizer(), [], DrillShape(SIZE, ROW, ATTENDED), seed=0)
        drill.changed = changed
        [step] = Drilling([drill], learner, 2, alone=alone, sinks=0).steps()
        with torch.no_grad():
            return learner.nats(step)[0]

    plain = nats()
    assert (plain > 0).nonzero()[:, 1].tolist() == [3, 4, 5, 6, 3, 4, 5, 6]  # where what follows is wanted
    for changed in range(ATTENDED):
        assert (nats(changed)[:, 3:7] != plain[:, 3:7]).all()
    attachment.detach()


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Path]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "text.txt").write_text(reference_text()[:20_000])
    yield tmp_path / "text.txt"
    torch.set_num_threads(before)


def run(text: Path, *, resume: bool = False, **more: Any) -> Path:
    from model_worker.attachment.loading import load_model

    settings = MemlongTraining(
        text=(text,),
        **{"new": "hidden=64,layers=3", "blocks": 4, "streams": 1, "window": 128, "memory": 8, "device": "cpu", **more},
    )
    out = text.parent / "run"
    return Path(
        train_memlong(settings, out, lambda name, _: load_model(name), resume=resume, bars=lambda *at: None).product
    )


def test_drills_are_logged_and_go_on_after_a_resume(text: Path) -> None:
    own = {"steps": 4, "drills": 1.0, "save_every": 2, "log_every": 1}
    product = run(text, **own)
    expected = weights(product)
    lines = [json.loads(line) for line in (product.parent / "training_log.jsonl").read_text().splitlines()]
    assert all(line["drill_loss"] > 0 for line in lines if "loss" in line)
    shutil.rmtree(checkpoints(product.parent)[-1])
    found = weights(run(text, resume=True, **own))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_facts_do_not_fit_into_small_chunks(text: Path) -> None:
    with pytest.raises(InputError, match="at least 32 tokens, not 16"):
        run(text, drills=0.5, chunk=16)
