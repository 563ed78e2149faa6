#!/usr/bin/env python3
"""Times compiled PyTorch on GPUs: the architectures of `benches/models.py`, with random weights of its own.

    python3 benches/torch_peer.py resnet50 --batches 1 32 --modes reduce-overhead --out peer.json
    python3 -m torch.distributed.run --nproc-per-node 4 benches/torch_peer.py llama_block --out peer.json

Half precision: f16, and bf16 for the decoder. In several processes, `llama_block` and `llama_decode` are split as in
Megatron, two all-reduces a layer over NCCL; of the others each process takes its share of the batch, and the slowest counts. Needs
`torch`, `torchvision` and `transformers`. `benches/gpu.py` calls this.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

# Measured without NVLink multicast on both sides; NCCL reads this when it is loaded.
os.environ["NCCL_NVLS_ENABLE"] = "0"

try:
    import torch
    import torch.distributed
    import torch.distributed._functional_collectives as collectives
    from torch.nn import functional
except ImportError as error:
    sys.exit(f"PyTorch cannot be loaded ({error}); install `torch`, `torchvision` and `transformers`")

WARM_UP = 10

# By name: the mode of `torch.compile`, and whether the result is captured here in one CUDA graph. PyTorch's own graphs
# come with a check of the arguments and a copy of the inputs in each call.
MODES = {
    "reduce-overhead": ("reduce-overhead", False),
    "max-autotune": ("max-autotune", False),
    "graph": ("default", True),
    "max-autotune-graph": ("max-autotune-no-cudagraphs", True),
}
# Where collectives run inside, the graph is always captured here.
CAPTURED = {"reduce-overhead": "graph", "max-autotune": "max-autotune-graph"}


def world_size():
    return int(os.environ.get("WORLD_SIZE", "1"))


def resnet50(batch, device, arguments):
    """Batch normalisation folded into convolutions, as in our model; channels last, for tensor cores."""
    from torch.fx.experimental.optimization import fuse
    from torchvision.models import resnet50

    model = fuse(resnet50().eval()).to(device, torch.half, memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=torch.half)
    return model, pixels.to(memory_format=torch.channels_last)


def bert_base(batch, device, arguments):
    """Without pooling, as our model; and without a mask, which ours has."""
    from transformers import BertConfig, BertModel

    class LastHiddenState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel(BertConfig(), add_pooling_layer=False)

        def forward(self, ids):
            return self.bert(input_ids=ids).last_hidden_state

    model = LastHiddenState().eval().to(device, torch.half)
    return model, torch.randint(0, 30000, (batch, 128), device=device)


def vit_b16(batch, device, arguments):
    from torchvision.models import vit_b_16

    model = vit_b_16().eval().to(device, torch.half)
    return model, torch.randn(batch, 3, 224, 224, device=device, dtype=torch.half)


def bilstm(batch, device, arguments):
    """cuDNN's recurrent layers."""

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(512, 512, num_layers=2, bidirectional=True)

        def forward(self, tokens):
            return self.lstm(tokens)[0]

    model = Features().eval().to(device, torch.half)
    return model, torch.randn(128, batch, 512, device=device, dtype=torch.half)


def llama_block(batch, device, arguments):
    with torch.device(device):
        model = Decoder(arguments.layers, arguments.sequence).eval().to(torch.bfloat16)
    return model, torch.randn(batch, arguments.sequence, Decoder.WIDTH, device=device, dtype=torch.bfloat16)


def llama_decode(batch, device, arguments):
    """One token after a cache, into whose last place each run writes: nothing is copied, as the model of ours does."""
    with torch.device(device):
        model = Decoder(arguments.layers, 1, arguments.past, batch).eval().to(torch.bfloat16)
    return model, torch.randn(batch, 1, Decoder.WIDTH, device=device, dtype=torch.bfloat16)


class Decoder(torch.nn.Module):
    """This rank's share of Llama-3-8B-shaped decoder layers: heads and the hidden dimension are split.

    Queries, keys and values are one product, and so are gate and up.
    """

    WIDTH, HIDDEN, HEADS, KV_HEADS, SIZE, THETA = 4096, 14336, 32, 8, 128, 5e5

    def __init__(self, layers, sequence, past=0, batch=1):
        """With `past`, tokens come after a cache of as many."""
        super().__init__()
        world = world_size()
        if self.KV_HEADS % world:
            sys.exit(f"{world} processes do not divide {self.KV_HEADS} heads; take 1, 2, 4 or 8")
        self.heads, self.kv_heads, self.hidden = self.HEADS // world, self.KV_HEADS // world, self.HIDDEN // world
        self.layers = torch.nn.ModuleList(self.layer() for _ in range(layers))
        self.past = past
        for index in range(layers if past else 0):
            for kind in ("keys", "values"):
                cache = torch.randn(batch, self.kv_heads, past + sequence, self.SIZE)
                self.register_buffer(f"{kind}_{index}", cache)
        positions = torch.arange(past, past + sequence)
        self.register_buffer("positions", positions)
        angles = torch.outer(positions, self.THETA ** (-torch.arange(0, self.SIZE, 2) / self.SIZE))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def layer(self):
        def weight(outputs, inputs):
            return torch.nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

        def ones():
            return torch.nn.Parameter(torch.ones(self.WIDTH))

        return torch.nn.ParameterDict({
            "attention_norm": ones(),
            "qkv": weight((self.heads + 2 * self.kv_heads) * self.SIZE, self.WIDTH),
            "output": weight(self.WIDTH, self.heads * self.SIZE),
            "feed_forward_norm": ones(),
            "gate_up": weight(2 * self.hidden, self.WIDTH),
            "down": weight(self.WIDTH, self.hidden),
        })  # fmt: skip

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = x + total(self.attention(index, layer, self.norm(x, layer["attention_norm"])))
            x = x + total(self.feed_forward(layer, self.norm(x, layer["feed_forward_norm"])))
        return x

    def norm(self, x, scale):
        return functional.rms_norm(x, (self.WIDTH,), scale, 1e-5)

    def attention(self, index, layer, x):
        batch, sequence, _ = x.shape
        counts = [self.heads, self.kv_heads, self.kv_heads]
        parts = functional.linear(x, layer["qkv"]).split([count * self.SIZE for count in counts], -1)
        q, k, v = (part.view(batch, sequence, -1, self.SIZE).transpose(1, 2) for part in parts)
        q, k = self.rotate(q), self.rotate(k)
        if self.past:
            k = self.get_buffer(f"keys_{index}").index_copy_(2, self.positions, k)
            v = self.get_buffer(f"values_{index}").index_copy_(2, self.positions, v)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=not self.past, enable_gqa=True)
        return functional.linear(y.transpose(1, 2).reshape(batch, sequence, -1), layer["output"])

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)

    def feed_forward(self, layer, x):
        gate, up = functional.linear(x, layer["gate_up"]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, layer["down"])


def total(x):
    """The sum over all ranks."""
    return x if world_size() == 1 else collectives.all_reduce(x, "sum", torch.distributed.group.WORLD)


WORKS = {build.__name__: build for build in (resnet50, bert_base, vit_b16, bilstm, llama_block, llama_decode)}
# Split over all processes as they are; of others each takes its share of the batch.
SPLIT = ("llama_block", "llama_decode")


def compiled(model, x, mode):
    """A call without arguments that runs the compiled model on `x`."""
    mode = CAPTURED.get(mode, mode) if world_size() > 1 else mode
    name, captured = MODES[mode]
    function = torch.compile(model, mode=name, dynamic=False)
    if not captured:
        return lambda: function(x)
    for _ in range(3):
        function(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The result stays alive, since the graph writes it.
    with torch.cuda.graph(graph):
        result = function(x)
    return lambda: (graph.replay(), result)[1]


def times(call, runs):
    """Seconds of each run, between CUDA events around it."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    if world_size() > 1:
        torch.distributed.barrier()
    seconds = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return sorted(seconds)


def slowest(seconds):
    """The largest over all ranks of each number."""
    if world_size() == 1:
        return seconds
    numbers = torch.tensor(seconds, device="cuda", dtype=torch.float64)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers.tolist()


def measure(work, batch, mode, arguments):
    """One row of the report; batch and mode as asked for."""
    torch.compiler.reset()
    torch.cuda.empty_cache()
    share = batch if work in SPLIT else batch // world_size()
    model, x = WORKS[work](share, "cuda", arguments)
    start = time.perf_counter()
    call = compiled(model, x, mode)
    call()
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    seconds = times(call, arguments.runs)
    median, p99 = slowest([statistics.median(seconds), seconds[(len(seconds) * 99 - 1) // 100]])
    return {"median_seconds": median, "p99_seconds": p99, "compile_seconds": warm_up}


def report(arguments):
    """Measures each batch and mode; after each, all rows so far are in the file."""
    rows = []
    for batch in arguments.batches:
        for mode in arguments.modes:
            row = {"work": arguments.work, "batch": batch, "mode": mode, "gpus": world_size()}
            try:
                row |= measure(arguments.work, batch, mode, arguments)
            # Whatever goes wrong in one compilation, others may still be measured.
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            rows.append(row)
            if int(os.environ.get("RANK", "0")) == 0:
                arguments.out.write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["reduce-overhead"])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--layers", type=int, default=2, help="of llama_block and llama_decode")
    parser.add_argument("--sequence", type=int, default=2048, help="of llama_block")
    parser.add_argument("--past", type=int, default=2048, help="tokens in the cache of llama_decode")
    parser.add_argument("--out", type=Path, required=True, help="JSON; written after each measurement")
    arguments = parser.parse_args()
    split = [batch for batch in arguments.batches if batch % world_size()]
    if arguments.work not in SPLIT and split:
        parser.error(f"batch {split[0]} cannot be split over {world_size()} processes")
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; look at `nvidia-smi`, and at whether this PyTorch is built for CUDA")
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    if world_size() == 1:
        return report(arguments)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    report(arguments)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
