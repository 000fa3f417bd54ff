"""What the Trainer averages, saves, resumes and refuses."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from model_worker.errors import InputError
from model_worker.icae import Icae, IcaeConfig
from model_worker.icae.data import (
    Sample,
    continuation,
    instruction,
    restoration,
)
from model_worker.icae.objectives import Tally, needed
from model_worker.train.checkpoints import checkpoints
from model_worker.train.icae_trainer import IcaeTrainer, TrainSettings, train
from model_worker.train.pace import Pace
from model_worker.train.run_log import StepShown
from tests.train.icae_runs import BOS, EOS, adapter, base_model, logged, mixed, nats_by_hand, weights, words


class Samples(Dataset[Sample]):
    def __init__(self, samples: list[Sample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def settings(out: Path, **more: Any) -> TrainSettings:
    return TrainSettings(out=out, **{"rate": 1e-2, "warm_up": 0, "batch": 2, "log_every": 1, "shuffle": False, **more})


def test_accumulated_batches_weigh_tokens_as_one_batch_does(tmp_path: Path):
    """Means of means would give a token of a short sample more weight."""
    found = []
    for batch, accumulate in ((5, 1), (1, 5), (2, 3)):
        icae = adapter()
        own = settings(
            tmp_path / str(batch), batch=batch, accumulate=accumulate, steps=1, clip=0.0, schedule="constant"
        )
        sgd = torch.optim.SGD([p for p in icae.parameters() if p.requires_grad], lr=1e-2)
        report = train(icae, Samples(mixed()), own, optimizer=sgd)
        found.append((report.losses, weights(icae)))
    nats = {"ae": 0.0, "lm": 0.0, "ft": 0.0}
    for sample in mixed():
        nats[sample.objective] += nats_by_hand(adapter(), sample).item()
    expected = {"loss": sum(nats.values()) / 48, "ae_loss": nats["ae"] / 21, "lm_loss": nats["lm"] / 21}
    for losses, after in found:
        assert losses == pytest.approx(expected | {"ft_loss": nats["ft"] / 6}, rel=1e-4)
        for name, weight in after.items():
            torch.testing.assert_close(weight, found[0][1][name], rtol=1e-5, atol=1e-7)


def test_evaluation_gives_the_training_loss_on_the_same_data(tmp_path: Path):
    """Evaluation in the authors' code is of another model than they train; a mean over batches would be off as well."""
    icae = adapter()
    own = settings(tmp_path, batch=2, accumulate=3, steps=1, rate=1e-12)
    report = train(icae, Samples(mixed()), own, held_out=Samples(mixed()))
    assert report.evaluation == pytest.approx(report.losses, rel=1e-5)
    assert set(report.losses) == {"loss", "ae_loss", "lm_loss", "ft_loss"}
    assert logged(tmp_path)[-1]["eval_loss"] == pytest.approx(report.evaluation["loss"], abs=1e-5)


def test_training_learns_and_leaves_the_base_alone(tmp_path: Path):
    icae = adapter(IcaeConfig(slots=4, interface="kv", positions="spread"), moved=False)
    before = {name: p.detach().clone() for name, p in icae.base_model.named_parameters()}
    samples = Samples([restoration(words(8, seed), EOS) for seed in range(4)])
    shown: list[tuple[int, int]] = []
    progress = StepShown(lambda *at: shown.append(at))
    report = train(icae, samples, settings(tmp_path, steps=60, batch=4, rate=2e-2), callbacks=[progress])
    losses = [entry["ae_loss"] for entry in logged(tmp_path) if "ae_loss" in entry]
    assert len(losses) == report.steps == 60
    assert losses[-1] < losses[0] - 1.5
    assert shown[-1] == (60, 60)
    assert all(torch.equal(p, before[name]) for name, p in icae.base_model.named_parameters())
    again = Icae.from_pretrained(icae.base_model, report.adapter)
    assert again.digest == icae.digest == report.digest


def test_a_checkpoint_holds_lora_and_rows_and_resumes_bit_by_bit(tmp_path: Path):
    samples = Samples([sample for _ in range(4) for sample in mixed()])

    def fresh() -> Icae:
        return adapter(dropout=0.2)

    own = settings(tmp_path / "whole", steps=8, save_every=3, keep=3, batch=2, accumulate=2, warm_up=2, shuffle=True)
    whole = fresh()
    train(whole, samples, own)
    first = checkpoints(own.out)[0]
    assert [path.name for path in checkpoints(own.out)] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    saved = load_file(first / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert not [path for path in first.rglob("*") if path.name.startswith(("model", "pytorch_model"))]
    trainable = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    assert sum(t.numel() for t in saved.values()) + whole.memory.numel() == trainable

    resumed = fresh()
    train(resumed, samples, replace(own, out=tmp_path / "rest"), resume=first)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name
    after = [entry for entry in logged(own.out) if "ae_loss" in entry][3:]
    rest = [entry for entry in logged(tmp_path / "rest") if "ae_loss" in entry]
    assert [(e["step"], e["loss"], e["learning_rate"]) for e in rest] == [
        (e["step"], e["loss"], e["learning_rate"]) for e in after
    ]


def test_a_checkpoint_of_another_form_or_half_written_is_refused(tmp_path: Path):
    train(adapter(), Samples(mixed()), settings(tmp_path, steps=1, save_every=1))
    (first,) = checkpoints(tmp_path)
    scaled = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(scaled | {"lora_alpha": 640}))
    with pytest.raises(InputError, match="another form"):
        train(adapter(), Samples(mixed()), settings(tmp_path / "a", steps=2), resume=first)
    (first / "adapter_config.json").write_text(json.dumps(scaled))
    with pytest.raises(InputError, match="another form"):
        train(adapter(IcaeConfig(slots=2)), Samples(mixed()), settings(tmp_path / "b", steps=2), resume=first)
    for name in ("optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"):
        whole = (first / name).read_bytes()
        (first / name).write_bytes(b"{ not at all")
        with pytest.raises(InputError, match=r"checkpoint-1 (cannot be resumed from|is damaged): ") as caught:
            train(adapter(), Samples(mixed()), settings(tmp_path / "d", steps=2), resume=first)
        assert "\n" not in str(caught.value)
        (first / name).write_bytes(whole)
    (first / "optimizer.pt").rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"no optimizer\.pt"):  # with a new one it would go on, but not exactly
        train(adapter(), Samples(mixed()), settings(tmp_path / "e", steps=2), resume=first)
    (first / "trainer_state.json").unlink()
    assert not checkpoints(tmp_path)
    with pytest.raises(InputError, match="not a complete checkpoint"):
        train(adapter(), Samples(mixed()), settings(tmp_path / "c", steps=2), resume=first)


def test_fp16_is_refused_and_bf16_trains_float32_weights(tmp_path: Path):
    half = Icae.create(base_model().half(), IcaeConfig(slots=4), rank=2)
    with pytest.raises(InputError, match="fp16"):
        train(half, Samples(mixed()), settings(tmp_path / "half", steps=1))
    own = settings(tmp_path / "args")
    arguments = TrainingArguments(output_dir=str(own.out), use_cpu=True, report_to=[])
    arguments.fp16 = True
    with pytest.raises(InputError, match="fp16"):
        IcaeTrainer(adapter(), arguments, pace=Pace(None), settings=own)

    reports = {}
    for name, base in (("float32", base_model()), ("autocast", base_model()), ("bf16", base_model().bfloat16())):
        icae = Icae.create(base, IcaeConfig(slots=4), rank=4, dropout=0.0)
        own = settings(tmp_path / name, steps=2, batch=5, bf16=name != "float32", checkpointing=True)
        reports[name] = train(icae, Samples(mixed()), own)
        assert {weight.dtype for weight in weights(icae).values()} == {torch.float32}
    plain = reports["float32"].losses["loss"]
    for name in ("autocast", "bf16"):
        loss = reports[name].losses["loss"]
        assert loss != plain
        assert loss == pytest.approx(plain, rel=0.02)


def test_samples_beyond_the_models_positions_are_refused(tmp_path: Path):
    """Positions are 128, for the slots of the context, a row, the text and what stands around it; EOS is predicted, and
    not read."""
    config = IcaeConfig(slots=4, lm_row=True, prefix_ids=(BOS, 40), suffix_ids=(42,))
    icae = adapter(config)
    for sample, fits in (
        (restoration(words(99), EOS), True),  # 7 spans
        (restoration(words(100), EOS), False),
        (continuation(words(101), words(100), leave=8), True),
        (continuation(words(101), words(101), leave=8), False),
        (instruction(words(33), words(40), words(72), EOS), True),
        (instruction(words(33), words(40), words(73), EOS), False),
    ):
        assert needed(icae, sample) == 128 + (not fits)
        report = partial(train, icae, Samples([sample]), settings(tmp_path / "run", steps=1))
        if fits:
            report()
            continue
        with pytest.raises(InputError, match="need 129 positions, this model has 128"):
            report()


def test_nothing_trainable_and_a_broken_loss_are_said(tmp_path: Path):
    train(adapter(), Samples(mixed()), settings(tmp_path, steps=1))
    frozen = Icae.from_pretrained(base_model(), tmp_path / "adapter")
    with pytest.raises(InputError, match="trainable=True"):
        train(frozen, Samples(mixed()), settings(tmp_path / "frozen", steps=1))
    with pytest.raises(InputError, match="schedule"):
        settings(tmp_path, schedule="linear")
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="above 0"):
            settings(tmp_path, rate=rate)
    for wrong, reason in (({"clip": math.nan}, "clip is a norm"), ({"minutes": math.nan}, "more than nothing")):
        with pytest.raises(InputError, match=reason):
            settings(tmp_path, **wrong)
    for wrong in ({"alpha": math.nan}, {"alpha": 0}, {"dropout": math.nan}):
        with pytest.raises(InputError, match="alpha is a number above 0, dropout one from 0 to below 1"):
            Icae.create(base_model(), IcaeConfig(4, 4), rank=2, **wrong)
    report = tmp_path / "adapter" / "adapter_model.safetensors"
    report.write_bytes(b"not at all")
    with pytest.raises(InputError, match="is damaged"):
        Icae.from_pretrained(base_model(), tmp_path / "adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be the folder of a run"):
        train(adapter(), Samples(mixed()), settings(tmp_path / "file", steps=1))
    broken = adapter()
    with torch.no_grad():
        broken.memory.fill_(float("nan"))
    with pytest.raises(Exception, match="the loss is nan at step 0"):
        train(broken, Samples(mixed()), settings(tmp_path / "broken", steps=1))


class TenthsOfARun(Pace):
    """A clock that moves on by a tenth of the limit with each update, however fast the machine is."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.updates = 0

    @property
    def seconds(self) -> float:
        return 6.0 * self.updates


class Tick(TrainerCallback):
    def __init__(self, pace: TenthsOfARun):
        self._pace = pace

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.updates += 1


def test_a_run_ends_by_the_clock_and_its_rate_falls_with_it(tmp_path: Path):
    own, pace = settings(tmp_path, steps=100_000, minutes=1.0, batch=1), TenthsOfARun()
    report = train(adapter(), Samples([restoration(words(4), EOS)]), own, pace=pace, callbacks=[Tick(pace)])
    rates = [entry["learning_rate"] for entry in logged(tmp_path) if "learning_rate" in entry]
    assert report.steps == len(rates) == 10
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.9 * own.rate
    assert rates[-1] < 0.1 * own.rate


def test_the_pace_is_of_updates_or_of_the_clock():
    pace = TenthsOfARun()
    assert [pace.share(1, 4), pace.share(9, 4)] == [0.25, 1.0]
    pace.updates = 5
    assert [pace.share(1, 4), pace.share(3, 4)] == [0.5, 0.75]
    real = Pace(1e-12)  # less than the clock can tell: over once it has moved
    while not real.seconds:
        pass
    assert real.share(0, 4) == 1.0
    assert Pace(None).share(0, 4) == 0.0


def test_the_tally_weighs_tokens():
    tally = Tally()
    tally.add(mixed()[:3], torch.tensor([1.0, 2.0, 30.0]), torch.tensor([1, 2, 3]))
    assert tally.means() == pytest.approx({"loss": 33 / 6, "ae_loss": 1.0, "lm_loss": 10.0})
    assert Tally().means() == {}
