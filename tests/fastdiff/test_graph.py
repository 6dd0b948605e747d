"""`--graph`: the loop that is recorded leaves its device nowhere, and replays of it make the images that it makes.

Without a GPU, `recording.Recorder` stands in.
"""

import contextlib
import gc
import inspect
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from common import TINY, randomize
from recording import META, Numbers, Recorder, Tape, standing_in

import kernels
from fastdiff import evaluate, graph, sample, samplers, schedule
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.unet import UNetConfig


@pytest.fixture
def recorders(monkeypatch):
    with standing_in(monkeypatch) as made:
        yield made


SMALL = UNetConfig((8, 8), 3, 10, channels=16, channel_mult=(1, 2), blocks=1, attention_resolutions=(4,), head_width=16)
FORMS = [("v", schedule.CosineSchedule()), ("eps", schedule.LinearBetaSchedule()), ("edm", schedule.KarrasSchedule())]


def denoiser(form=FORMS[0], unet=SMALL, **config) -> Denoiser:
    parameterization, chosen = form
    return Denoiser(DenoiserConfig(unet, chosen, parameterization, **config)).eval()


def student(form=FORMS[0]) -> Denoiser:
    return denoiser(form, replace(SMALL, guidance_input=True), kind="stage2", guidance_range=(0.0, 4.0), steps=3)


def generator(form=FORMS[0]) -> Denoiser:
    return denoiser(form, kind="sid", sampler="one_step", steps=1, sigma_init=2.5)


# --- the loop on the meta device ---


@pytest.mark.parametrize(
    "move",
    [
        lambda x: torch.ones(3).to(META),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0, 2.0], device=META),
        lambda x: x.new_tensor(2.0),
        lambda x: x[[0, 1]],
        lambda x: torch.randn(3, device=META),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.sum().item(),
        lambda x: x.any() and x,
    ],
)
def test_what_cannot_be_recorded_is_refused(move):
    x = torch.zeros(3, device=META)
    with Tape(), Numbers(), pytest.raises((AssertionError, RuntimeError)):
        move(x)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_the_loop_never_leaves_its_device(recorders, sampler):
    pytest.importorskip("triton")
    with META:
        if sampler == "one_step":
            cases = [(generator(form), None) for form in FORMS] + [(Guided(generator()), torch.linspace(0, 4, 6))]
        else:
            cases = [(Guided(denoiser(FORMS[0])), torch.linspace(0, 4, 6)), (Guided(denoiser(FORMS[1])), None)]
            cases += [(student(FORMS[2]), 1.0), (denoiser(FORMS[1], replace(SMALL, num_classes=0)), None)]
    for model, guidance in cases:
        loop_on_meta(recorders, model, guidance, sampler, "triton")
    loop_on_meta(recorders, *cases[0], sampler, "reference")


def loop_on_meta(recorders, model, guidance, sampler, forced):
    seen, steps = [], 1 if sampler == "one_step" else 2
    with kernels.use(forced), launches(seen):
        how = Sampling(batch_size=4, guidance=guidance, steps=steps, sampler=sampler, graph="on")
        chunks = list(generate(model, 6, how))
    assert [chunk.shape for chunk in chunks] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert {chunk.device for chunk in chunks} == {META}
    assert len(recorders[-1].tapes) == 1 and recorders[-1].tapes[0].operations
    assert bool(seen) == (forced == "triton")  # whose own tensors the tape does not see
    assert {value.device for each in seen for value in each.arguments.values() if torch.is_tensor(value)} <= {META}


def launches(seen: list):
    from kernels.fused.launch import listen

    return listen(seen.append)


# --- replays on the CPU ---


def images(model, num, labels=None, noise_ids=None, **how):
    """All images, of batches of 4, and network calls an image."""
    before, labels = model.network_rows, num if labels is None else labels
    chunks = list(generate(model, labels, Sampling(batch_size=4, **how), noise_ids=noise_ids))
    assert [len(chunk) for chunk in chunks] == [min(4, num - at) for at in range(0, num, 4)]
    return torch.cat(chunks), (model.network_rows - before) / num


def randomized(model):
    randomize(getattr(model, "denoiser", model), scale=0.2)
    return model


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


BY_TURNS = torch.tensor([0.0] * 4 + [2.0] * 4 + [0.0, 1.0] * 2 + [0.0] * 2)  # none, some, some, none
CASES = {
    "teacher, guided by turns": ("ddim", lambda: Guided(denoiser()), BY_TURNS, 2),
    "student": ("stochastic", student, torch.linspace(0, 4, 14), 1),
    "one strength": ("ancestral", lambda: Guided(denoiser(FORMS[1])), 0.7, 1),
    "heun": ("heun", lambda: denoiser(FORMS[2]), None, 1),
    "unconditional": ("ddim", lambda: denoiser(unet=replace(SMALL, num_classes=0)), 0, 1),
    "one step": ("one_step", lambda: Guided(generator()), 1.0, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_make_the_same_images(recorders, case):
    sampler, make, guidance, recordings = CASES[case]
    model = randomized(make())
    how = {
        "labels": torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]) if model.num_classes else None,
        "noise_ids": torch.arange(14) ** 2 + 2**40,
        "guidance": guidance,
        "sampler": sampler,
        "steps": 1 if sampler == "one_step" else 3,
        "seed": 7,
        "clip": bool(model.num_classes),
    }
    expected, calls = images(model, 14, **how)
    found, counted = images(model, 14, **how, graph="on")
    assert torch.equal(found[:12], expected[:12])  # full batches
    assert difference(found[12:], expected[12:]) < 1e-5
    assert counted == calls and found.stride() == expected.stride()
    assert (expected[4:8] - expected[8:12]).abs().amax((1, 2, 3)).min() > 0.1  # or a stale input might go unnoticed
    assert len(recorders[-1].tapes) == recordings


def test_a_single_batch_is_not_recorded(recorders):
    model = randomized(denoiser())
    torch.testing.assert_close(images(model, 4, steps=2, graph="on"), images(model, 4, steps=2))
    assert not recorders[-1].tapes


def test_batches_that_do_not_fit(recorders):
    model = denoiser()
    captured = graph.Captured(lambda x: x.float(), model, torch.device("cpu"))
    assert captured(torch.arange(3)).tolist() == [0, 1, 2]
    for few in (torch.tensor([7]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(captured(few), few.float())
    with pytest.raises(ValueError, match="up to 3 rows"):
        captured(torch.arange(4))
    nobody = graph.Captured(lambda x: x.float(), model, torch.device("cpu"))  # a process without images
    assert nobody(torch.tensor([])).shape == (0,)


def test_a_graph_goes_with_the_last_who_holds_it(recorders):
    """Its memory is a batch's on the GPU: it must not wait until Python looks for cycles."""
    captured = graph.Captured(lambda x: x.float(), denoiser(), torch.device("cpu"))
    captured(torch.arange(3)), captured(torch.arange(3))
    last = weakref.ref(captured)
    gc.disable()
    try:
        del captured
        assert last() is None
    finally:
        gc.enable()


def cast_in(tape: Tape) -> set[int]:
    """The identities of the tensors that are cast together."""
    return {id(t) for func, args, *_ in tape.operations if "_foreach_copy_" in str(func) for t in args[1]}


def test_weights_are_read_anew_by_each_replay(recorders):
    """Under an autocast of the caller's too, which keeps the bfloat16 weights of all that runs within it."""
    model = randomized(denoiser())
    model.requires_grad_(True)
    how = {"steps": 2, "precision": "bf16"}
    with torch.autocast("cpu", torch.bfloat16):
        expected = images(model, 12, **how)[0]
        chunks = generate(model, 12, Sampling(batch_size=4, graph="on", **how))
        first, second = next(chunks), next(chunks)
        casts = cast_in(recorders[-1].tapes[0])
        cast = {name for name, weight in model.named_parameters() if id(weight) in casts}
        assert {"network.conv_in.weight", "network.conv_out.weight", "network.time_mlp.0.weight"} <= cast
        with Tape() as tape:  # what follows must not use casts whose memory is the recording's
            again = images(model, 4, **how)[0]
        assert casts & cast_in(tape)
        torch.testing.assert_close(torch.cat([first, second]), expected[:8])
        torch.testing.assert_close(again, expected[:4])
        with torch.no_grad():
            model.network.conv_out.bias += 0.5
        changed = next(chunks)
    assert (changed - expected[8:]).abs().mean() > 0.1


# --- who may ask for it ---


def test_a_graph_needs_cuda():
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        next(generate(denoiser(), 4, Sampling(steps=1, graph="on")))


@pytest.mark.parametrize("command", [sample, evaluate])
def test_the_commands_refuse_it_before_all_else(command, tmp_path):
    options = command.Options(checkpoint=tmp_path / "none", out=tmp_path / "new" / "out", graph="on", device="cpu")
    with pytest.raises(UserError, match="--graph on needs a CUDA device; --device is cpu"):
        command.main(options)
    assert not list(tmp_path.iterdir())


class Reached(Exception):
    pass


@pytest.mark.parametrize("on", ["auto", "off"])
@pytest.mark.parametrize("command", [sample, evaluate])
def test_the_commands_pass_it_on(command, on, tmp_path, monkeypatch):
    model = denoiser(unet=TINY)

    def reached(model, labels, sampling, **kwargs):
        raise Reached(sampling.graph)

    monkeypatch.setattr(command, "generate", reached)
    monkeypatch.setattr(sample.SamplingOptions, "load", lambda self: model)
    dataset, nothing = evaluate.data.load("digits", "train"), mock.MagicMock(accuracy=0.0)
    nothing.score.return_value = 0.0
    reference = evaluate.Reference(dataset, nothing, nothing, 0.0)
    monkeypatch.setattr(evaluate.Reference, "load", lambda *args, **kwargs: reference)
    with pytest.raises(Reached) as ended:
        command.main(command.Options(checkpoint=tmp_path, out=tmp_path / "new.png", graph=on, device="cpu"))
    assert ended.value.args == (on,)


# --- the recorder itself ---


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's parts replaced by ones that say what was done, in what order."""
    done = []

    class Stream:
        def __init__(self, device):
            self.device, self.name = device, "main" if device is None else "side"

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def during(name):
        done.append(f"{name} begins")
        yield
        done.append(f"{name} ends")

    def recording(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["pool"] == "pool" and given["stream"].name == "side" and given["cuda_graph"] is cuda_graph
        assert given["capture_error_mode"] == "thread_local"
        return during("recording")

    class CudaGraph:
        def replay(self):
            done.append("replay")

    class Generator:
        def __init__(self, device):
            self.numbers = f"new on {device}"

        def set_state(self, numbers):
            self.numbers = numbers

        def graphsafe_get_state(self):
            return self.numbers

        def graphsafe_set_state(self, state):
            done.append(f"generator has {state}")

    cuda_graph, signature = CudaGraph(), inspect.signature(torch.cuda.graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: done.append(str(of)) or Stream(None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: during(stream.name))
    monkeypatch.setattr(torch.cuda, "device", lambda of: during(str(of)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache is emptied"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda of: f"numbers of {of}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: cuda_graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "default_generators", [None, Generator("main")])
    return done


def test_the_recorder_orders_its_stream(cuda):
    recorder = graph.Recorder(torch.device("cuda", 1))
    assert recorder.run(lambda: cuda.append("work") or 5) == 5
    assert cuda == ["cuda:1", "side waits for main", "side begins", "work", "side ends", "main waits for side"]
    cuda.clear()
    replay, output = recorder.record(lambda: cuda.append("work") or 6)
    assert output == 6
    steps = ["cuda:1 begins", "cache is emptied", "recording begins", "work", "recording ends", "cuda:1 ends"]
    assert cuda == steps
    replay()
    assert cuda[-1] == "replay"


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (
            RuntimeError("operation not permitted\nwhen capturing"),
            "no CUDA graph: RuntimeError: operation not permitted",
        ),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), "no CUDA graph: the GPU's memory does not suffice for it"),
    ],
)
def test_a_failed_recording_says_what_failed_first(cuda, first, told):
    def work():
        try:
            raise first
        finally:
            raise RuntimeError("capture was invalidated")  # as CUDA's end of a recording does

    with pytest.raises(graph.NotRecordable) as ended:
        graph.Recorder(torch.device("cuda", 1)).record(work)
    assert str(ended.value) == told
    assert "generator has numbers of cuda:1" in cuda


@pytest.mark.parametrize("insists", [False, True])
def test_what_cannot_be_recorded_is_sampled_without(recorders, monkeypatch, capsys, insists):
    def refuse(self, function):
        raise graph.NotRecordable("no CUDA graph: it branches")

    monkeypatch.setattr(Recorder, "record", refuse)
    model = denoiser()
    how = Sampling(batch_size=4, steps=2, graph="on")
    if insists:
        with pytest.raises(UserError, match="no CUDA graph: it branches"):
            list(generate(model, 12, how))
        return
    captured = graph.Captured(lambda x: 2.0 * x, model, torch.device("cpu"), insists=False)
    assert [captured(torch.arange(3) + i).tolist() for i in range(3)] == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]
    assert captured(torch.arange(2)).tolist() == [0, 2]
    assert capsys.readouterr().err == "warning: sampling goes on without a graph: no CUDA graph: it branches\n"


# --- on a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs, and PyTorch sees no GPU here")
@pytest.mark.parametrize("case", CASES)
def test_graphs_make_the_same_images(case):
    sampler, make, guidance, _ = CASES[case]
    model = randomized(make()).cuda()
    how = {
        "labels": torch.arange(14).flip(0) % 10 if model.num_classes else None,
        "noise_ids": torch.arange(14) ** 2 + 2**40,
        "guidance": guidance,
        "sampler": sampler,
        "steps": 1 if sampler == "one_step" else 3,
        "seed": 7,
    }
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected, calls = images(model, 14, **how)
        found, counted = images(model, 14, **how, graph="on")
        assert difference(found, expected) < 1e-4 and counted == calls
    rough, _ = images(model, 14, **how, precision="bf16")
    found, _ = images(model, 14, **how, precision="bf16", graph="on")
    assert difference(found, rough) <= difference(expected, rough)  # bfloat16's own error
