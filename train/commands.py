"""The `fastdiff` command: each of its subcommands is a module's own command line."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "demo": ("train.demo", "the whole pipeline on the embedded data set"),
    "import": ("fastdiff.imports.command", "a teacher from diffusers, guided-diffusion or EDM"),
    "export": ("fastdiff.exports.command", "a generator as ONNX, torch.export or a diffusers pipeline"),
    "latents": ("fastdiff.latents", "the latents that a VAE of diffusers makes of a data set"),
    "teacher": ("train.teacher", "train a class-conditional teacher with label dropping"),
    "stage1": ("train.stage1", "distil guidance into one network that takes w"),
    "stage2": ("train.stage2", "halve the number of steps again and again"),
    "sid": ("train.sid", "a one-step generator from a teacher alone"),
    "encoder": ("train.encoder", "distil DDIM's way from image to noise"),
    "two_student": ("train.two_student", "the baseline that distils without guidance inside"),
    "sample": ("fastdiff.sample", "draw images from a checkpoint"),
    "translate": ("fastdiff.translate", "turn pictures of one class into another"),
    "compare": ("train.compare", "every method of the paper on one teacher, in tables and figures"),
    "evaluate": ("fastdiff.evaluate", "score a checkpoint: Fréchet distance, score, images per second"),
    "status": ("fastdiff.status", "where runs are, and the command that continues them"),
    "plot": ("fastdiff.plot", "the curves of runs in one picture"),
    "report": ("train.report.command", "one page of runs and comparisons, to play with"),
}


def main() -> None:
    """Entry point of `fastdiff COMMAND …`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: fastdiff COMMAND [OPTIONS]    (fastdiff COMMAND --help lists the options)\n")
        print("\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items()))
        sys.exit(0 if len(sys.argv) >= 2 else 2)
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        print(f"fastdiff: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
