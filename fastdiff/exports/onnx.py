"""ONNX: model.onnx, the steps unrolled into one graph that holds each weight once.

One step is translated by PyTorch, with its numbers as an input, and its nodes are repeated: a graph of 64 steps takes
no longer to translate than one of a single step.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.exports import compare, pt2
from fastdiff.exports.compare import Run
from fastdiff.exports.generator import Generator

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

LIBRARY, RUNTIME, NEEDS = "onnx", "onnxruntime", ("onnx", "onnxscript")
FILE = "model.onnx"
LARGEST = 2**31 - 2**24  # bytes of weights in one file, which cannot be longer than 2 GiB; then they get their own


def write(generator: Generator, folder: Path) -> None:
    """model.onnx, and model.onnx.data where weights are larger than one file can be."""
    import onnx

    model = unrolled(_step(generator), generator)
    weights = sum(parameter.nbytes for parameter in generator.parameters())
    apart = {"save_as_external_data": True, "location": f"{FILE}.data"} if weights > LARGEST else {}
    onnx.save_model(model, folder / FILE, **apart)
    onnx.checker.check_model(folder / FILE)


def read(generator: Generator, folder: Path) -> Run | None:
    """In onnxruntime, on the CPU; None where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def run(**given: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])

    return run


def calling(generator: Generator) -> list[str]:
    normal = "random.standard_normal({shape}, dtype=np.float32)"
    example = generator.example(normal, "np.arange(8) % {classes}", "np.full(8, {w}, dtype=np.float32)")
    return [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{FILE}")',
        "random = np.random.default_rng(0)",
        "given = {",
        *(f'    "{name}": {value},' for name, value in example.items()),
        "}",
        f"images = session.run(None, given)[0]  # {generator.made}",
    ]


def _step(generator: Generator) -> ModelProto:
    """One step in ONNX: (z, numbers, label, guidance) -> next."""
    given = compare.inputs(generator, 2)
    given = {"z": given["noise"], "numbers": generator.numbers[0]} | {
        name: given[name] for name in ("label", "guidance") if name in given
    }
    program = pt2.traced(generator.step, given)
    names = {"input_names": list(given), "output_names": ["next"]}
    return torch.onnx.export(program, dynamo=True, verbose=False, external_data=False, **names).model_proto


def unrolled(step: ModelProto, generator: Generator) -> ModelProto:
    """The generator, from one step: all its nodes for every step, and between them the noise."""
    from onnx import helper

    graph = _Graph(step.graph)
    z = "noise" if generator.start == 1 else graph.add("Mul", "noise", graph.number(np.float32(generator.start)))
    for index, (numbers, std) in enumerate(zip(generator.numbers, generator.stds, strict=True)):
        z = graph.step(f"step_{index}", {"z": z, "numbers": graph.number(numbers.numpy())})
        if std:
            noise = graph.add("Gather", "noises", graph.number(np.int64(index)), axis=1)
            z = graph.add("Add", z, graph.add("Mul", noise, graph.number(np.float32(std))))
    if generator.uint8:
        one, half, low, high = (graph.number(np.float32(value)) for value in (1, 127.5, 0, 255))
        levels = graph.add("Clip", graph.add("Mul", graph.add("Add", z, one), half), low, high)
        z = graph.add("Cast", graph.add("Round", levels), to=_type(torch.uint8))
    graph.nodes.append(helper.make_node("Identity", [z], ["images"]))
    image = ("batch", *generator.image_shape)
    shapes = {
        "noise": (torch.float32, image),
        "label": (torch.int64, ("batch",)),
        "guidance": (torch.float32, ("batch",)),
        "noises": (torch.float32, (image[0], generator.steps - 1, *image[1:])),
        "images": (torch.uint8 if generator.uint8 else torch.float32, image),
    }

    def described(name: str):
        dtype, shape = shapes[name]
        return helper.make_tensor_value_info(name, _type(dtype), shape)

    made = helper.make_graph(
        graph.nodes,
        "generator",
        [described(name) for name in generator.inputs],
        [described("images")],
        [*step.graph.initializer, *graph.numbers],
    )
    opsets = {"opset_imports": step.opset_import, "functions": step.functions, "ir_version": step.ir_version}
    return helper.make_model(made, producer_name="fastdiff", **opsets)


class _Graph:
    """A graph that grows node by node. step: the graph of a step, with an input z and an output."""

    def __init__(self, step: GraphProto):
        self.nodes, self.numbers = [], []
        self._step, self._shared = step, {weight.name for weight in step.initializer} | {"label", "guidance", ""}

    def add(self, kind: str, *given: str, **attributes: object) -> str:
        """A node of one output, whose name is returned."""
        from onnx import helper

        made = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, given, [made], **attributes))
        return made

    def number(self, value: np.ndarray | np.generic) -> str:
        from onnx import numpy_helper

        name = f"number_{len(self.numbers)}"
        self.numbers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def step(self, name: str, bound: dict[str, str]) -> str:
        """A copy of the step's nodes, with its inputs bound to values of this graph."""
        from onnx import NodeProto

        def here(value: str) -> str:
            return bound.get(value, value if value in self._shared else f"{name}/{value}")

        for node in self._step.node:
            node_here = NodeProto()
            node_here.CopyFrom(node)
            node_here.name = f"{name}/{node.name}"
            node_here.input[:], node_here.output[:] = map(here, node.input), map(here, node.output)
            self.nodes.append(node_here)
        return here(self._step.output[0].name)


def _type(dtype: torch.dtype) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=dtype).numpy().dtype)
