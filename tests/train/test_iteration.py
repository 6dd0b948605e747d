"""Updates as CUDA graphs: same weights and logs as without. Without a GPU, `recording.Recorder` stands in."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TINY, stage2_options
from recording import META, Numbers, Recorder, Tape, standing_in

from fastdiff import data, distributed, graph
from fastdiff.denoiser import Denoiser, DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.losses import regression
from fastdiff.losses.batch import Batch
from train import encoder, iteration, sid, stage1, stage2, teacher, two_student
from train.batches import ImageBatches
from train.iteration import WARM_UP, Iteration
from train.options import LoopOptions
from train.updater import Updater, new_updater

FEW = {"updates": 6, "save_every": 3, "log_every": 2, "batch_size": 16, "device": "cpu"}
DROPPING = replace(TINY, dropout=0.2)


@pytest.fixture
def recorders(monkeypatch):
    with standing_in(monkeypatch) as made:
        yield made


# --- every recipe ---


def run_teacher(runs, out, **changes):
    return teacher.train(teacher.Options(out=out, unet=DROPPING, **(FEW | changes)))


def run_stage1(runs, out, **changes):
    return stage1.train(stage1.Options(out=out, teacher=runs.teacher, **(FEW | changes)))


def run_stage2(runs, out, **changes):
    return stage2.train(stage2_options(runs.stage1, out, log_every=2, **changes))


def run_encoder(runs, out, **changes):
    return encoder.train(encoder.Options(out=out, teacher=runs.stage1, start_steps=2, **(FEW | changes)))


def run_two_student(runs, out, **changes):
    return two_student.train(
        two_student.Options(out=out, teacher=runs.teacher, guidance=1.0, start_steps=2, **(FEW | changes))
    )


def run_sid(runs, out, **changes):
    return sid.train(sid.Options(out=out, teacher=runs.stage1, score_num=16, data=None, **(FEW | changes)))


CASES = {
    "teacher": (run_teacher, {"accumulate": 2, "ema": 0.9, "weight_decay": 0.1, "flip": True}, 1),
    "teacher, checkpointing": (run_teacher, {"gradient_checkpointing": True, "ema": 0.0, "clip_norm": 0.0}, 1),
    "teacher, bf16": (run_teacher, {"precision": "bf16", "anneal": "none"}, 1),
    "stage 1": (run_stage1, {}, 1),
    "stage 2": (run_stage2, {}, 2),
    "encoder": (run_encoder, {}, 1),
    "two students": (run_two_student, {}, 1),
    "sid": (run_sid, {"accumulate": 2}, 1),
}


def logged(out):
    """All that the logs say of the networks."""
    measured = ("time", "images_per_second", "memory_gb")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def assert_same(one, other):
    """The same bytes in all that both runs have left, but for what tells when and where."""
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert names and names == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert logged(one) == logged(other)


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_same(recorders, runs, case, tmp_path):
    run, changes, recordings = CASES[case]
    run(runs, tmp_path / "eager", graph="off", **changes)
    assert not recorders
    run(runs, tmp_path / "graph", graph="on", **changes)
    assert [len(recorder.tapes) for recorder in recorders] == [1] * recordings
    assert_same(tmp_path / "eager", tmp_path / "graph")


@pytest.mark.parametrize("case", ["teacher", "stage 2", "sid"])
@pytest.mark.parametrize("first", ["on", "off"])
def test_a_checkpoint_does_not_know_whether_updates_were_recorded(recorders, runs, case, first, tmp_path):
    run, changes, _ = CASES[case]
    run(runs, tmp_path / "whole", graph="off", **changes)
    real = iteration.Iteration.__call__

    def stopped(self):
        if self.updaters[-1].update_count == 4:
            raise KeyboardInterrupt
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration.Iteration, "__call__", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(runs, tmp_path / "parts", graph=first, **changes)
    run(runs, tmp_path / "parts", graph="off" if first == "on" else "on", resume=True, **changes)
    found, expected = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("model.safetensors")}
        for name in ("parts", "whole")
    )
    assert found == expected


# --- what a recording holds fixed, and what not ---


def learner(device="cpu", **changes) -> Updater:
    torch.manual_seed(0)
    with torch.device(device):
        model = Denoiser(DenoiserConfig(DROPPING))
    options = LoopOptions(**{"out": Path("unused"), "device": "cpu", "batch_size": 8, "graph": "on", **changes})
    return new_updater(options, model, regression.teacher)


class Drawn:
    """Batches of noise, of the sizes that are asked for."""

    def __init__(self, sizes=(8,) * 20, device="cpu"):
        self.sizes, self.position, self.device = iter(sizes), 0, device

    def __next__(self) -> Batch:
        size = next(self.sizes)
        ids = torch.arange(self.position, self.position + size)
        self.position += size
        x = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(self.position))
        x = x.contiguous(memory_format=torch.channels_last)
        return Batch(*(tensor.to(self.device) for tensor in (x, ids % 10, ids)), seed=1)


def weights(updater):
    return [p.detach().clone() for p in (*updater.denoiser.parameters(), *updater.averaged.parameters())]


def iterated(updaters, batches, count=6):
    step = Iteration(updaters, batches, updaters[-1].options)
    for _ in range(count):
        step()
    return [value for updater in updaters for value in weights(updater)]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("anneal", ["none", "linear"])
def test_learning_rate_average_and_count_are_read_anew(recorders, anneal):
    changes = {"anneal": anneal, "warmup": 4, "ema": 0.9, "updates": 8, "lr": 0.1}
    expected = iterated([learner(graph="off", **changes)], Drawn())
    updater = learner(**changes)
    assert_equal(iterated([updater], Drawn()), expected)
    row = updater.log()
    assert updater.update_count == 6 and row["lr"] == updater.learning_rate() and row["loss"] > 0


def test_the_first_bad_update_is_told_by_its_number(recorders):
    updater, batches = learner(), Drawn()
    step = Iteration([updater], batches, updater.options)
    for _ in range(4):
        step()
    with torch.no_grad():
        updater.parameters[0].fill_(torch.nan)
    step(), step()
    with pytest.raises(UserError, match="not finite at update 5"):
        updater.check_finite()


def test_a_log_between_replays_forgets_what_it_told(recorders):
    found, expected = [], []
    for rows, choice in ((expected, "off"), (found, "on")):
        updater = learner(graph=choice)
        step = Iteration([updater], Drawn(), updater.options)
        for _ in range(3):
            for _ in range(2):
                step()
            rows.append(updater.log())
    assert found == expected and len({row["loss"] for row in found}) == 3


def refusing(monkeypatch, at: int):
    """A recorder whose recordings fail from the at-th on."""
    record, count = Recorder.record, []

    def refuse(self, function):
        count.append(1)
        if len(count) >= at:
            record(self, function)  # a real one fails at its end, when all of Python has run
            raise graph.NotRecordable("no CUDA graph: this network asks for a value")
        return record(self, function)

    monkeypatch.setattr(Recorder, "record", refuse)


def test_what_cannot_be_recorded_goes_on_without(recorders, monkeypatch, capsys):
    expected = iterated([learner(graph="off", ema=0.9)], Drawn())
    refusing(monkeypatch, 1)
    updater = learner(graph="auto", ema=0.9)
    monkeypatch.setattr(graph, "wanted", lambda choice, device: choice != "off")
    assert_equal(iterated([updater], Drawn()), expected)
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "without CUDA graphs" in told and "this network asks for a value" in told
    with pytest.raises(UserError, match="no CUDA graph: this network asks for a value"):
        iterated([learner()], Drawn())


def test_a_batch_of_another_size_goes_on_without(recorders, monkeypatch, capsys):
    sizes = (8,) * (WARM_UP + 2) + (4, 8)
    expected = iterated([learner(graph="off")], Drawn(sizes))
    monkeypatch.setattr(graph, "wanted", lambda choice, device: choice != "off")
    assert_equal(iterated([learner(graph="auto")], Drawn(sizes)), expected)
    assert "batches differ in more than their values" in capsys.readouterr().err
    with pytest.raises(UserError, match="batches differ in more than their values"):
        iterated([learner()], Drawn(sizes))


def test_a_recording_goes_with_its_iteration(recorders):
    """Its memory is an update's: the next round needs it, and cannot wait until Python looks for cycles."""
    updater = learner()
    step = Iteration([updater], Drawn(), updater.options)
    for _ in range(WARM_UP + 2):
        step()
    last = weakref.ref(recorders[-1])
    recorders.clear()
    gc.disable()
    try:
        del step
        assert last() is None
    finally:
        gc.enable()


def test_gradients_never_leave_their_device():
    """Recorded on the meta device, where it shows; the optimizer's step is PyTorch's own, and made for it."""
    updater = learner(META, accumulate=2, dropout=0.0)
    batch = next(Drawn(device=META))
    with Tape() as tape, Numbers():
        assert all(gradient.is_meta for gradient in updater.gradients(batch))
    assert len(tape.operations) > 100


def test_batches_are_copied_by_a_stream_of_their_own(monkeypatch):
    """With CUDA's parts replaced by ones that say what was done, in what order."""
    done = []

    class Stream:
        def record_event(self):
            done.append("copied")
            return "event"

        def wait_event(self, event):
            done.append(f"waits for {event}")

    @contextlib.contextmanager
    def during(stream):
        done.append("copying")
        yield

    monkeypatch.setattr(torch.cuda, "stream", during)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: done.append("held"))
    options = LoopOptions(out=Path("unused"), batch_size=8, device="cpu")
    dataset, cpu = data.load("digits"), torch.device("cpu")
    plain, batches = (ImageBatches(dataset, options, 3, cpu) for _ in range(2))
    batches.stream = Stream()
    batches.restore(batches.state())
    first, second = next(batches), next(batches)
    copying = ["copying", "pinned", "pinned", "pinned", "copied"]
    assert done[:5] == copying and done.count("copied") >= 2
    using = [word for word in done if word not in copying]
    assert using == ["waits for event", "held", "held", "held"] * 2
    for found in (first, second):
        expected = next(plain)
        assert torch.equal(found.x, expected.x) and torch.equal(found.sample_ids, expected.sample_ids)


# --- who may ask for it ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"graph": "on"}, "--graph on needs a CUDA device; --device is cpu"),
        ({"graph": "on", "shard": True}, "--shard does not go together with --graph on"),
    ],
)
def test_a_recording_that_cannot_be_is_refused_before_all_else(changes, told, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match=told):
        teacher.train(teacher.Options(out=tmp_path / "run", device="cpu", **changes))
    assert not (tmp_path / "run").exists()


def test_networks_that_are_split_go_without_and_say_so(recorders, capsys, monkeypatch):
    monkeypatch.setattr(graph, "wanted", lambda choice, device: True)
    updater = learner(graph="auto")
    step = Iteration([updater], Drawn(), replace(updater.options, shard_teacher=True))
    assert not step.recorded and "not recorded" in capsys.readouterr().err


# --- several processes: two graphs a network, and gradients travel in between ---

TWO = """
import sys, pytest, torch
sys.path += {folders!r}
from recording import standing_in
import test_iteration as shared
from fastdiff import data, distributed, graph
from train.iteration import Iteration

distributed.start()
with pytest.MonkeyPatch.context() as patch, standing_in(patch) as made:
    class Part(shared.Drawn):
        def __next__(self):
            batch = super().__next__()
            return shared.Batch(*map(distributed.part, (batch.x, batch.label, batch.sample_ids)), batch.seed)

    def found(choice):
        updaters = [shared.learner(graph=choice, ema=0.9, dropout=0.0) for _ in range(2)]
        return shared.iterated(updaters, Part())

    expected = found("off")
    shared.assert_equal(found("on"), expected)
    assert [len(recorder.tapes) for recorder in made] == [4]
    patch.setattr(graph, "wanted", lambda choice, device: choice != "off")
    shared.refusing(patch, 2)  # the first step, after gradients that were recorded
    shared.assert_equal(found("auto"), expected)
distributed.stop()
"""


def test_gradients_travel_between_recordings(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(folders=[str(Path(__file__).parents[up]) for up in (0, 1)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


# --- on a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs, and PyTorch sees no GPU here")
@pytest.mark.parametrize("case", CASES)
def test_graphs_leave_the_same_weights(runs, case, tmp_path):
    run, changes, _ = CASES[case]
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        for choice in ("off", "on"):
            run(runs, tmp_path / choice, **(changes | {"graph": choice, "device": "cuda"}))
    assert_same(tmp_path / "off", tmp_path / "on")
