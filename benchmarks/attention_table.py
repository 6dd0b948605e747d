"""Measure where our attention is faster than PyTorch's: `python -m benchmarks.attention_table --out attention.json`.

Rows {"gpu", "dtype", "head_width", "tokens", "inference", "training"}, the last two "triton" or "sdpa", with the times
that decided: of the forward pass, and of forward and backward together. `kernels/fused/attention.py` chooses by such a
table. Needs a GPU; `--tiny` tries it in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

import kernels
from benchmarks import eager, measuring

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the likeliest first, in case time runs out
WIDTHS = (64, 32, 128, 256)
TOKENS = (64, 256, 1024, 4096)
ROWS = 64 * 1024  # tokens in all, times heads of 256 channels: enough work for any GPU


def compare(device: str, dtype: torch.dtype, width: int, tokens: int, *, tiny: bool = False) -> dict[str, object]:
    """One row of the table."""
    heads, batch = (1, 1) if tiny else (256 // width, ROWS // tokens)
    qkv = torch.randn(batch, tokens, 3 * heads * width, device=device).to(dtype).requires_grad_()
    ways = {"triton": kernels.attention, "sdpa": eager.sdpa}
    times = {
        use: {name: measuring.times_us(partial(run, way, qkv, heads), device, 1)[1] for name, way in ways.items()}
        for use, run in {"inference": _forward, "training": _forward_backward}.items()
    }
    return {
        "gpu": measuring.gpu_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "head_width": width,
        "tokens": tokens,
        **{use: min(of_use, key=of_use.get) for use, of_use in times.items()},
        "p50_us": {use: {name: round(us, 1) for name, us in of_use.items()} for use, of_use in times.items()},
    }


@torch.no_grad()
def _forward(function, qkv, heads) -> None:
    function(qkv, heads)


def _forward_backward(function, qkv, heads) -> None:
    out = function(qkv, heads)
    torch.autograd.grad(out, qkv, out.detach())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.attention_table", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("attention.json"))
    parser.add_argument("--tiny", action="store_true", help="one small shape in Triton's interpreter")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("benchmarks.attention_table: needs a GPU to measure on; there is none here", file=sys.stderr)
        return 2
    shapes = [(torch.float32, 32, 64)] if options.tiny else [(d, w, n) for d in DTYPES for w in WIDTHS for n in TOKENS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for shape in shapes:
        with kernels.use("triton"):
            rows.append(row := compare(device, *shape, tiny=options.tiny))
        options.out.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n")
        shape = f"{row['dtype']} width {row['head_width']} tokens {row['tokens']}"
        print(f"{shape}: {row['inference']}, in training {row['training']}", row["p50_us"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
