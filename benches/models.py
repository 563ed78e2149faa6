#!/usr/bin/env python3
"""Writes the models that the benchmarks run: published architectures at full size, with seeded random weights.

    python3 benches/models.py FOLDER [resnet50] [bert_base] [vit_b16] [bilstm] [llama_block] [llama_decode] [--layers 2]
        [--dtype bf16]

Each becomes FOLDER/NAME.onnx. All but the last two are spelled as PyTorch's exporter spells them (opset 20, f32): batch
normalisation folded into convolutions, attention as products around a softmax, GELU as an operator; the batch is
symbolic. The last two are a Llama-3-8B-shaped decoder without embedding and vocabulary, in the composite operators of
opset 23: over a whole sequence, of symbolic length, and over one token after a cache of symbolic length. Weights of more
than 1 GiB lie beside a model, in FOLDER/NAME.weights. Needs `onnx` and `numpy`.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Beyond this, weights lie in a file of their own: a model file ends at 2 GiB.
INLINE_BYTES = 1 << 30
# Where each weight of that file begins, so that it can be mapped.
ALIGNMENT = 4096

DTYPES = {"f32": (np.float32, TensorProto.FLOAT), "bf16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16)}


class Graph:
    """Collects nodes and weights; each method adds an operator and returns the name of its result.

    Weights are `dtype`, and drawn in `f32` by threads while the graph is built: each has a seed of its own.
    """

    def __init__(self, seed, opset=20, dtype=np.float32):
        self.seed, self.opset, self.dtype = seed, opset, dtype
        self.nodes, self.weights = [], []
        self.threads = ThreadPoolExecutor()

    def add(self, op, *inputs, **attributes):
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, draw, *arguments):
        """A weight that `draw(*arguments)` returns, in a thread."""
        self.weights.append(self.threads.submit(draw, *arguments))
        return f"weight_{len(self.weights) - 1}"

    def constant(self, array):
        return self.weight(np.asarray, array)

    def normal(self, *shape, scale):
        return self.weight(normal, [self.seed, len(self.weights)], shape, scale, self.dtype)

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

    def rms_norm(self, x, width, epsilon):
        scale = self.constant(np.ones(width, self.dtype))
        return self.add("RMSNormalization", x, scale, axis=-1, epsilon=epsilon)

    def save(self, path, inputs, outputs):
        """`inputs` and `outputs`: name, element type and shape of each; an output is the last node of its name."""
        info = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
        weights = {f"weight_{index}": future.result() for index, future in enumerate(self.weights)}
        self.threads.shutdown()
        if sum(array.nbytes for array in weights.values()) > INLINE_BYTES:
            tensors = external(weights, path.with_suffix(".weights"))
        else:
            tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
        graph = helper.make_graph(self.nodes, path.stem, *info, tensors)
        ir_version = 9 if self.opset <= 20 else 11
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(path)

    def name_output(self, value, name):
        self.nodes.append(helper.make_node("Identity", [value], [name], name=name))


def normal(seed, shape, scale, dtype):
    """Seeded noise of that standard deviation."""
    array = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    array *= np.float32(scale)
    return array.astype(dtype, copy=False)


def external(weights, path):
    """Writes arrays by name to the file `path`, one after the other; tensors that say where each lies."""
    tensors = []
    with open(path, "wb") as file:
        for name, array in weights.items():
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", path.name), ("offset", file.tell()), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            file.write(array.tobytes())
    return tensors


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


def bilstm(path, tokens=128, width=512, layers=2):
    """Bidirectional layers over `[tokens, batch, width]`."""
    g = Graph(512)
    x, inputs = "tokens", width
    for _ in range(layers):
        bound = (1 / (3 * width)) ** 0.5
        weights = [g.normal(2, 4 * width, count, scale=bound) for count in (inputs, width)]
        bias = g.normal(2, 8 * width, scale=bound)
        y = g.add("LSTM", x, *weights, bias, hidden_size=width, direction="bidirectional")
        x = g.add("Reshape", g.add("Transpose", y, perm=[0, 2, 1, 3]), g.shape(tokens, -1, 2 * width))
        inputs = 2 * width
    g.name_output(x, "features")
    shape = [tokens, "batch", width]
    result = [tokens, "batch", 2 * width]
    g.save(path, [("tokens", TensorProto.FLOAT, shape)], [("features", TensorProto.FLOAT, result)])


def rotary_tables(positions, size, theta):
    """Cosines and sines of every position and pair of features, each `[positions, size / 2]`."""
    frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    angles = np.outer(np.arange(positions), frequencies)
    return np.cos(angles), np.sin(angles)


def llama_attention(g, x, tables, width, heads, kv_heads, cache=None):
    """Causal attention of grouped heads over `x`, `[batch, sequence, width]`; `tables`: cosines and sines.

    With a cache, the names of past keys and values and of those with the new ones, `x` is one token after all others.
    """
    size = width // heads

    def split(count):
        y = g.add("MatMul", x, g.normal(width, count * size, scale=width**-0.5))
        y = g.add("Reshape", y, g.shape(0, 0, count, size))
        return g.add("Transpose", y, perm=[0, 2, 1, 3])

    q = g.add("RotaryEmbedding", split(heads), *tables)
    k = g.add("RotaryEmbedding", split(kv_heads), *tables)
    if cache is None:
        y = g.add("Attention", q, k, split(kv_heads), is_causal=1)
    else:
        past, present = cache
        both = [g.add("Concat", old, new, axis=2) for old, new in zip(past, (k, split(kv_heads)), strict=True)]
        for value, name in zip(both, present, strict=True):
            g.name_output(value, name)
        y = g.add("Attention", q, *both)
    y = g.add("Reshape", g.add("Transpose", y, perm=[0, 2, 1, 3]), g.shape(0, 0, width))
    return g.add("MatMul", y, g.normal(width, width, scale=width**-0.5))


def llama_feed_forward(g, x, width, hidden):
    gate = g.add("MatMul", x, g.normal(width, hidden, scale=width**-0.5))
    up = g.add("MatMul", x, g.normal(width, hidden, scale=width**-0.5))
    y = g.add("Mul", g.add("Mul", gate, g.add("Sigmoid", gate)), up)
    return g.add("MatMul", y, g.normal(hidden, width, scale=hidden**-0.5))


def llama_block(path, **shape):
    """Decoder layers over hidden states at positions 0, 1, …"""
    llama(path, "sequence", has_cache=False, **shape)


def llama_decode(path, **shape):
    """The same over one token, with caches that the model makes longer by concatenation."""
    llama(path, 1, has_cache=True, **shape)


def llama(
    path,
    sequence,
    has_cache,
    layers=2,
    dtype="bf16",
    width=4096,
    hidden=14336,
    heads=32,
    kv_heads=8,
    positions=8192,
    theta=5e5,
):
    """There are at most `positions`."""
    array_type, element_type = DTYPES[dtype]
    g = Graph(3, opset=23, dtype=array_type)
    batch, count = (g.add("Shape", "hidden", start=axis, end=axis + 1) for axis in (0, 1))
    first = g.add("Shape", "past_key_0", start=2, end=3) if has_cache else g.shape(0)
    last = g.add("Add", first, count) if has_cache else count
    # Without position numbers, the operator wants `[batch, sequence, size / 2]`: constant once dimensions are bound.
    every = g.add("Concat", batch, count, g.shape(width // heads // 2), axis=0)
    tables = []
    for table in rotary_tables(positions, width // heads, theta):
        rows = g.add("Slice", g.constant(table.astype(array_type)), first, last, g.shape(0))
        tables.append(g.add("Expand", rows, every))
    shape = ["batch", sequence, width]
    inputs, outputs = [("hidden", element_type, shape)], [("result", element_type, shape)]
    x = "hidden"
    for layer in range(layers):
        cache = None
        if has_cache:
            cache = [[f"{when}_{kind}_{layer}" for kind in ("key", "value")] for when in ("past", "present")]
            for names, ports, length in zip(cache, (inputs, outputs), ("past", "total"), strict=True):
                ports += [(name, element_type, ["batch", kv_heads, length, width // heads]) for name in names]
        normed = g.rms_norm(x, width, 1e-5)
        x = g.add("Add", x, llama_attention(g, normed, tables, width, heads, kv_heads, cache))
        x = g.add("Add", x, llama_feed_forward(g, g.rms_norm(x, width, 1e-5), width, hidden))
    g.name_output(x, "result")
    g.save(path, inputs, outputs)


MODELS = {builder.__name__: builder for builder in (resnet50, bert_base, vit_b16, bilstm, llama_block, llama_decode)}
LAYERED = ("llama_block", "llama_decode")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all unless given")
    parser.add_argument("--layers", type=int, default=2, help="of llama_block and llama_decode")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of llama_block and llama_decode")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or MODELS:
        flags = {"layers": arguments.layers, "dtype": arguments.dtype} if name in LAYERED else {}
        MODELS[name](arguments.folder / f"{name}.onnx", **flags)
        print(f"wrote {arguments.folder / name}.onnx")


if __name__ == "__main__":
    main()
