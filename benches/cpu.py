#!/usr/bin/env python3
"""Times models on the CPU, one virtual device, beside ONNX Runtime with as many threads, and prints ratios.

    python3 benches/cpu.py [--threads 1 2] [--runs 20] [--rounds 3] [--models FOLDER] [NAME ...]

Each model runs in both programs by turns, round after round, so that what else the machine does falls on both; of
each, the median of the rounds' medians counts. Outputs are compared first, on the same random inputs. Needs `onnx`,
`onnxruntime`, `numpy` and the release build. ResNet-50 and BERT-base are written by `benches/models.py`, PP-OCR's detector comes from
`fixtures/fetch.py`.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnxruntime

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARIES = ROOT / "target" / "release"

# Name, sizes of the inputs; PP-OCR's detector at a usual size of a page.
MODELS = {
    "ppocr_det": {"x": [1, 3, 640, 640]},
    "bert_base": {"input_ids": [1, 128], "attention_mask": [1, 128], "token_type_ids": [1, 128]},
    "resnet50": {"pixels": [1, 3, 224, 224]},
}


def model_path(name, folder):
    if name == "ppocr_det":
        path = ROOT / "fixtures" / "fetched" / name / "model.onnx"
        if not path.exists():
            subprocess.run([sys.executable, ROOT / "fixtures" / "fetch.py"], check=True)
        return path
    path = folder / f"{name}.onnx"
    if not path.exists():
        subprocess.run([sys.executable, ROOT / "benches" / "models.py", folder, name], check=True)
    return path


def random_inputs(session, sizes):
    random = np.random.default_rng(0)
    inputs = {}
    for each in session.get_inputs():
        shape = sizes[each.name]
        if each.type == "tensor(float)":
            inputs[each.name] = random.standard_normal(shape, dtype=np.float32)
        elif "mask" in each.name:
            inputs[each.name] = np.ones(shape, np.int64)
        else:
            inputs[each.name] = random.integers(0, 2, shape, np.int64)
    return inputs


def session(path, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def peer_times(path, threads, inputs, runs):
    """In a session of its own each round, so that none of its threads is left when ours run."""
    peer = session(path, threads)
    for _ in range(3):
        peer.run(None, inputs)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        peer.run(None, inputs)
        times.append(time.perf_counter() - start)
    return times


def our_median(plan, npz, threads, runs):
    command = [BINARIES / "plan", "bench", plan, "--inputs", npz, "--threads", threads, "--runs", runs, "--json"]
    output = subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout
    return json.loads(output)["median_seconds"]


def compare(peer, inputs, plan, npz, folder):
    """The largest difference of any output, as share of the largest value."""
    outputs = folder / "out.npz"
    command = [BINARIES / "plan", "run", plan, "--inputs", npz, "--outputs", outputs]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    ours = np.load(outputs)
    names = [each.name for each in peer.get_outputs()]
    pairs = [(ours[name], expected) for name, expected in zip(names, peer.run(None, inputs))]
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all unless given")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=20, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=pathlib.Path, default=ROOT / "target" / "bench_models")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    if not all((BINARIES / name).exists() for name in ("compile", "plan")):
        subprocess.run(["cargo", "build", "--release"], cwd=ROOT, check=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    print(f"{datetime.date.today()}, {cpu}, ONNX Runtime {onnxruntime.__version__}, batch 1, f32")
    print(f"{'model':<12}{'threads':>8}{'ours ms':>10}{'ORT ms':>10}{'ratio':>8}{'difference':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name in arguments.names or MODELS:
            path = model_path(name, arguments.models)
            sizes = MODELS[name]
            plan, npz = scratch / f"{name}.plan", scratch / f"{name}.npz"
            shapes = [f"--shape={name}={','.join(map(str, shape))}" for name, shape in sizes.items()]
            command = [BINARIES / "compile", path, *shapes, "-o", plan]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
            inputs = random_inputs(session(path, 1), sizes)
            np.savez(npz, **inputs)
            difference = compare(session(path, 1), inputs, plan, npz, scratch)
            for threads in arguments.threads:
                ours, peer = [], []
                for _ in range(arguments.rounds):
                    peer.append(statistics.median(peer_times(path, threads, inputs, arguments.runs)))
                    ours.append(our_median(plan, npz, threads, arguments.runs))
                mine, theirs = statistics.median(ours), statistics.median(peer)
                row = f"{name:<12}{threads:>8}{mine * 1e3:>10.1f}{theirs * 1e3:>10.1f}{mine / theirs:>8.2f}"
                print(f"{row}{difference:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
