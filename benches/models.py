#!/usr/bin/env python3
"""Writes the models that the benchmarks run: published architectures at full size, with seeded random weights.

    python3 benches/models.py FOLDER [resnet50] [bert_base] [vit_b16]

Each becomes FOLDER/NAME.onnx, spelled as PyTorch's exporter spells it (opset 20): batch normalisation folded into
convolutions, attention as products around a softmax, GELU as an operator. The batch is symbolic. Needs `onnx` and
`numpy`.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


class Graph:
    """Collects nodes and weights; each method adds an operator and returns the name of its result."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.nodes, self.weights = [], []

    def add(self, op, *inputs, **attributes):
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array):
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, *shape, scale):
        return self.constant(self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def shape(self, *sizes):
        return self.constant(np.array(sizes, np.int64))

    def conv(self, x, inputs, outputs, kernel, stride=1, pad=None, gain=2.0):
        weight = self.normal(outputs, inputs, kernel, kernel, scale=(gain / (inputs * kernel * kernel)) ** 0.5)
        pad = kernel // 2 if pad is None else pad
        bias = self.normal(outputs, scale=0.1)
        return self.add("Conv", x, weight, bias, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def linear(self, x, inputs, outputs):
        product = self.add("MatMul", x, self.normal(inputs, outputs, scale=inputs**-0.5))
        return self.add("Add", product, self.normal(outputs, scale=0.02))

    def norm(self, x, width, epsilon):
        scale, bias = self.constant(np.ones(width, np.float32)), self.normal(width, scale=0.02)
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def attention(self, x, tokens, width, heads, mask=None):
        size = width // heads

        def split(permutation):
            y = self.add("Reshape", self.linear(x, width, width), self.shape(-1, tokens, heads, size))
            return self.add("Transpose", y, perm=permutation)

        scale = self.constant(np.float32(size**-0.25))
        q = self.add("Mul", split([0, 2, 1, 3]), scale)
        k = self.add("Mul", split([0, 2, 3, 1]), scale)
        v = split([0, 2, 1, 3])
        scores = self.add("MatMul", q, k)
        if mask is not None:
            scores = self.add("Add", scores, mask)
        y = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        y = self.add("Reshape", self.add("Transpose", y, perm=[0, 2, 1, 3]), self.shape(-1, tokens, width))
        return self.linear(y, width, width)

    def feed_forward(self, x, width, hidden):
        return self.linear(self.add("Gelu", self.linear(x, width, hidden)), hidden, width)

    def save(self, path, inputs, outputs):
        """`inputs` and `outputs`: name, element type and shape of each; an output is the last node of its name."""
        info = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
        graph = helper.make_graph(self.nodes, path.stem, *info, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, path)

    def name_output(self, value, name):
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))


def resnet50(path):
    g = Graph(50)
    x = g.add("Relu", g.conv("pixels", 3, 64, 7, stride=2))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inputs = 64
    for stage, blocks in enumerate([3, 4, 6, 3]):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            y = g.add("Relu", g.conv(x, inputs, width, 1))
            y = g.add("Relu", g.conv(y, width, width, 3, stride=stride))
            # A smaller gain keeps the sum with the shortcut from growing with depth.
            y = g.conv(y, width, 4 * width, 1, gain=0.5)
            shortcut = x if block else g.conv(x, inputs, 4 * width, 1, stride=stride, gain=1.0)
            x, inputs = g.add("Relu", g.add("Add", y, shortcut)), 4 * width
    x = g.add("Flatten", g.add("GlobalAveragePool", x), axis=1)
    weight, bias = g.normal(1000, inputs, scale=inputs**-0.5), g.normal(1000, scale=0.02)
    g.name_output(g.add("Gemm", x, weight, bias, transB=1), "logits")
    shape = ["batch", 3, 224, 224]
    g.save(path, [("pixels", TensorProto.FLOAT, shape)], [("logits", TensorProto.FLOAT, ["batch", 1000])])


def bert_base(path, tokens=128, width=768, heads=12, layers=12, hidden=3072, vocabulary=30522):
    g = Graph(768)
    words = g.add("Gather", g.normal(vocabulary, width, scale=0.02), "input_ids")
    kinds = g.add("Gather", g.normal(2, width, scale=0.02), "token_type_ids")
    x = g.add("Add", g.add("Add", words, kinds), g.normal(1, tokens, width, scale=0.02))
    x = g.norm(x, width, 1e-12)
    visible = g.add("Cast", g.add("Unsqueeze", "attention_mask", g.shape(1, 2)), to=TensorProto.BOOL)
    zero, hidden_score = g.constant(np.float32(0)), g.constant(np.float32(-1e9))
    mask = g.add("Where", visible, zero, hidden_score)
    for _ in range(layers):
        x = g.norm(g.add("Add", g.attention(x, tokens, width, heads, mask), x), width, 1e-12)
        x = g.norm(g.add("Add", g.feed_forward(x, width, hidden), x), width, 1e-12)
    g.name_output(x, "last_hidden_state")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = [(name, TensorProto.INT64, ["batch", tokens]) for name in names]
    g.save(path, inputs, [("last_hidden_state", TensorProto.FLOAT, ["batch", tokens, width])])


def vit_b16(path, width=768, heads=12, layers=12, hidden=3072):
    g = Graph(16)
    tokens = 14 * 14 + 1
    patches = g.conv("pixels", 3, width, 16, stride=16, pad=0, gain=1.0)
    x = g.add("Transpose", g.add("Reshape", patches, g.shape(-1, width, tokens - 1)), perm=[0, 2, 1])
    batch = g.add("Shape", "pixels", start=0, end=1)
    first = g.add("Expand", g.normal(1, 1, width, scale=0.02), g.add("Concat", batch, g.shape(1, width), axis=0))
    x = g.add("Add", g.add("Concat", first, x, axis=1), g.normal(1, tokens, width, scale=0.02))
    for _ in range(layers):
        x = g.add("Add", g.attention(g.norm(x, width, 1e-6), tokens, width, heads), x)
        x = g.add("Add", g.feed_forward(g.norm(x, width, 1e-6), width, hidden), x)
    x = g.add("Gather", g.norm(x, width, 1e-6), g.constant(np.int64(0)), axis=1)
    g.name_output(g.linear(x, width, 1000), "logits")
    shape = ["batch", 3, 224, 224]
    g.save(path, [("pixels", TensorProto.FLOAT, shape)], [("logits", TensorProto.FLOAT, ["batch", 1000])])


MODELS = {builder.__name__: builder for builder in (resnet50, bert_base, vit_b16)}


def main():
    if len(sys.argv) < 2 or any(name not in MODELS for name in sys.argv[2:]):
        sys.exit(f"{__doc__}\nmodels: {' '.join(MODELS)}")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or MODELS:
        MODELS[name](folder / f"{name}.onnx")
        print(f"wrote {folder / name}.onnx")


if __name__ == "__main__":
    main()
