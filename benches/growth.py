#!/usr/bin/env python3
"""Compiles models of very many nodes, and says how time and memory grow with their number.

    python3 benches/growth.py                                  # all shapes, 25,000 to 100,000 nodes
    python3 benches/growth.py equal chain --counts 50000,100000 --target h200x4

Needs nothing but `target/release` (or --binaries). Times are user and system seconds of the process, memory its peak.
A row ends with the exponent between the last two counts: 1 is linear, 2 quadratic.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "fixtures"))

from messages import FLOAT, INT64, chunk, tensor_proto, varint  # noqa: E402

GRAPH, INT = 5, 2  # numbers of AttributeProto.AttributeType


def node(operator, inputs, outputs, **attributes):
    """NodeProto: input = 1, output = 2, name = 3, op_type = 4, attribute = 5."""
    fields = [chunk(1, name.encode()) for name in inputs] + [chunk(2, name.encode()) for name in outputs]
    fields += [chunk(3, f"{operator}/{outputs[0]}".encode()), chunk(4, operator.encode())]
    fields += [chunk(5, attribute(name, value)) for name, value in attributes.items()]
    return chunk(1, b"".join(fields))


def attribute(name, value):
    """AttributeProto: name = 1, i = 3, g = 6, type = 20."""
    body = varint(3 << 3) + varint(value) if isinstance(value, int) else chunk(6, value)
    kind = INT if isinstance(value, int) else GRAPH
    return chunk(1, name.encode()) + body + varint(20 << 3) + varint(kind)


def port(field, name, *shape):
    dims = b"".join(chunk(1, varint(1 << 3) + varint(size)) for size in shape)
    tensor = varint(1 << 3) + varint(FLOAT) + chunk(2, dims)
    return chunk(field, chunk(1, name.encode()) + chunk(2, chunk(1, tensor)))


def source(name, *shape):
    return port(11, name, *shape)


def result(name, *shape):
    return port(12, name, *shape)


def weight(name, shape, values):
    return chunk(5, tensor_proto(name, FLOAT, shape, values))


def vector(name, values):
    return chunk(5, tensor_proto(name, INT64, (len(values),), values))


def model(fields):
    """ModelProto: ir_version = 1, graph = 7, opset_import = 8 (version = 2)."""
    graph = b"".join(fields) + chunk(2, b"main")
    return varint(1 << 3) + varint(8) + chunk(8, varint(2 << 3) + varint(18)) + chunk(7, graph)


def links(operators, count):
    """A chain from `x`: a node of each operator in turn."""
    name = lambda link: f"v{link}" if link else "x"
    return [node(operators[i % len(operators)], [name(i)], [name(i + 1)]) for i in range(count)], name(count)


def equal(n):
    """Equal nodes, all of them outputs."""
    return [source("x", 4)] + [node("Exp", ["x"], [f"y{i}"]) + result(f"y{i}", 4) for i in range(n)]


def chain(n):
    """Element-wise nodes in a chain."""
    nodes, last = links(["Exp", "Neg"], n)
    return [source("x", 4), result(last, 4)] + nodes


def rows(n):
    """Nodes that no pass merges, in a chain."""
    nodes, last = links(["Softmax", "Exp"], n)
    return [source("x", 4), result(last, 4)] + nodes


def products(n):
    """Products in a chain, each with a weight of its own."""
    nodes = [node("MatMul", [f"v{i - 1}" if i else "x", f"w{i}"], [f"v{i}"]) for i in range(n)]
    weights = [weight(f"w{i}", (2, 2), [float(i), 1.0, 1.0, 0.0]) for i in range(n)]
    return [source("x", 2, 2), result(f"v{n - 1}", 2, 2)] + nodes + weights


def reshapes(n):
    """Reshapes in a chain, each of them an output."""
    shapes = [(16,), (2, 8), (4, 4), (8, 2)]
    nodes = [node("Reshape", [f"v{i - 1}" if i else "x", f"s{i % 4}"], [f"v{i}"]) + result(f"v{i}", *shapes[i % 4]) for i in range(n)]
    return [source("x", 16)] + nodes + [vector(f"s{i}", list(shape)) for i, shape in enumerate(shapes)]


def concat(n):
    """One node with so many operands."""
    return [source(f"x{i}", 1) for i in range(n)] + [node("Concat", [f"x{i}" for i in range(n)], ["y"], axis=0), result("y", n)]


def concats(n):
    """A tensor that grows by one element with each node."""
    nodes = [node("Concat", [f"v{i - 1}" if i else "x", f"x{i}"], [f"v{i}"], axis=0) for i in range(n)]
    return [source("x", 1)] + [source(f"x{i}", 1) for i in range(n)] + nodes + [result(f"v{n - 1}", n + 1)]


def wide_sum(n):
    return [source(f"x{i}", 1) for i in range(n)] + [node("Sum", [f"x{i}" for i in range(n)], ["y"]), result("y", 1)]


def split(n):
    parts = [f"y{i}" for i in range(n)]
    return [source("x", n), node("Split", ["x"], parts, axis=0, num_outputs=n)] + [result(part, 1) for part in parts]


def gathers(n):
    """Rows of a constant table, added one after the other."""
    nodes = []
    for i in range(n // 2):
        nodes += [node("Gather", ["t", f"i{i % 100}"], [f"g{i}"]), node("Add", [f"v{i - 1}" if i else "x", f"g{i}"], [f"v{i}"])]
    table = weight("t", (100, 4), [float(i) for i in range(400)])
    return [source("x", 1, 4), result(f"v{n // 2 - 1}", 1, 4), table] + nodes + [vector(f"i{i}", [i]) for i in range(100)]


def shapes(n):
    """Arithmetic on a shape."""
    nodes = [node("Shape", ["x"], ["v0"])] + [node(["Add", "Sub"][i % 2], [f"v{i}", "one"], [f"v{i + 1}"]) for i in range(n)]
    return [source("x", 4, 4), vector("one", [1, 1]), node("Expand", ["x", f"v{n // 2 * 2}"], ["y"]), result("y", 4, 4)] + nodes


def ports(n):
    """So many inputs, outputs and weights."""
    nodes = [node("Add", [f"x{i}", f"w{i}"], [f"y{i}"]) for i in range(n)]
    weights = [weight(f"w{i}", (2,), [float(i), 1.0]) for i in range(n)]
    return nodes + weights + [source(f"x{i}", 2) + result(f"y{i}", 2) for i in range(n)]


def passed(n):
    """Inputs that are outputs."""
    return [source(f"x{i}", 2) + node("Identity", [f"x{i}"], [f"y{i}"]) + result(f"y{i}", 2) for i in range(n)]


def branches(n):
    """Nodes with bodies, one after the other."""
    nodes = []
    for i in range(n // 3):
        read = f"v{i - 1}" if i else "x"
        body = lambda operator, name: node(operator, [read], [name]) + chunk(2, b"body") + result(name, 4)
        nodes.append(node("If", ["c"], [f"v{i}"], then_branch=body("Exp", f"t{i}"), else_branch=body("Neg", f"e{i}")))
    true = chunk(5, varint(2 << 3) + varint(9) + chunk(8, b"c") + chunk(9, b"\x01"))
    return [source("x", 4), result(f"v{n // 3 - 1}", 4), true] + nodes


def alive(n):
    """Values that all live until the end."""
    nodes, last = links(["Softmax"], n // 3)
    for i in reversed(range(n // 3)):
        nodes += [node("Add", [last, f"v{i}" if i else "x"], [f"a{i}"]), node("Softmax", [f"a{i}"], [f"b{i}"])]
        last = f"b{i}"
    return [source("x", 4), result(last, 4)] + nodes


SHAPES = [equal, chain, rows, products, reshapes, concat, concats, wide_sum, split, gathers, shapes, ports, passed, branches, alive]


def measured(command):
    """Seconds of processor time, and MiB at the peak; what it said instead where it failed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.stdout.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        return None, f"exit {os.waitstatus_to_exitcode(status)}: {' '.join(said.split())[:90]}"
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(shape.__name__ for shape in SHAPES))
    parser.add_argument("--counts", default="25000,50000,100000")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--plan", default="", metavar="COMMAND", help="measure `plan COMMAND` on the plan instead: verify, run, inspect, diff")
    parser.add_argument("--binaries", default=ROOT / "target/release", type=pathlib.Path)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    for shape in [shape for shape in SHAPES if not arguments.shapes or shape.__name__ in arguments.shapes]:
        cells, times = [], []
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                path, plan = pathlib.Path(folder) / "x.onnx", pathlib.Path(folder) / "x.plan"
                path.write_bytes(model(shape(count)))
                took, peak = measured([arguments.binaries / "compile", path, "-o", plan, "--target", arguments.target])
                if took is not None and arguments.plan:
                    plans = [plan] * (2 if arguments.plan == "diff" else 1)
                    took, peak = measured([arguments.binaries / "plan", arguments.plan, *plans])
            if took is None:
                cells.append(peak)
                break
            cells.append(f"{took:.2f} s {peak:.0f} MiB")
            times.append(took)
        growth = f"{math.log(times[-1] / times[-2]) / math.log(counts[len(times) - 1] / counts[len(times) - 2]):.2f}" if len(times) > 1 else ""
        print(f"| {shape.__name__} | {' | '.join(cells)} | {growth} |", flush=True)


if __name__ == "__main__":
    main()
