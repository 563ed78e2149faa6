//! Memory that compiling takes when weights are large: bounded, whatever their size.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use planfile::{DType, Op, PlanFile};

/// Rows and columns of each weight: 64 MiB of `f32`.
const SIZE: u64 = 4096;
/// Weights of the model: 256 MiB.
const COUNT: u64 = 4;
/// What `compile` may hold at its peak: less than the weights, of which one is transposed in one piece.
const PEAK_KIB: u64 = 192 << 10;

/// A message of Protocol Buffers, by the numbers of its fields.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    fn message(self, field: u64, value: Self) -> Self {
        self.bytes(field, value.0)
    }
}

/// `x · w0 · transpose(w1) · w2 …`, with weights in `weights.bin`: zeros that take no place on the disk.
fn model(folder: &Path) {
    let port = |name: &str| {
        let dim = |size| Message::default().number(1, size);
        let shape = Message::default().message(1, dim(8)).message(1, dim(SIZE));
        let tensor = Message::default().number(1, 1).message(2, shape);
        Message::default().bytes(1, name).message(2, Message::default().message(1, tensor))
    };
    let node = |op: &str, inputs: &[&str], output: &str| {
        let inputs = inputs.iter().fold(Message::default(), |node, input| node.bytes(1, input));
        inputs.bytes(2, output).bytes(4, op)
    };
    let bytes = SIZE * SIZE * 4;
    let mut graph = Message::default();
    let mut value = "x".to_owned();
    for index in 0..COUNT {
        let (weight, product) = (format!("w{index}"), format!("h{index}"));
        let mut factor = weight.clone();
        if index % 2 == 1 {
            factor = format!("t{index}");
            graph = graph.message(1, node("Transpose", &[&weight], &factor));
        }
        graph = graph.message(1, node("MatMul", &[&value, &factor], &product));
        let entry = |key: &str, value: &str| Message::default().bytes(1, key).bytes(2, value);
        let tensor = Message::default().number(1, SIZE).number(1, SIZE).number(2, 1).bytes(8, &weight);
        let tensor = tensor.message(13, entry("location", "weights.bin"));
        let tensor = tensor.message(13, entry("offset", &(index * bytes).to_string()));
        let tensor = tensor.message(13, entry("length", &bytes.to_string())).number(14, 1);
        graph = graph.message(5, tensor);
        value = product;
    }
    let graph = graph.bytes(2, "big").message(11, port("x")).message(12, port(&value));
    let opset = Message::default().bytes(1, "").number(2, 20);
    let model = Message::default().number(1, 10).message(7, graph).message(8, opset);
    fs::write(folder.join("model.onnx"), model.0).unwrap();
    File::create(folder.join("weights.bin")).unwrap().set_len(COUNT * bytes).unwrap();
}

/// Compiles, and watches the peak of resident memory, in KiB.
fn peak_kib(folder: &Path, flags: &[&str]) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_compile"));
    command.args(["model.onnx", "-o", "big.plan"]).args(flags).current_dir(folder).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut peak = 0;
    loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        // None once it has ended; the peak of the process before that only grows.
        if let Some(kib) = line.and_then(|line| line.split_whitespace().next()) {
            peak = kib.parse().unwrap();
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success() && peak > 0, "{flags:?}: {status}");
            return peak;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn memory_stays_below_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    for (flags, dtype) in [
        (&[][..], DType::F32),
        (&["--dtype", "bf16"], DType::BF16),
        (&["--mesh", "tensor=2", "--dtype", "f16"], DType::F16),
    ] {
        let peak = peak_kib(folder.path(), flags);
        println!("{flags:?}: {} MiB", peak >> 10);
        assert!(peak < PEAK_KIB, "{flags:?}: {} MiB", peak >> 10);
        let plan = PlanFile::open(&folder.path().join("big.plan")).unwrap().into_plan();
        let weights = plan.manifest.weights;
        assert!(weights.iter().all(|weight| weight.ty.dtype == dtype), "{flags:?}");
        // Still made from the file when the plan is written.
        let transposed = weights.iter().filter(|weight| {
            let nodes = &weight.recipe.spec.nodes;
            // Panels for the host are another matter, of three dimensions.
            nodes.iter().any(|node| matches!(&node.op, Op::Transpose { permutation } if permutation.len() == 2))
        });
        assert_eq!(transposed.count() as u64, COUNT / 2, "{flags:?}");
    }
}
