"""The model card beside an export: what it is, of what it was made, and how it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fastdiff import cli, evaluate
from fastdiff.denoiser import DenoiserConfig
from fastdiff.errors import UserError
from fastdiff.exports.generator import Generator, takes_guidance
from fastdiff.metrics import Row
from fastdiff.run import Run

FILE = "README.md"
MARK = "Made by `fastdiff export`."
TEXT = """---
{front}library_name: {library}
pipeline_tag: unconditional-image-generation
tags:
- fastdiff
- diffusion
- distillation
---

# {name}

{kind}. {mark}

| | |
|---|---|
{rows}

## How to call it

```python
{calling}
```

## Scores

{scores}
"""
KINDS = {
    "teacher": "A diffusion model, sampled in few steps",
    "stage1": "A diffusion model that takes the strength of its guidance as an input (arXiv 2210.03142, stage 1)",
    "stage2": "A guided diffusion model distilled into few steps (arXiv 2210.03142)",
    "two_student": "A conditional and an unconditional diffusion model distilled into few steps (arXiv 2210.03142)",
    "sid": "A guided diffusion model distilled into one step, without data (arXiv 2404.04057)",
}


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an export."""
    with suppress(OSError, ValueError):
        return MARK in (folder / FILE).read_text()
    return False


def text(
    generator: Generator,
    checkpoint: Path,
    *,
    library: str,
    calling: list[str],
    compared: str,
    scores: str | None,
    licence: str | None,
) -> str:
    """The card as Markdown, with the front matter of model hubs.

    checkpoint: the folder that the weights are from. calling: lines of Python. compared: what was found against our own
    images. scores: a table.
    """
    config = generator.config
    rows = {
        "images": _images(config),
        "steps": f"{generator.steps} of {generator.sampling.sampler}, {generator.calls} network calls an image",
        "guidance w": _guidance(generator),
        **_origin(config, checkpoint),
        "compared": compared,
        "licence": licence or "not stated",
    }
    return TEXT.format(
        front=f"license: {licence}\n" if licence else "",
        library=library,
        name=_name(checkpoint),
        kind=KINDS[config.kind],
        mark=MARK,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        calling="\n".join(calling),
        scores=scores or "None were given.",
    )


def scores(path: Path, generator: Generator) -> str | None:
    """The table of what `fastdiff.evaluate` found with these steps and this sampler; None if it has none of them.

    Raises UserError for a file that it did not write.
    """
    try:
        found = json.loads(path.read_bytes())
        rows = [Row(**row) for row in found["rows"]]
        same = [row for row in rows if (row.steps, row.sampler) == (generator.steps, generator.sampling.sampler)]
        if generator.guidance is not None:
            same = [row for row in same if row.guidance == generator.guidance]
        return evaluate.table(same, found["reference"]) if same else None
    except OSError as error:
        raise UserError(f"--scores {path} cannot be read ({error.strerror}): name another file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--scores {path} is no results.json of fastdiff.evaluate: name one") from None


def _name(checkpoint: Path) -> str:
    return "/".join(checkpoint.resolve().parts[-2:])


def _images(config: DenoiserConfig) -> str:
    unet, names = config.unet, config.class_names
    size = "×".join(map(str, (unet.image_channels, *unet.image_size)))
    if not unet.num_classes:
        return f"{size}, without classes"
    listed = f" ({', '.join(names)})" if names and len(names) <= 20 else ""
    return f"{size}, {unet.num_classes} classes{listed}"


def _guidance(generator: Generator) -> str:
    if not takes_guidance(generator.config):
        return "none"
    trained = generator.config.guidance_range
    known = "any from 0" if trained is None else f"trained for {' to '.join(dict.fromkeys(map(cli.number, trained)))}"
    how = "an input" if generator.guidance is None else f"{cli.number(generator.guidance)}, for all images"
    return f"{how} ({known}; what others call the guidance scale is 1 + w)"


def _origin(config: DenoiserConfig, checkpoint: Path) -> Mapping[str, str]:
    weights = checkpoint / "model.safetensors"
    with open(weights, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    rows = {"checkpoint": f"{_name(checkpoint)}, a {config.kind} model, {weights.name} with SHA-256 `{sha256}`"}
    for folder in (checkpoint, checkpoint.parent):
        with suppress(UserError):
            if teacher := Run(folder).config()["options"].get("teacher"):
                rows["teacher"] = str(teacher)
    sources = [f"{one.file} ({one.format}), SHA-256 `{one.sha256}`" for one in config.sources]
    return rows | ({"teacher made from": "<br>".join(sources)} if sources else {})
