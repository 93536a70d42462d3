"""A training goes on as if never stopped, stops before it spoils anything, and says why."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctsr.errors import ResourceError, TrainingDiverged, UsageError, WeightsError
from ctsr.models import zoo
from ctsr.train import checkpoint
from ctsr.train.loop import KEPT, LoopConfig
from tests.train import tiny

ROOT = Path(__file__).parents[2]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of everything that a run leaves, but the lock."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != ".lock")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, str]:
    """What 8 steps without a stop leave: weights, moments, counters, metrics, to the byte."""
    folder = tmp_path_factory.mktemp("unbroken")
    outcome, _ = tiny.run(folder)
    assert outcome.step == 8
    assert outcome.stopped_by is None
    assert [line["step"] for line in tiny.metrics(folder)] == [4, 8]
    return digests(folder)


@pytest.mark.parametrize(
    "stops",
    [[1], [2], [3], [4], [7], [8], [1, 2], [3, 4]],
    ids=lambda stops: "stopped at " + " and ".join(map(str, stops)),
)
def test_a_resumed_run_is_the_unbroken_one_to_the_byte(tmp_path, unbroken, stops):
    for step in stops:
        outcome, _ = tiny.run(tmp_path, stop_at=step)
        assert (outcome.step, outcome.stopped_by) == (step, signal.SIGTERM)
    outcome, told = tiny.run(tmp_path)
    assert outcome.step == 8
    assert told.notes == [f"going on from step {stops[-1]}"]
    assert digests(tmp_path) == unbroken


def test_worker_processes_change_nothing(tmp_path, unbroken):
    tiny.run(tmp_path, stop_at=3, workers=2)
    tiny.run(tmp_path, workers=2)
    ours = json.loads((tmp_path / "config.json").read_text())
    assert ours["loop"]["workers"] == 2
    # all but the number of workers itself is the same
    run = {"workers": 0}
    file = zoo.unpack((tmp_path / "last.safetensors").read_bytes(), "last")
    file.card["run"]["loop"] |= run
    again = zoo.pack(file.kind, file.config, file.tensors, card=file.card, training=file.training)
    assert hashlib.sha256(again).hexdigest() == unbroken["last.safetensors"]
    assert digests(tmp_path)["metrics.jsonl"] == unbroken["metrics.jsonl"]


@pytest.mark.parametrize("kept", ["last from before the validation", "best newer than last"])
def test_a_kill_around_a_validation_loses_neither_it_nor_the_best(tmp_path, unbroken, kept, monkeypatch):
    write = checkpoint.write_bytes
    validated = False

    def dies(path, data, *, overwrite):
        nonlocal validated
        if path.name == "best.safetensors":
            validated = True
            if kept == "last from before the validation":
                raise KeyboardInterrupt
        if path.name == "last.safetensors" and validated:
            raise KeyboardInterrupt
        return write(path, data, overwrite=overwrite)

    monkeypatch.setattr(checkpoint, "write_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, save_every=4)
    monkeypatch.undo()
    assert checkpoint.read(tmp_path).card["training"]["validation_due"] is True
    tiny.run(tmp_path, save_every=3)
    assert digests(tmp_path) == unbroken


def test_a_signal_in_a_validation_leaves_it_to_the_next_run(tmp_path, unbroken):
    class ComesInValidation(tiny.Told):
        asked = 0

        def stop(self) -> int | None:
            self.asked += self.steps[-1:] == [4]
            return signal.SIGTERM if self.asked >= 2 else None  # the first is asked between the two

    outcome, told = tiny.run(tmp_path, told=ComesInValidation())
    assert (outcome.step, outcome.stopped_by, told.validations) == (4, signal.SIGTERM, [])
    assert tiny.metrics(tmp_path) == []
    tiny.run(tmp_path)
    assert digests(tmp_path) == unbroken


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, unbroken):
    tiny.run(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"}
    outcome, told = tiny.run(tmp_path)
    assert outcome.was_finished
    assert outcome.step == 8
    assert outcome.best_db is not None
    assert told.steps == []
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != ".lock"} == before
    assert tiny.run(tmp_path, max_steps=9)[0].step == 9


def test_starting_afresh_leaves_nothing_of_the_old_run(tmp_path, unbroken):
    make = lambda: tiny.task(seed=5)  # noqa: E731
    tiny.run(tmp_path, make=make, seed=5, validate_every=1)
    outcome, _ = tiny.run(tmp_path, resume=False, stop_at=2)
    assert outcome.step == 2
    assert tiny.metrics(tmp_path) == []
    outcome, told = tiny.run(tmp_path)  # what is resumed is the new run
    assert told.notes == ["going on from step 2"]
    assert digests(tmp_path) == unbroken


def test_the_best_is_the_bytes_of_its_step(tmp_path):
    bests = {}

    class Keeps(tiny.Told):
        def validation(self, step, metrics, is_best):
            if is_best:
                bests["of that step"] = digests(tmp_path)["last.safetensors"]
                assert digests(tmp_path)["best.safetensors"] == bests["of that step"]

    tiny.run(tmp_path, told=Keeps(), validate_every=1)
    assert digests(tmp_path)["best.safetensors"] == bests["of that step"]
    best = max(tiny.metrics(tmp_path), key=lambda line: line["psnr_4095_db"])
    assert checkpoint.read(tmp_path).card["training"]["best_step"] == best["step"]


OTHER_PROCESS = """
import pathlib, sys, time
days = iter(range(10**9, 0, -86400))
time.time = lambda: float(next(days))
from tests.train import tiny
tiny.run(pathlib.Path(sys.argv[1]))
print([name for name in ("SimpleITK", "pydicom", "matplotlib", "tensorboard") if name in sys.modules])
"""


def test_another_process_does_the_same_whatever_its_clock_and_hash_seed_and_needs_no_more(tmp_path, unbroken):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONHASHSEED": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert digests(tmp_path) == unbroken


# ---- what may change between two runs of one folder

FREE = {
    "max_steps",
    "batch_size",
    "learning_rate",
    "validate_every",
    "save_every",
    "workers",
    "device",
    "log",
}


def test_every_setting_is_classified():
    assert {f.name for f in fields(LoopConfig)} == FREE | KEPT


@pytest.mark.parametrize("name", sorted(KEPT))
def test_a_setting_that_makes_another_run_is_refused(tmp_path, name):
    tiny.run(tmp_path, max_steps=1)
    before = digests(tmp_path)
    value = getattr(tiny.LOOP, name)
    other = (not value) if isinstance(value, bool) else value + 1
    with pytest.raises(UsageError, match=rf"loop\.{name}: {value} → {other}.*--resume no") as told:
        tiny.run(tmp_path, **{name: other})
    assert told.value.exit_code == 2
    assert digests(tmp_path) == before


def test_settings_that_are_free_go_on(tmp_path):
    tiny.run(tmp_path, max_steps=1)
    free = {"max_steps": 3, "learning_rate": 1e-4, "validate_every": 2, "save_every": 1, "workers": 1}
    assert tiny.run(tmp_path, **free)[0].step == 3


def test_pairs_a_step_recipe_network_and_scans_are_kept(tmp_path):
    tiny.run(tmp_path, max_steps=1)
    with pytest.raises(UsageError, match=r"recipe\.pairs a step: 2 → 3"):
        tiny.run(tmp_path, batch_size=3)
    with pytest.raises(UsageError, match=r"recipe\.pairs: .*noise_max"):
        tiny.run(tmp_path, make=lambda: tiny.task(recipe=replace(tiny.RECIPE, noise_max=1.0)))

    def wider():
        task = tiny.task()
        task.config = {**task.config, "channels": (8, 16)}
        return task

    def other_scans():
        task = tiny.task()
        task.recipe = {**task.recipe, "val": "1 scans 0123"}
        return task

    with pytest.raises(UsageError, match=r"network\.channels: \[8, 8\] → \[8, 16\]"):
        tiny.run(tmp_path, make=wider)
    with pytest.raises(UsageError, match=r"recipe\.val: 1 scans \w+ → 1 scans 0123"):
        tiny.run(tmp_path, make=other_scans)


def test_the_folder_of_another_kind_of_training_is_refused(tmp_path):
    tiny.run(tmp_path, max_steps=1)

    def other_kind():
        task = tiny.task()
        task.kind = "vae"
        return task

    with pytest.raises(UsageError, match="holds a training of baseline, not of vae"):
        tiny.run(tmp_path, make=other_kind)


def test_the_scans_that_a_run_is_made_from_are_told_apart():
    task = tiny.task()
    scans = [tiny.volume(1), tiny.volume(2)]
    make = lambda train: tiny.BaselineTask(  # noqa: E731
        task.model, train, [tiny.volume(3)], recipe=tiny.RECIPE, seed=0, card={}
    )
    same, turned, other = make(scans), make(scans[::-1]), make([*scans, tiny.volume(4)])
    thick = make([scans[0], replace(scans[1], slice_thickness=2.0)])
    assert len({str(t.recipe["train"]) for t in (same, turned, other, thick)}) == 4
    assert make(scans).recipe == same.recipe


def test_a_checkpoint_without_a_training_state_is_refused(tmp_path):
    tiny.run(tmp_path, max_steps=1)
    file = checkpoint.read(tmp_path)

    def put(card=None, training=None, tensors=None):
        data = zoo.pack(
            file.kind, file.config, tensors or file.tensors, card=file.card | (card or {}), training=training
        )
        (tmp_path / "last.safetensors").write_bytes(data)

    raw_alone = {n: t for n, t in file.training.items() if n.startswith("raw/")}
    half = {n: t for n, t in file.training.items() if n != "exp_avg/head.weight"}
    turned = file.training | {"exp_avg/head.bias": torch.zeros(3)}
    for fault in (
        {"training": {}},
        {"training": raw_alone},
        {"training": half},
        {"training": turned},
        {"training": file.training, "card": {"training": {"step": "8"}}},
        {"training": file.training, "card": {"training": {"steps": 8}}},
        {"training": file.training, "tensors": {"foreign": torch.zeros(1)}},
    ):
        put(**fault)
        with pytest.raises(WeightsError, match=r"no training state of this network.*--resume no") as told:
            tiny.run(tmp_path)
        assert told.value.exit_code == 5
    put(training=file.training, card={"run": None})
    with pytest.raises(WeightsError, match="does not say how it was trained"):
        tiny.run(tmp_path)
    (tmp_path / "last.safetensors").write_bytes(b"\x80\x04junk")
    with pytest.raises(WeightsError, match="a pickle, not safetensors"):
        tiny.run(tmp_path)
    (tmp_path / "last.safetensors").unlink()
    assert tiny.run(tmp_path)[0].step == 8


def test_a_checkpoint_from_before_a_setting_existed_still_loads(tmp_path):
    tiny.run(tmp_path, max_steps=2)
    file = checkpoint.read(tmp_path)
    del file.card["training"]["validation_due"], file.card["run"]["recipe"]["train"]
    data = zoo.pack(file.kind, file.config, file.tensors, card=file.card, training=file.training)
    (tmp_path / "last.safetensors").write_bytes(data)
    assert tiny.run(tmp_path)[0].step == 8


def test_metrics_that_no_training_wrote_are_refused(tmp_path):
    tiny.run(tmp_path, stop_at=5)
    (tmp_path / "metrics.jsonl").write_text("step 1\n")
    with pytest.raises(Exception, match=r"metrics.jsonl: is not what a training wrote") as told:
        tiny.run(tmp_path)
    assert told.value.exit_code == 3


# ---- training that notices


class _Spoils:
    """A task's loss with something wrong in the n-th step it is asked for."""

    def __init__(self, *, at: range, by: str) -> None:
        self.at, self.by, self.asked = at, by, 0

    def __call__(self):
        task = tiny.task()
        honest = task.loss

        def loss(model, batch):
            self.asked += 1
            value = honest(model, batch)
            if self.asked - 1 not in self.at:
                return value
            if self.by == "loss":
                return value * math.nan
            if self.by == "gradient":  # finite itself; its derivative at 0 is not
                return value + torch.sqrt(next(iter(model.parameters())).sum() * 0)
            return value * 1e4

        task.loss = loss
        return task


@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(tmp_path, by):
    with pytest.raises(TrainingDiverged) as told:
        tiny.run(tmp_path, make=_Spoils(at=range(5, 6), by=by))
    assert told.value.exit_code == 8
    assert str(told.value) == (
        f"{tmp_path}: step 5: {by} is not finite (pairs 10 and on) (last good checkpoint: step 4; lower --lr)"
    )
    file = checkpoint.read(tmp_path)  # which refuses what is not finite
    assert file.card["training"]["step"] == 4
    outcome, _ = tiny.run(tmp_path)
    assert outcome.step == 8


@pytest.fixture
def settled(monkeypatch):
    """A "usual" that four steps decide, instead of twenty."""
    monkeypatch.setattr(checkpoint, "SETTLED", 4)


def test_a_loss_that_jumps_goes_back_once_with_half_the_rate(tmp_path, settled):
    outcome, told = tiny.run(
        tmp_path, make=_Spoils(at=range(7, 8), by="jump"), save_every=2, validate_every=20
    )
    assert outcome.step == 8
    assert told.steps == [1, 2, 3, 4, 5, 6, 7, 7, 8]
    assert told.rates[7] == pytest.approx(told.rates[6] / 2)
    assert len(told.notes) == 1
    assert "step 7: loss jumped to" in told.notes[0]
    assert "back to step 6 with half the rate" in told.notes[0]
    assert checkpoint.read(tmp_path).card["training"]["rate_scale"] == 0.5


def test_a_loss_that_jumps_twice_stops(tmp_path, settled):
    with pytest.raises(TrainingDiverged, match=r"step 6: loss jumped .*last good checkpoint: step 6") as told:
        tiny.run(tmp_path, make=_Spoils(at=range(7, 20), by="jump"), save_every=2, validate_every=20)
    assert told.value.exit_code == 8
    assert checkpoint.read(tmp_path).card["training"]["step"] == 6


def test_what_is_usual_is_what_a_step_is_clipped_to(tmp_path, settled, monkeypatch):
    limits = []
    clip = torch.nn.utils.clip_grad_norm_

    def sees(parameters, limit):
        limits.append(limit)
        return clip(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", sees)
    tiny.run(tmp_path)
    norms = checkpoint.read(tmp_path).card["training"]["norms"]
    assert limits[:4] == [math.inf] * 4
    assert limits[4:] == [2 * float(np.median(norms[:n])) for n in range(4, 8)]


def idle_task(*, residual: float, added: float):
    """A task whose network adds so much, whatever it is over cubic."""
    task = tiny.task()
    task.validate = lambda model, stop: {
        "psnr_4095_db": 50.0,
        "gain_db": 1.5,
        "added_db": added,
        "residual_rms_hu": residual,
    }
    return task


@pytest.fixture
def past_warmup(tmp_path):
    """A run at step 499: from 500 on an idle network is noticed."""
    tiny.run(tmp_path, max_steps=3, make=lambda: idle_task(residual=0.0, added=0.0), validate_every=1)
    file = checkpoint.read(tmp_path)
    assert file.card["training"]["idle_validations"] == 0
    file.card["training"]["step"] = 499
    data = zoo.pack(file.kind, file.config, file.tensors, card=file.card, training=file.training)
    (tmp_path / "last.safetensors").write_bytes(data)
    return tmp_path


def test_a_network_that_adds_nothing_stops_after_two_validations(past_warmup):
    with pytest.raises(TrainingDiverged, match="step 501: the network adds nothing") as told:
        tiny.run(
            past_warmup, max_steps=600, validate_every=1, make=lambda: idle_task(residual=0.09, added=0.009)
        )
    assert told.value.exit_code == 8
    assert [line["step"] for line in tiny.metrics(past_warmup)][-2:] == [500, 501]


@pytest.mark.parametrize(("residual", "added"), [(0.11, 0.0), (0.0, 0.011)])
def test_a_network_that_adds_a_little_goes_on(past_warmup, residual, added):
    make = lambda: idle_task(residual=residual, added=added)  # noqa: E731
    assert tiny.run(past_warmup, max_steps=503, validate_every=1, make=make)[0].step == 503


def test_validation_leaves_the_training_as_it_was(tmp_path):
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    tiny.run(often, validate_every=1)
    _, told = tiny.run(seldom, validate_every=8)
    a, b = checkpoint.read(often), checkpoint.read(seldom)
    for name, tensor in (a.tensors | a.training).items():
        assert torch.equal(tensor, (b.tensors | b.training)[name]), name
    assert a.card["training"]["losses"] == told.losses
    state = torch.random.get_rng_state()
    task = tiny.task()
    task.model.train()
    with torch.inference_mode():
        task.validate(task.model, lambda *done: None)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mixed_precision_trains_on_a_cpu(tmp_path):
    outcome, told = tiny.run(tmp_path, use_amp=True, max_steps=4)
    plain = tiny.run(tmp_path / "plain", max_steps=4)[1]
    assert outcome.best_db is not None
    np.testing.assert_allclose(told.losses, plain.losses, rtol=0.02)  # bfloat16 has three digits
    assert told.losses != plain.losses
    assert all(t.dtype == torch.float32 for t in checkpoint.read(tmp_path).tensors.values())


def test_checkpointed_gradients_train_the_same(tmp_path):
    def thrifty():
        task = tiny.task()
        task.model.gradient_checkpointing = True
        return task

    _, told = tiny.run(tmp_path / "thrifty", make=thrifty)
    _, plain = tiny.run(tmp_path / "plain")
    assert told.losses == plain.losses


def test_the_rate_warms_up_and_falls_to_a_hundredth(tmp_path):
    _, told = tiny.run(tmp_path, max_steps=40, warmup_steps=4, validate_every=40, save_every=40)
    np.testing.assert_allclose(told.rates[:4], np.array([0.25, 0.5, 0.75, 1]) * 1e-3)
    assert np.all(np.diff(told.rates[4:]) < 0)
    assert told.rates[-1] == pytest.approx(1e-5, rel=0.3)


# ---- the machine


def test_a_second_training_of_the_folder_is_refused(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(UsageError, match="a training is active") as told:
        tiny.run(tmp_path)
    assert told.value.exit_code == 2
    assert tiny.run(tmp_path, max_steps=1)[0].step == 1


class _Dies:
    """A task whose dataset ends the process that prepares pair 5."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self):
        task = tiny.task()
        pair, how, parent = task.source.pair, self.how, os.getpid()

        def ends(index):
            if index == 5 and os.getpid() != parent:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(3)
            return pair(index)

        task.source.pair = ends
        return task


_RUN_WITH_A_WORKER_THAT_DIES = """
import sys
from pathlib import Path
from ctsr.errors import ResourceError
from tests.train import tiny
from tests.train.test_loop import _Dies
try:
    tiny.run(Path(sys.argv[1]), make=_Dies(sys.argv[2]), workers=1)
except ResourceError as exc:
    print(exc.exit_code, exc)
"""


@pytest.mark.ci
@pytest.mark.parametrize("how", ["killed", "exit"])
def test_a_worker_that_dies_is_named_and_nothing_hangs(tmp_path, how):
    # in a process of its own: torch raises a worker's death wherever the process is, in the test runner too
    ran = subprocess.run(
        [sys.executable, "-c", _RUN_WITH_A_WORKER_THAT_DIES, str(tmp_path), how],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert re.match(r"4 .*prepares data has ended: .*pid.*fewer --workers", ran.stdout), ran.stderr[-1000:]
    assert tiny.run(tmp_path)[0].step == 8  # without workers it goes on


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried …",
    ],
)
def test_too_little_memory_says_what_to_lower(tmp_path, words):
    def make():
        task = tiny.task()

        def loss(model, batch):
            raise torch.OutOfMemoryError(words)

        task.loss = loss
        return task

    with pytest.raises(ResourceError, match=r"out of memory on cpu \(a smaller --batch-size or --patch-size"):
        tiny.run(tmp_path, make=make)
    assert checkpoint.read(tmp_path).card["training"]["step"] == 0


def test_a_bug_is_not_dressed_up(tmp_path):
    def make():
        task = tiny.task()
        task.loss = lambda model, batch: torch.zeros(2) @ torch.zeros(3)
        return task

    with pytest.raises(RuntimeError, match="size"):
        tiny.run(tmp_path, make=make)


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    tiny.run(tmp_path, log="tensorboard")
    written = b"".join(p.read_bytes() for p in (tmp_path / "runs").iterdir())
    for tag in (b"train/loss", b"validation/gain_db"):
        assert tag in written


def test_tensorboard_that_is_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ResourceError, match=r"TensorBoard is not installed \(pip install 'ctsr\[tensorboard\]'\)"
    ):
        tiny.run(tmp_path, log="tensorboard")


PROCESSES = """
import os, sys, pathlib
from tests.train import tiny
outcome, told = tiny.run(pathlib.Path(sys.argv[1]))
sys.stdout.write(f"RANK {outcome.best_db} {outcome.best_step} {told.notes}\\n")
sys.stdout.flush()
os._exit(0)  # torch leaves threads of a group that DDP has used, and they may abort the interpreter's end
"""


def test_two_processes_go_on_where_one_with_the_doubled_batch_stopped(tmp_path):
    code, two, one = tmp_path / "two.py", tmp_path / "two", tmp_path / "one"
    code.write_text(PROCESSES)
    tiny.run(two, batch_size=4, stop_at=2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, code, two],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    _, told = tiny.run(one, batch_size=4)
    # a mean of two means is summed in another order than a mean of four
    np.testing.assert_allclose(checkpoint.read(two).card["training"]["losses"], told.losses, rtol=1e-4)
    for a, b in zip(tiny.metrics(two), tiny.metrics(one), strict=True):
        assert a["psnr_4095_db"] == pytest.approx(b["psnr_4095_db"], abs=1e-3)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("RANK"))
    assert len(lines) == 2
    assert lines[0].split()[1:3] == lines[1].split()[1:3]  # both know the best …
    assert sum("going on" in line for line in lines) == 1  # … and one of them speaks
    with pytest.raises(UsageError, match="pairs a step: 4 → 2"):
        tiny.run(two)
    assert tiny.run(two, batch_size=4)[0].was_finished
