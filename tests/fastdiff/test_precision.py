"""Which precision `--precision auto` comes to, that looking for it leaves no trace, and that runs stay with it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import TINY, randomize, stage2_options
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import checkpoint, cli, evaluate, figures, precision, sample, translate
from fastdiff.denoiser import Denoiser, DenoiserConfig, Guided
from fastdiff.errors import UserError
from fastdiff.generate import Sampling, generate
from fastdiff.losses import regression
from fastdiff.metrics import Row
from train import begin, compare, demo, encoder, loop, sid, stage1, stage2, teacher, two_student
from train.options import LoopOptions

CONFIG = DenoiserConfig(TINY)


class Clock:
    """Time that passes only in networks."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(precision.time, "perf_counter", lambda: self.now)


class Network(nn.Module):
    """Returns z; takes so many seconds in float32 and under autocast, where it makes an error.

    disturbed: which of seven calls take 100 times as long. calls: (autocast, rows) of each, of copies too.
    """

    def __init__(self, clock, seconds, error=0.0, disturbed=()):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.clock, self.seconds, self.error, self.disturbed, self.calls = clock, seconds, error, disturbed, []

    def __deepcopy__(self, memo):
        copied = Network(self.clock, self.seconds, self.error, self.disturbed)
        copied.calls = self.calls
        return copied

    def forward(self, z, time, label, guidance):
        halved = torch.is_autocast_enabled("cpu")
        self.clock.now += self.seconds[halved] * (100 if len(self.calls) % 7 in self.disturbed else 1)
        self.calls.append((halved, len(z)))
        return z * self.weight * (1 + self.error * halved)


def timed(monkeypatch, *facts, **others) -> Denoiser:
    return Denoiser(CONFIG, Network(Clock(monkeypatch), *facts, **others))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("bf16_seconds", "error", "expected"),
    [
        (0.5, 0.019, "bf16"),
        (0.95, 0.0, "bf16"),
        (0.96, 0.0, "fp32"),
        (1.0, 0.0, "fp32"),
        (2.0, 0.0, "fp32"),
        (0.5, 0.021, "fp32"),
        (0.5, float("nan"), "fp32"),
    ],
)
def test_bf16_must_be_faster_and_close(monkeypatch, capsys, bf16_seconds, error, expected, backward):
    model = timed(monkeypatch, (1.0, bf16_seconds), error)
    assert precision.choose("auto", model, batch_size=8, backward=backward) == expected
    said = capsys.readouterr().out
    assert said.startswith(f"precision {expected}: ") and said.count("\n") == 1
    assert f"{1 / bf16_seconds:.2f} times as fast" in said and f"relative error {error:.1e}" in said


def test_calls_alternate_and_disturbed_ones_do_not_count(monkeypatch):
    for disturbed in ((0,), (1, 4), (2, 3)):
        model = timed(monkeypatch, (0.01, 0.008), disturbed=disturbed)
        gain, _ = precision.compare(model, batch_size=1)
        assert gain == pytest.approx(1.25)
    calls = [halved for halved, _ in model.network.calls][3:]  # what is before looks for a new network and warms up
    assert len(calls) >= 2 * precision.TRIALS and calls == ([False, True, True, False] * len(calls))[: len(calls)]


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 50), (0.1, 9), (0.6, 9), (3.0, 2), (60.0, 1)])
def test_timing_lasts_long_enough_and_not_too_long(monkeypatch, seconds, expected):
    """1 second and 9 trials of each, but no more than 10 seconds."""
    model = timed(monkeypatch, (seconds, seconds))
    precision.compare(model, batch_size=1)
    trials = sum(halved for halved, _ in model.network.calls) - 1  # one to warm up
    assert trials == pytest.approx(expected, abs=1 if seconds < 0.1 else 0)


@pytest.mark.parametrize(("seconds", "expected"), [(precision.ENOUGH, 1), (0.4 * precision.ENOUGH, 24)])
def test_as_many_images_as_can_be_timed(monkeypatch, seconds, expected):
    model = timed(monkeypatch, (seconds, seconds))
    precision.compare(model, batch_size=24)
    assert {rows for _, rows in model.network.calls[-2 * precision.TRIALS :]} == {expected}
    assert max(rows for _, rows in model.network.calls) == expected


def trained() -> Denoiser:
    return randomize(Denoiser(CONFIG)).eval()


@pytest.mark.parametrize("limits", [None, (0.0, 4.0)])
def test_the_error_is_that_of_the_networks_output(monkeypatch, limits):
    monkeypatch.setattr(precision, "ENOUGH", float("inf"))  # or else fewer images are tried on a busy machine
    torch.manual_seed(0)
    unet = TINY if limits is None else replace(TINY, guidance_input=True)
    model = randomize(Denoiser(DenoiserConfig(unet, guidance_range=limits))).eval()
    outputs, seen = [], {}

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model.network

        def __deepcopy__(self, memo):
            return self

        def forward(self, z, time, label, guidance):
            outputs.append(self.network(z, time, label, guidance))
            seen.update(labels=label.tolist(), w=None if guidance is None else guidance.tolist())
            return outputs[-1]

    gain, error = precision.compare(Denoiser(model.config, Watched()), batch_size=4)
    expected = float((outputs[-1] - outputs[-2]).norm() / outputs[-2].norm())
    assert gain > 0 and error == pytest.approx(expected, rel=0.01) and 1e-4 < error < 0.1
    assert seen == {"labels": [0, 1, 2, 3], "w": None if limits is None else [4.0] * 4}


def test_a_new_network_is_judged_by_what_it_will_be():
    """Its output is zero, in bf16 too: that says nothing."""
    torch.manual_seed(0)
    model = Denoiser(CONFIG)
    zeros = [name for name, p in model.named_parameters() if not p.any()]
    assert any("conv_out" in name for name in zeros)
    for backward in (False, True):
        _, error = precision.compare(model, batch_size=4, backward=backward)
        assert 1e-4 < error < precision.LARGEST_ERROR
    assert zeros == [name for name, p in model.named_parameters() if not p.any()]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_no_trace_is_left(new, guided, backward):
    torch.manual_seed(0)
    unet = replace(TINY, dropout=0.5)
    denoiser = Denoiser(DenoiserConfig(unet))
    if not new:
        randomize(denoiser)
    denoiser.train()
    frozen = next(denoiser.parameters()).requires_grad_(False)
    weights = {name: p.clone() for name, p in denoiser.state_dict().items()}
    state = torch.get_rng_state()
    errors = {precision.compare(Guided(denoiser) if guided else denoiser, 4, backward=backward)[1] for _ in range(2)}
    assert len(errors) == 1  # no dropout, and one noise
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[name], p) for name, p in denoiser.state_dict().items())
    assert all(p.grad is None and p.requires_grad is (p is not frozen) for p in denoiser.parameters())
    assert all(module.training for module in denoiser.modules()) and denoiser.network_rows == 0
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_what_is_asked_for_needs_no_check(monkeypatch):
    monkeypatch.setattr(precision, "compare", None)
    assert [precision.choose(asked, trained(), batch_size=1) for asked in precision.CHOICES] == ["fp32", "bf16"]


@pytest.mark.parametrize("word", ["auto", "fp16", ""])
def test_networks_are_not_called_before_it_is_settled(word):
    with pytest.raises(ValueError, match=r"fp32 or bf16"):
        precision.autocast(word, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"fp32 or bf16"):
        next(generate(trained(), 1, Sampling(steps=1, precision=word)))


def row_of(sampling: Sampling) -> Row:
    """Scores that stand for nothing."""
    what = {"model": "m", "sampler": "ddim", "steps": 1, "nfe": 1.0, "images_per_second": 1.0, "num": 16, "seed": 0}
    return Row(guidance=sampling.guidance, fd=1.0, score=1.0, **what)


AGREE = """
import torch
from fastdiff import distributed, precision
distributed.start()
asked = []
answer = precision.agreed(lambda: asked.append(distributed.rank()) or "bf16")
assert answer == "bf16" and asked == ([0] if distributed.is_first() else []), (answer, asked)
assert precision.agreed(lambda: "fp32") == "fp32"
distributed.stop()
"""


def test_the_first_process_decides_for_all(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launch, tmp_path / "agree.py"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


# --- sampling, scoring, translating ---


@pytest.fixture
def found(monkeypatch):
    """What the check finds, one after the other; the models that it was asked about."""
    answers, asked = [], []

    def check(model, batch_size, *, backward=False):
        asked.append((model, batch_size, backward))
        return answers.pop(0)

    monkeypatch.setattr(precision, "check", check)
    monkeypatch.setattr(begin, "check", check)
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)
    check.answers, check.asked = answers, asked
    return check


@pytest.mark.parametrize("chosen", precision.CHOICES)
def test_samples_are_those_of_the_precision_chosen(runs, tmp_path, found, chosen):
    found.answers.append(chosen)
    for asked in ("auto", *precision.CHOICES):
        how = {"num": 12, "steps": 2, "guidance": (1.0,), "batch_size": 8, "device": "cpu", "precision": asked}
        sample.main(sample.Options(checkpoint=runs.stage1, out=tmp_path / asked, **how))
    pictures = {
        asked: [path.read_bytes() for path in sorted((tmp_path / asked).iterdir())]
        for asked in ("auto", *precision.CHOICES)
    }
    assert pictures["auto"] == pictures[chosen] and pictures["fp32"] != pictures["bf16"]
    assert len(pictures["auto"]) == 12
    ((_, batch_size, backward),) = found.asked
    assert (batch_size, backward) == (8, False)


def test_scores_are_all_of_the_one_precision_chosen(runs, tmp_path, found, monkeypatch):
    seen = []

    def scored(model, reference, sampling, **others):
        seen.append(sampling.precision)
        return row_of(sampling)

    monkeypatch.setattr(evaluate, "evaluate", scored)
    monkeypatch.setattr(evaluate, "table", lambda *arguments: "")
    monkeypatch.setattr(evaluate.Reference, "load", lambda *arguments, **others: SimpleNamespace(describe=dict))
    found.answers.append("bf16")
    how = {"num": 16, "guidance": (0.0, 1.0), "batch_size": 8, "device": "cpu", "precision": "auto"}
    evaluate.main(evaluate.Options(checkpoint=runs.stage1, out=tmp_path / "scores.json", **how))
    ((_, batch_size, backward),) = found.asked
    assert seen == ["bf16", "bf16"] and (batch_size, backward) == (8, False)


@pytest.mark.parametrize(
    ("answers", "expected"), [(["bf16", "bf16"], "bf16"), (["bf16", "fp32"], "fp32"), (["fp32"], "fp32")]
)
def test_translation_needs_it_for_both_models(runs, tmp_path, found, monkeypatch, answers, expected):
    figures.save_image(torch.zeros(1, 8, 8), tmp_path / "a.png")
    seen, real = set(), translate.Pair.translate

    def watched(*arguments, precision, **others):
        seen.add(precision)
        return real(*arguments, precision=precision, **others)

    monkeypatch.setattr(translate.Pair, "translate", watched)
    found.answers += answers
    models = {"encoder": runs.teacher, "decoder": runs.stage1, "encoder_steps": 1, "decoder_steps": 1}
    what = {"images": tmp_path / "a.png", "from_label": 3, "to_label": 8, "out": tmp_path / "out"}
    translate.main(translate.Options(**models, **what, device="cpu", precision="auto"))
    assert seen == {expected} and not found.answers


# --- training ---


def options(out: Path, **changes) -> teacher.Options:
    fields = {"unet": TINY, "updates": 6, "save_every": 3, "batch_size": 16, "device": "cpu", "precision": "auto"}
    return teacher.Options(out=out, **(fields | changes))


def recorded(out: Path) -> tuple[str, str]:
    """(what was asked for, what it came to)."""
    config = json.loads((out / "config.json").read_text())
    return config["options"]["precision"], config["precision"]


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("chosen", precision.CHOICES)
def test_a_resumed_run_goes_on_with_what_was_chosen(tmp_path, found, chosen, monkeypatch):
    """To the same weights as if it had not been stopped; and to those of the precision by name."""
    found.answers.append(chosen)
    real, calls = regression.teacher, []

    def stopped(*arguments, **others):
        calls.append(torch.is_autocast_enabled("cpu"))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(regression, "teacher", stopped)
        with pytest.raises(KeyboardInterrupt):
            teacher.train(options(tmp_path / "run"))
    assert recorded(tmp_path / "run") == ("auto", chosen) and set(calls) == {chosen == "bf16"}
    resumed = teacher.train(options(tmp_path / "run", resume=True))
    assert recorded(tmp_path / "run") == ("auto", chosen)
    ((_, batch_size, backward),) = found.asked
    assert (batch_size, backward) == (16, True)
    by_name = {name: teacher.train(options(tmp_path / name, precision=name)) for name in precision.CHOICES}
    assert_same_weights(resumed, by_name[chosen])
    with pytest.raises(AssertionError):
        assert_same_weights(by_name["fp32"], by_name["bf16"])


def test_a_check_for_real(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "preview", lambda *args, **kwargs: None)
    model = teacher.train(options(tmp_path / "run"))
    asked, chosen = recorded(tmp_path / "run")
    assert asked == "auto" and f"precision {chosen}: here bf16 is" in capsys.readouterr().out
    assert_same_weights(model, teacher.train(options(tmp_path / "by name", precision=chosen)))


def test_auto_keeps_what_a_run_was_begun_with(tmp_path, found):
    teacher.train(options(tmp_path / "run", precision="bf16"))
    teacher.train(options(tmp_path / "run", updates=9, resume=True))
    assert recorded(tmp_path / "run") == ("auto", "bf16") and not found.asked


def test_runs_of_earlier_versions_keep_theirs(tmp_path, found):
    teacher.train(options(tmp_path / "run", precision="bf16"))
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["precision"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    teacher.train(options(tmp_path / "run", updates=9, resume=True))
    assert recorded(tmp_path / "run") == ("auto", "bf16") and not found.asked


def test_on_another_device_it_is_chosen_anew(tmp_path, found):
    teacher.train(options(tmp_path / "run", precision="bf16"))
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    config["options"]["device"] = "cuda"
    path.write_text(json.dumps(config))
    found.answers.append("fp32")
    teacher.train(options(tmp_path / "run", updates=9, resume=True))
    assert recorded(tmp_path / "run") == ("auto", "fp32")


def test_nothing_is_chosen_for_a_dry_run(tmp_path, found):
    teacher.train(options(tmp_path / "run", dry_run=True))
    assert not found.asked and not (tmp_path / "run").exists()


def test_all_rounds_have_one(runs, tmp_path, found):
    found.answers.append("bf16")
    student = stage2.train(stage2_options(runs.stage1, tmp_path / "auto", precision="auto"))
    assert recorded(tmp_path / "auto") == ("auto", "bf16")
    assert_same_weights(student, stage2.train(stage2_options(runs.stage1, tmp_path / "bf16", precision="bf16")))
    shutil.rmtree(tmp_path / "auto" / "steps-1")
    stage2.train(stage2_options(runs.stage1, tmp_path / "auto", precision="auto", resume=True))
    assert len(found.asked) == 1
    again, first = (checkpoint.load(tmp_path / name / "steps-1") for name in ("auto", "bf16"))
    assert_same_weights(again, first)


def test_sid_learns_and_is_scored_with_it(runs, tmp_path, found, monkeypatch):
    seen = []

    def scored(model, reference, sampling, **others):
        seen.append(sampling.precision)
        return row_of(sampling)

    monkeypatch.setattr(sid, "evaluate", scored)
    monkeypatch.setattr(sid.Reference, "load", lambda *arguments, **others: object())
    fields = {"teacher": runs.stage1, "updates": 2, "batch_size": 16, "score_num": 16, "device": "cpu"}
    fields["data"] = "digits"
    found.answers.append("bf16")
    generators = [
        sid.train(sid.Options(out=tmp_path / name, precision=name, **fields)) for name in ("auto", "bf16", "fp32")
    ]
    assert recorded(tmp_path / "auto") == ("auto", "bf16") and len(found.asked) == 1
    assert_same_weights(*generators[:2])
    third = len(seen) // 3
    assert third and seen == ["bf16"] * 2 * third + ["fp32"] * third


def test_compare_has_one_for_all_and_keeps_it(tmp_path, found):
    found.answers.append("bf16")
    given = compare.Options(out=tmp_path, precision="auto", device="cpu")
    state = torch.get_rng_state()
    assert compare.settled(given).precision == "bf16" and torch.equal(state, torch.get_rng_state())
    teacher.train(options(tmp_path / "teacher", precision="bf16"))
    assert compare.settled(given).precision == "bf16" and len(found.asked) == 1
    assert compare.settled(compare.Options(out=tmp_path, precision="fp32", device="cpu")).precision == "fp32"
    (tmp_path / "teacher/config.json").write_text("[]")
    with pytest.raises(UserError, match=r"not of a run of fastdiff"):
        compare.settled(given)


@pytest.mark.parametrize(
    "module", [sample, evaluate, translate, compare, demo, teacher, stage1, stage2, sid, encoder, two_student]
)
def test_other_words_are_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--precision", "fp8"])
    with pytest.raises(SystemExit) as exit_:
        cli.run(getattr(module, "main", None) or module.train, module.Options)
    assert exit_.value.code == 2
    error = "".join(capsys.readouterr())
    assert "fp8" in error and all(word in error for word in ("fp32", "bf16", "auto"))


@pytest.mark.parametrize("recipe", [teacher, stage1, stage2, sid, encoder, two_student])
def test_presets_with_a_precision_can_be_parsed(recipe, monkeypatch):
    """Their types' names are looked up where the options were written, not where the recipe is."""
    arguments = ["command", "--preset", "cifar10", "--out", "out"]
    monkeypatch.setattr(sys, "argv", arguments if recipe is teacher else [*arguments, "--teacher", "teacher"])
    given = []
    cli.run(given.append, recipe.Options, recipe.PRESETS)
    assert given[0].precision == "bf16"
    assert isinstance(given[0], LoopOptions)


# --- the benchmark ---


def test_the_benchmark_beside_diffusers(capsys):
    """The peer of the preset has as many weights and gives the same outputs, and no product is left out."""
    pytest.importorskip("diffusers")
    from benchmarks import bench_unet_peer

    bench_unet_peer.main(["--tiny", "--rounds", "1", "--batch-size", "2"])
    said = capsys.readouterr().out
    assert "ours, bf16" in said and "(aim 3)" in said
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # whose work is counted
        networks, parts, operations = bench_unet_peer.contenders(bench_unet_peer.TINY, 2)
        with FlopCounterMode(display=False) as whole:
            networks["ours, fp32"]()
        with FlopCounterMode(display=False) as alone:
            parts["convolutions, fp32"]()
            parts["matrix products, fp32"]()
    counted = operations["convolutions"] + operations["matrix products"]
    assert counted == whole.get_total_flops() == alone.get_total_flops()
