#!/usr/bin/env python3
"""Times models on GPUs beside compiled PyTorch, in one call, and prints ratios.

    python3 benches/gpu.py --quick --out gpu.json             # one GPU, every work, about 8 minutes
    python3 benches/gpu.py --gpus 4 --modes graph             # llama_block and llama_decode, split over 4 GPUs
    python3 benches/gpu.py --works resnet50,vit_b16 --binaries DIR

For each work: `benches/models.py` writes the model, `compile` makes the plan, `plan bench` times it and, where asked
for, its steps; then `benches/torch_peer.py` times the same architecture under PyTorch. Both in CUDA events, medians.
The error is the largest difference of any output from our own plan for the CPU in f32, on the same random inputs, as
share of the largest value. Needs `onnx`, `numpy`, `torch`, `torchvision`, `transformers`, and the release build.

With `--target cpu --modes none` it needs neither GPU nor PyTorch.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

BENCHES = Path(__file__).resolve().parent
ROOT = BENCHES.parent

# `torch_peer.py` says what they mean.
QUICK_MODES = ["reduce-overhead"]
MODES = ["reduce-overhead", "graph", "max-autotune"]
QUICK_SECONDS, FULL_SECONDS = 480, 3600
# No stage begins with less time left than this.
STAGE_SECONDS = 10
# Kept of what a failed program said; the launcher of several processes adds some 40 lines of its own.
ERROR_LINES = 60


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, the type it is compiled to, and the batches it runs at."""

    name: str
    dtype: str
    batches: tuple[int, ...] = (1, 32)
    # Made of as many layers as asked for, and split over all GPUs on both sides.
    layered: bool = False


WORKS = {
    work.name: work
    for work in (
        Work("resnet50", "f16"),
        Work("bert_base", "f16"),
        Work("vit_b16", "f16"),
        Work("bilstm", "f16"),
        Work("llama_block", "bf16", batches=(1,), layered=True),
        Work("llama_decode", "bf16", batches=(1, 16), layered=True),
    )
}

LAYERED = [name for name, work in WORKS.items() if work.layered]


def random_inputs(work, batch, arguments):
    """Arrays by input name."""
    random = np.random.default_rng(0)
    if work.name == "bert_base":
        ids = random.integers(0, 30000, (batch, 128), np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    if work.layered:
        is_block = work.name == "llama_block"
        shapes = {"hidden": (batch, arguments.sequence if is_block else 1, 4096)}
        for layer in range(0 if is_block else arguments.layers):
            shapes |= {f"past_{kind}_{layer}": (batch, 8, arguments.past, 128) for kind in ("key", "value")}
        draw = lambda shape: random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        return {name: draw(shape) for name, shape in shapes.items()}
    if work.name == "bilstm":
        return {"tokens": random.standard_normal((128, batch, 512), np.float32)}
    return {"pixels": random.standard_normal((batch, 3, 224, 224), np.float32)}


class Failed(Exception):
    """A stage that did not succeed, with what it said."""


class Stages:
    """Runs programs, each only as long as time is left in all."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds
        # Measured without NVLink multicast on both sides.
        self.environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}

    def run(self, *command):
        """What the program printed.

        Raises `Failed` when it fails or time is up; then it and all processes it started are ended.
        """
        left = self.end - time.monotonic()
        # What a reader knows it by: not the interpreter, nor a launcher.
        name = next((Path(part).name for part in map(str, command) if part.endswith(".py")), Path(command[0]).name)
        if left < STAGE_SECONDS:
            raise Failed(f"no time left for {name}; raise --limit or choose fewer works")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [str(part) for part in command]
        print(f"  {left:4.0f} s left: {shlex.join(command)}", file=sys.stderr, flush=True)
        try:
            # A session of its own, so that the workers of a launcher end with it.
            process = subprocess.Popen(
                command, **pipes, text=True, errors="replace", env=self.environment, start_new_session=True
            )
        except OSError as error:
            raise Failed(f"{name} does not start: {error}") from error
        try:
            output, errors = process.communicate(timeout=left)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Failed(f"{name} was not done when time was up") from error
            raise
        if process.returncode != 0:
            said = "\n".join((errors.strip() or output.strip()).splitlines()[-ERROR_LINES:])
            raise Failed(f"{name} ended with {process.returncode}: {said}")
        return output


class Ours:
    """Compiles and times plans. Files go to `scratch`."""

    def __init__(self, arguments, stages, scratch):
        self.arguments, self.stages, self.scratch = arguments, stages, scratch
        self.compiler, self.plan_tool = arguments.binaries / "compile", arguments.binaries / "plan"

    def model(self, work):
        """The path of the model, written anew when `models.py` is younger."""
        flags, folder = [], self.arguments.models
        if work.layered:
            folder = folder / f"llama_{self.arguments.layers}"
            flags = ["--layers", self.arguments.layers, "--dtype", work.dtype]
        path = folder / f"{work.name}.onnx"
        script = BENCHES / "models.py"
        if not path.exists() or path.stat().st_mtime < script.stat().st_mtime:
            # A model that was cut off in the middle must not be taken for whole in the next call.
            path.unlink(missing_ok=True)
            partial = folder / "partial"
            self.stages.run(sys.executable, script, partial, work.name, *flags)
            for file in partial.iterdir():
                file.replace(folder / file.name)
        return path

    def compile(self, work, batch, *flags):
        """The path of a new plan."""
        plan = self.scratch / f"{'-'.join([work.name, str(batch), *flags]).replace('--', '')}.plan"
        dims = [f"--dim=batch={batch}"]
        if work.name == "llama_block":
            dims.append(f"--dim=sequence={self.arguments.sequence}")
        if work.name == "llama_decode":
            dims.append(f"--dim=past={self.arguments.past}")
        self.stages.run(self.compiler, self.model(work), *dims, *flags, "-o", plan)
        return plan

    def inputs(self, work, batch):
        """The path of an archive."""
        path = self.scratch / f"{work.name}-{batch}.npz"
        if not path.exists():
            np.savez(path, **random_inputs(work, batch, self.arguments))
        return path

    def bench(self, work, batch):
        """The report of `plan bench`, and the error if it is asked for."""
        arguments = self.arguments
        flags = [f"--target={arguments.target}", f"--gpus={arguments.gpus}", f"--dtype={work.dtype}"]
        start = time.monotonic()
        plan = self.compile(work, batch, *flags)
        compile_seconds = time.monotonic() - start
        command = [self.plan_tool, "bench", plan, "--inputs", self.inputs(work, batch), "--json"]
        command += ["--runs", arguments.runs, "--warm-up", 10]
        try:
            report = json.loads(self.stages.run(*command, *(["--steps"] if arguments.steps else [])))
            report["compile_seconds"] = compile_seconds
            if arguments.check:
                report |= self.check(work, batch, plan)
            return report
        finally:
            plan.unlink(missing_ok=True)

    def check(self, work, batch, plan):
        """The error of the plan, or why there is none: a report without it is still one."""
        try:
            expected = self.outputs(work, batch, plan=None)
            found = self.outputs(work, batch, plan)
        except Failed as failed:
            return {"check_failed": str(failed)}
        if not all(np.isfinite(array).all() for array in found.values()):
            return {"check_failed": "an output has values that are not finite"}
        pairs = [(found[name], array) for name, array in expected.items()]
        return {"error": max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)}

    def outputs(self, work, batch, plan):
        """Outputs by name, in f32; of the reference on the CPU where `plan` is none."""
        path = self.scratch / f"{work.name}-{batch}-out.npz"
        made = plan or self.compile(work, batch, "--target=cpu", "--dtype=f32")
        self.stages.run(self.plan_tool, "run", made, "--inputs", self.inputs(work, batch), "--outputs", path)
        if plan is None:
            made.unlink()
        with np.load(path) as archive:
            return {name: to_f32(archive[name]) for name in archive.files}


def to_f32(array):
    """NumPy reads bfloat16 as two-byte voids."""
    return (array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array).astype(np.float32)


def peer_rows(work, arguments, stages, scratch):
    """Rows of `torch_peer.py`, those it wrote before it failed included; and what it said then."""
    out = scratch / "peer.json"
    out.unlink(missing_ok=True)
    launcher = [sys.executable]
    if arguments.gpus > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={arguments.gpus}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    batches = [batch for batch in work.batches if work.layered or batch % arguments.gpus == 0]
    if not batches:
        return [], f"no batch of {work.batches} can be split over {arguments.gpus} GPUs"
    command = [*launcher, BENCHES / "torch_peer.py", work.name, "--batches", *batches, "--modes", *arguments.modes]
    command += ["--runs", arguments.runs, "--layers", arguments.layers, "--sequence", arguments.sequence]
    command += ["--past", arguments.past]
    failure = None
    try:
        stages.run(*command, "--out", out)
    except Failed as failed:
        failure = str(failed)
    try:
        return json.loads(out.read_text()), failure
    except (OSError, ValueError):
        return [], failure


def best(rows, batch):
    """The quickest row of a batch, or none."""
    rows = [row for row in rows if row["batch"] == batch and "median_seconds" in row]
    return min(rows, key=lambda row: row["median_seconds"], default=None)


def measure(arguments, scratch, report):
    """Fills `report["rows"]`; after each stage, everything so far is in the file."""
    stages = Stages(arguments.limit)
    ours = Ours(arguments, stages, scratch)
    for work in arguments.works:
        for batch in work.batches:
            row = {"work": work.name, "batch": batch, "gpus": arguments.gpus, "dtype": work.dtype}
            report["rows"].append(row)
            try:
                row["ours"] = ours.bench(work, batch)
            except Failed as failed:
                row["failed"] = str(failed)
            save(report, arguments.out)
    for work in arguments.works if arguments.modes else []:
        peers, failure = peer_rows(work, arguments, stages, scratch)
        for row in report["rows"]:
            if row["work"] == work.name:
                row["peers"] = [peer for peer in peers if peer["batch"] == row["batch"]]
                row["peer_failed"] = failure
        save(report, arguments.out)


def save(report, path):
    """Under another name first: a reader never finds half of it."""
    if path:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(path)


def table(report):
    """One line for each work and batch, then what failed, then the steps that take longest."""
    head = f"{'work':<12}{'batch':>6}{'GPUs':>5}{'ours µs':>11}{'p99 µs':>11}"
    lines, remarks = [f"{head}{'PyTorch µs':>12}{'ratio':>7}{'error':>10}  mode"], []
    for row in report["rows"]:
        ours, peer = row.get("ours", {}), best(row.get("peers", []), row["batch"])
        median, theirs = ours.get("median_seconds"), peer and peer["median_seconds"]
        ratio = median / theirs if median and theirs else None
        cells = [micros(median, 11), micros(ours.get("p99_seconds"), 11), micros(theirs, 12), cell(ratio, ".2f", 7)]
        cells.append(cell(ours.get("error"), ".1e", 10))
        head = f"{row['work']:<12}{row['batch']:>6}{row['gpus']:>5}"
        lines.append(f"{head}{''.join(cells)}  {peer['mode'] if peer else ''}".rstrip())
        peer_errors = [f"{each['mode']}: {each['error']}" for each in row.get("peers", []) if "error" in each]
        said = [row.get("failed"), ours.get("check_failed"), row.get("peer_failed"), *peer_errors]
        remarks += [f"{row['work']} batch {row['batch']}: {each}" for each in said if each]
    return "\n".join(lines + list(dict.fromkeys(remarks)))


def cell(number, form, width):
    return f"{'-' if number is None else format(number, form):>{width}}"


def micros(seconds, width):
    return cell(seconds and seconds * 1e6, ".1f", width)


def slow_steps(report, count):
    """The steps of our plans that take longest."""
    lines = []
    for row in report["rows"]:
        steps = row.get("ours", {}).get("steps", [])
        whole = sum(step["seconds"] for step in steps)
        lines += [f"\n{row['work']} batch {row['batch']}: {len(steps)} steps, {whole * 1e6:.1f} µs"] if steps else []
        for step in sorted(steps, key=lambda step: -step["seconds"])[:count]:
            rates = f"{step['operations_per_second'] * 1e-12:7.1f} TFLOP/s{step['bytes_per_second'] * 1e-9:8.0f} GB/s"
            origin = " ".join(step["origin"][:3])
            lines.append(f"{step['seconds'] * 1e6:10.1f} µs {rates}  {step['what']}  {origin}")
    return "\n".join(lines)


def machine():
    """The GPUs, one line for each with its driver; none where there is no driver, or it finds no GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, check=False, capture_output=True, text=True)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


def version(package):
    """Of an installed package, or none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(WORKS)
    parser.add_argument("--works", help=f"of {names} [default: all; {','.join(LAYERED)} on several GPUs]")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--modes", help=f"of torch_peer.py, the quickest counts; or none [default: {','.join(MODES)}]")
    parser.add_argument("--quick", action="store_true", help=f"--modes {','.join(QUICK_MODES)} --limit {QUICK_SECONDS}")
    parser.add_argument("--limit", type=float, help="seconds for everything; what does not fit is left out")
    parser.add_argument("--binaries", type=Path, default=ROOT / "target" / "release", help="where compile and plan lie")
    parser.add_argument("--models", type=Path, default=ROOT / "target" / "bench_models", help="where models go")
    parser.add_argument("--target", default="h200x4", help="of compile")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--layers", type=int, default=2, help=f"of {' and '.join(LAYERED)}")
    parser.add_argument("--sequence", type=int, default=2048, help="of llama_block")
    parser.add_argument("--past", type=int, default=2048, help="tokens in the cache of llama_decode")
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True, help="also time each step")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="also find the error")
    parser.add_argument("--out", type=Path, help="JSON of everything measured; written after each stage")
    arguments = parser.parse_args()
    chosen = (arguments.works or (names if arguments.gpus == 1 else ",".join(LAYERED))).split(",")
    unknown = [name for name in chosen if name not in WORKS]
    if unknown:
        parser.error(f"no work {unknown[0]}; there are {names}")
    if "bilstm" in chosen and arguments.gpus > 1:
        parser.error("bilstm has its batch in the second dimension, which is not split; take one GPU")
    arguments.works = [WORKS[name] for name in chosen]
    modes = QUICK_MODES if arguments.quick else MODES
    if arguments.modes:
        modes = [mode for mode in arguments.modes.split(",") if mode != "none"]
    arguments.modes = modes
    arguments.limit = arguments.limit or (QUICK_SECONDS if arguments.quick else FULL_SECONDS)
    arguments.binaries, arguments.models = arguments.binaries.resolve(), arguments.models.resolve()
    return arguments


def require(arguments, gpus):
    """Ends with a message where something is missing that would fail later."""
    missing = [name for name in ("compile", "plan") if not (arguments.binaries / name).is_file()]
    if missing:
        sys.exit(f"no {missing[0]} in {arguments.binaries}; run `cargo build --release`, or give --binaries")
    if (arguments.target != "cpu" or arguments.modes) and len(gpus) < arguments.gpus:
        sys.exit(f"GPUs asked for: {arguments.gpus}, listed by nvidia-smi: {len(gpus)}; see `--help` for runs without")
    for package in ("torch", "torchvision", "transformers") if arguments.modes else ():
        if not importlib.util.find_spec(package):
            sys.exit(f"the package {package} is missing: install it, or leave PyTorch out with `--modes none`")


def main():
    arguments = parse_arguments()
    gpus = machine() if arguments.target != "cpu" or arguments.modes else []
    require(arguments, gpus)
    report = {
        "date": str(datetime.date.today()),
        "machine": gpus,
        "versions": {package: version(package) for package in ("torch", "transformers")} if arguments.modes else {},
        "command": shlex.join(["python3", "benches/gpu.py", *sys.argv[1:]]),
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="gpu_bench.") as scratch:
        measure(arguments, Path(scratch), report)
    print(f"{report['date']}, {gpus[0] if gpus else 'no GPU'}, PyTorch {report['versions'].get('torch')}")
    print(table(report))
    if arguments.steps:
        print(slow_steps(report, count=8))
    peers = [best(row.get("peers", []), row["batch"]) for row in report["rows"]] if arguments.modes else []
    if any("ours" not in row for row in report["rows"]) or None in peers:
        sys.exit(1)


if __name__ == "__main__":
    main()
