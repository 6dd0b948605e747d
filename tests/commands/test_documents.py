"""What README and docs promise: links that resolve, commands and options that exist, the diagram as the code has it."""

import re
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from fastdiff.unet import UNetConfig
from train import begin, commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = {name: module for name, (module, _) in commands.COMMANDS.items()}
OPTIONS = {module: {field.name for field in fields(import_module(module).Options)} for module in MODULES.values()}
NETWORK = {f"unet.{field.name}" for field in fields(UNetConfig)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_pictures_resolve(document):
    text = document.read_text()
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in text.splitlines()}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert (document.parent / path).exists(), target
        assert path or anchor in headings, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document):
    for name in re.findall(
        r"(?<![\w/.])(?:tests|benchmarks|fastdiff|kernels|train)/[\w/]+\.(?:py|sh)\b", document.read_text()
    ):
        assert (ROOT / name).is_file(), name


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_the_diagram_is_the_one_that_the_code_draws():
    assert re.search(r"```text\n(.*?)\n```", README.read_text(), re.DOTALL)[1] == begin.diagram()


def commands_of(text: str):
    """(module, option names) of each command line of the project's own."""
    begins = r"python -m (?!pytest)[\w.]+|torchrun [^`\n]*?-m (?:-- )?[\w.]+|fastdiff \w+"
    for start, rest in re.findall(rf"({begins})([^`\n]*)", text.replace("\\\n", " ")):
        word = start.split()[-1]
        module = MODULES.get(word, word)
        if module in OPTIONS:
            yield module, re.findall(r"(?<=\s)--([a-z][\w.-]*)", rest.partition("#")[0])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_name_options_that_exist(document):
    for module, names in commands_of(document.read_text()):
        for name in (name.replace("-", "_").replace("unet.no_", "unet.") for name in names):
            known = OPTIONS[module] | (NETWORK if "unet" in OPTIONS[module] else set())
            assert name in known or name.removeprefix("no_") in known, (module, name)


def test_all_commands_are_found_in_the_documents():
    """So that the tests above look at something."""
    found = {module for document in DOCUMENTS for module, _ in commands_of(document.read_text())}
    assert found >= {*MODULES.values()} - {"train.demo"}


def test_modules_that_are_named_exist():
    for document in DOCUMENTS:
        for module in re.findall(
            r"python -m ((?:train|fastdiff|kernels|benchmarks)\.[a-z_.\d]+)", document.read_text()
        ):
            assert module in sys.modules or import_module(module), (document, module)
