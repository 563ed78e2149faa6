//! Models made to break what reads them: `compile` refuses each with a reason, in bounded memory.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use onnx::messages::{
    AttributeProto, AttributeType, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    SparseTensorProto, StringStringEntryProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};
use prost::Message as _;
use tempfile::TempDir;

/// Address space of a command, in KiB: code, stacks and all else included.
const ADDRESS_SPACE_KIB: u64 = 1 << 20;

fn texts(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto { op_type: op.into(), input: texts(inputs), output: texts(outputs), attribute, ..NodeProto::default() }
}

fn call(function: &str) -> NodeProto {
    NodeProto { domain: "my".into(), ..node(function, &["x"], &["y"], vec![]) }
}

fn attribute(name: &str, r#type: AttributeType) -> AttributeProto {
    AttributeProto { name: name.into(), r#type: r#type as i32, ..AttributeProto::default() }
}

fn body(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto { g: Some(Box::new(graph)), ..attribute(name, AttributeType::Graph) }
}

/// An `f32` without dimensions, `f32[2]` or such.
fn value(name: &str, elem_type: i32, sizes: &[i64]) -> ValueInfoProto {
    use onnx::messages::{Dimension, DimensionValue};
    let dim = |&size: &i64| Dimension { value: Some(DimensionValue::DimValue(size)) };
    let shape = Some(TensorShapeProto { dim: sizes.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type, shape };
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) }) }
}

/// From `x: f32[2]` to `y`.
fn graph(nodes: Vec<NodeProto>) -> GraphProto {
    GraphProto {
        name: "main".into(),
        node: nodes,
        input: vec![value("x", 1, &[2])],
        output: vec![value("y", 1, &[2])],
        ..GraphProto::default()
    }
}

fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.into(), version }
}

fn model(graph: GraphProto, functions: Vec<FunctionProto>) -> Vec<u8> {
    let opset_import = vec![opset("", 17), opset("my", 1)];
    ModelProto { ir_version: Some(8), graph: Some(graph), opset_import, functions, ..ModelProto::default() }
        .encode_to_vec()
}

fn function(name: &str, nodes: Vec<NodeProto>) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "my".into(),
        input: texts(&["x"]),
        output: texts(&["y"]),
        node: nodes,
        opset_import: vec![opset("", 17), opset("my", 1)],
        ..FunctionProto::default()
    }
}

/// A folder with a model in a folder of its own.
struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new(model: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("model")).unwrap();
        fs::write(folder.path().join("model/x.onnx"), model).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `compile`, with little room: its exit code and what it said.
    fn compile(&self, arguments: &[&str]) -> (i32, String) {
        let script = format!("ulimit -v {ADDRESS_SPACE_KIB} && exec \"$0\" \"$@\"");
        let Output { status, stdout, stderr } = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_compile"), "model/x.onnx", "-o", "x.plan"])
            .args(arguments)
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        let said = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        assert!(!said.contains("panicked"), "{said}");
        let code = status.code().unwrap_or_else(|| panic!("`compile` was killed: {said}"));
        // Lines are broken to the width of the terminal.
        (code, said.replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" "))
    }

    #[track_caller]
    fn refused(&self, words: &str) {
        let (code, said) = self.compile(&[]);
        assert_eq!(code, 3, "{said}");
        assert!(said.contains(words), "`{words}` is not in\n{said}");
        assert!(!self.path("x.plan").exists());
    }
}

#[test]
fn names_that_stand_for_two_things_are_refused() {
    let negation = || vec![node("Neg", &["x"], &["y"], vec![])];
    let outputs = GraphProto { output: vec![value("y", 1, &[2]); 2], ..graph(negation()) };
    Desk::new(&model(outputs, vec![])).refused("`y` twice: as output 0 and as output 1");
    let inputs = GraphProto { input: vec![value("x", 1, &[2]); 2], ..graph(negation()) };
    Desk::new(&model(inputs, vec![])).refused("defines `x` twice");
    let nodes = graph([negation(), negation()].concat());
    Desk::new(&model(nodes, vec![])).refused("defines `y` twice");
    let results = graph(vec![node("Split", &["x"], &["y", "y"], vec![])]);
    Desk::new(&model(results, vec![])).refused("defines `y` twice");
    let weights = GraphProto { initializer: vec![floats("w", &[2]), floats("w", &[2])], ..graph(negation()) };
    Desk::new(&model(weights, vec![])).refused("defines `w` twice");
    let weight = GraphProto { initializer: vec![floats("y", &[2])], ..graph(negation()) };
    Desk::new(&model(weight, vec![])).refused("defines `y` twice");
}

#[test]
fn nothing_cannot_be_resized_to_something() {
    let inputs = ["w", "", "", "sizes"];
    let nodes = vec![
        node("Resize", &inputs, &["t"], vec![]),
        node("ReduceSum", &["t"], &["s"], vec![]),
        node("Add", &["x", "s"], &["y"], vec![]),
    ];
    let initializer = vec![floats("w", &[1, 1, 5, 0]), integers("sizes", &[4], &[1, 1, 2, 2])];
    Desk::new(&model(GraphProto { initializer, ..graph(nodes) }, vec![])).refused("has nothing to resample");
}

/// A tensor of ones.
fn floats(name: &str, sizes: &[i64]) -> TensorProto {
    let ones = vec![1.0f32; sizes.iter().product::<i64>() as usize];
    TensorProto { name: name.into(), dims: sizes.to_vec(), data_type: 1, float_data: ones, ..TensorProto::default() }
}

fn integers(name: &str, sizes: &[i64], values: &[i64]) -> TensorProto {
    let int64_data = values.to_vec();
    TensorProto { name: name.into(), dims: sizes.to_vec(), data_type: 7, int64_data, ..TensorProto::default() }
}

/// An index that is out of range ends as the model's fault, whether the result is folded, made from weights while the
/// plan is written, or computed when it runs.
#[test]
fn constant_indices_out_of_range_are_refused() {
    let int = |name: &str, value: i64| AttributeProto { i: Some(value), ..attribute(name, AttributeType::Int) };
    let node_of = node;
    for rows in [2, 5_000] {
        let table = || floats("w", &[rows, 2]);
        let refused = |node: NodeProto, indices: TensorProto, more: Vec<TensorProto>| {
            // All of the result is needed.
            let sum = node_of("ReduceSum", &["t"], &["s"], vec![int("keepdims", 0)]);
            let nodes = vec![node, sum, node_of("Add", &["x", "s"], &["y"], vec![])];
            let initializer = [vec![table(), indices], more].concat();
            let desk = Desk::new(&model(GraphProto { initializer, ..graph(nodes) }, vec![]));
            let (code, said) = desk.compile(&["--run"]);
            assert_eq!(code, 3, "{rows} rows: {said}");
            assert!(said.contains("ndex") && said.contains(&rows.to_string()), "{said}");
        };
        let wide = vec![rows; 5_000];
        refused(node("Gather", &["w", "i"], &["t"], vec![]), integers("i", &[5_000], &wide), vec![]);
        refused(node("Gather", &["w", "i"], &["t"], vec![]), integers("i", &[1], &[-rows - 1]), vec![]);
        let pairs = vec![rows; 10_000];
        refused(
            node("GatherElements", &["w", "i"], &["t"], vec![int("axis", 0)]),
            integers("i", &[5_000, 2], &pairs),
            vec![],
        );
        refused(node("GatherND", &["w", "i"], &["t"], vec![]), integers("i", &[5_000, 1], &wide), vec![]);
        let update = |sizes: &[i64]| vec![floats("u", sizes)];
        refused(node("ScatterND", &["w", "i", "u"], &["t"], vec![]), integers("i", &[1, 1], &[rows]), update(&[1, 2]));
        let scatter = node("ScatterElements", &["w", "i", "u"], &["t"], vec![int("axis", 0)]);
        refused(scatter, integers("i", &[1, 2], &[0, rows]), update(&[1, 2]));
    }
}

#[test]
fn cyclic_functions_are_refused() {
    let alone = vec![function("a", vec![call("a")])];
    let ring = vec![
        function("a", vec![call("b")]),
        function("b", vec![call("c")]),
        function("c", vec![node("Neg", &["x"], &["z"], vec![]), call("a")]),
    ];
    // Through the body of a node.
    let branch = || GraphProto { input: vec![], ..graph(vec![call("a")]) };
    let inner = node("If", &["c"], &["y"], vec![body("then_branch", branch()), body("else_branch", branch())]);
    let inside = vec![function("a", vec![node("Cast", &["x"], &["c"], vec![]), inner])];
    for functions in [alone, ring, inside] {
        Desk::new(&model(graph(vec![call("a")]), functions)).refused("`my.a`");
    }
}

#[test]
fn functions_that_double_at_each_level_are_refused() {
    let level = |number: usize| {
        let (first, second) = (call(&format!("f{}", number + 1)), call(&format!("f{}", number + 1)));
        let first = NodeProto { output: texts(&["z"]), ..first };
        function(&format!("f{number}"), vec![first, NodeProto { input: texts(&["z"]), ..second }])
    };
    let mut functions: Vec<FunctionProto> = (0..60).map(level).collect();
    functions.push(function("f60", vec![node("Neg", &["x"], &["y"], vec![])]));
    Desk::new(&model(graph(vec![call("f0")]), functions)).refused("function");
    // One call each, but 10,000 deep.
    let level = |number: usize| function(&format!("f{number}"), vec![call(&format!("f{}", number + 1))]);
    let mut functions: Vec<FunctionProto> = (0..10_000).map(level).collect();
    functions.push(function("f10000", vec![node("Neg", &["x"], &["y"], vec![])]));
    Desk::new(&model(graph(vec![call("f0")]), functions)).refused("function");
}

/// `inner`, `depth` times inside of the fields that `path` names, each time around it.
fn nested(path: &[u32], depth: usize, inner: &[u8]) -> Vec<u8> {
    // From the inside out, written backwards: each level is put before the last.
    let mut bytes: Vec<u8> = inner.iter().rev().copied().collect();
    for _ in 0..depth {
        for &field in path.iter().rev() {
            let mut head = Vec::new();
            prost::encoding::encode_key(field, prost::encoding::WireType::LengthDelimited, &mut head);
            prost::encoding::encode_varint(bytes.len() as u64, &mut head);
            bytes.extend(head.iter().rev());
        }
    }
    bytes.reverse();
    bytes
}

#[test]
fn nesting_10_000_deep_is_refused() {
    let start = ModelProto { ir_version: Some(8), opset_import: vec![opset("", 17)], ..ModelProto::default() };
    let start = start.encode_to_vec();
    // Graph, node, attribute, graph, …; function, node, attribute, graph, …; a type of a type, …
    let graphs = nested(&[7], 1, &nested(&[1, 5, 6], 10_000, &[]));
    Desk::new(&[start.clone(), graphs].concat()).refused("nest");
    let functions = nested(&[25, 7, 5, 6], 1, &nested(&[1, 5, 6], 10_000, &[]));
    Desk::new(&[start.clone(), functions].concat()).refused("nest");
    for kind in [4, 9] {
        let types = nested(&[7, 11, 2], 1, &nested(&[kind, 1], 10_000, &[]));
        Desk::new(&[start.clone(), types].concat()).refused("recursion limit");
    }
    // Deep in what is never read: passed over, and what remains is a model of nothing.
    let unknown = nested(&[7, 99], 1, &nested(&[1, 5, 6], 10_000, &[]));
    let (code, said) = Desk::new(&[start, unknown].concat()).compile(&[]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_dimension_that_nests_10_000_deep_is_a_name() {
    use onnx::messages::{Dimension, DimensionValue};
    let deep = "(".repeat(10_000) + "n" + &")".repeat(10_000);
    let mut graph = graph(vec![node("Neg", &["x"], &["y"], vec![])]);
    let dim = Dimension { value: Some(DimensionValue::DimParam(deep)) };
    let tensor = type_proto::Tensor { elem_type: 1, shape: Some(TensorShapeProto { dim: vec![dim] }) };
    graph.input[0].r#type = Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)) });
    let (code, said) = Desk::new(&model(graph, vec![])).compile(&[]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("not bound"), "{said}");
}

#[test]
fn a_chain_of_10_000_nodes_compiles() {
    let name = |number: usize| if number == 10_000 { "y".to_owned() } else { format!("v{number}") };
    let before = |number: usize| if number == 0 { "x".to_owned() } else { name(number) };
    let nodes = (0..10_000).map(|number| node("Neg", &[&before(number)], &[&name(number + 1)], vec![])).collect();
    let (code, said) = Desk::new(&model(graph(nodes), vec![])).compile(&[]);
    assert_eq!(code, 0, "{said}");
}

/// A tensor of two elements whose data lies elsewhere.
fn external(data_type: i32, entries: &[(&str, &str)]) -> TensorProto {
    let entry = |&(key, value): &(&str, &str)| StringStringEntryProto { key: key.into(), value: value.into() };
    TensorProto {
        name: "w".into(),
        dims: vec![2],
        data_type,
        data_location: 1,
        external_data: entries.iter().map(entry).collect(),
        ..TensorProto::default()
    }
}

fn add() -> NodeProto {
    node("Add", &["x", "w"], &["y"], vec![])
}

fn constant(entries: &[(&str, &str)]) -> NodeProto {
    let value = AttributeProto { t: Some(Box::new(external(1, entries))), ..attribute("value", AttributeType::Tensor) };
    node("Constant", &[], &["w"], vec![value])
}

/// Two values at 0 and 1 of two elements; the values or the indices lie elsewhere.
fn sparse(entries: &[(&str, &str)], elsewhere: &str) -> SparseTensorProto {
    let zeros = |data_type: i32, width: usize| TensorProto {
        raw_data: Some(vec![0; 2 * width]),
        data_location: 0,
        external_data: vec![],
        ..external(data_type, &[])
    };
    let (mut values, mut indices) = (zeros(1, 4), zeros(7, 8));
    match elsewhere {
        "values" => values = external(1, entries),
        _ => indices = external(7, entries),
    }
    SparseTensorProto { values: Some(values), indices: Some(indices), dims: vec![2] }
}

/// `x + w` in both branches of an `If`, with `w` as the branch has it.
fn branches(branch: &dyn Fn() -> GraphProto) -> Vec<u8> {
    let mut outer =
        graph(vec![node("If", &["c"], &["y"], vec![body("then_branch", branch()), body("else_branch", branch())])]);
    outer.input.push(value("c", 9, &[]));
    model(outer, vec![])
}

/// Models with external data in each place where a tensor can sit.
fn everywhere(entries: &[(&str, &str)]) -> Vec<(&'static str, Vec<u8>)> {
    let initializer = |graph: GraphProto| GraphProto { initializer: vec![external(1, entries)], ..graph };
    let in_sparse =
        |elsewhere: &str| GraphProto { sparse_initializer: vec![sparse(entries, elsewhere)], ..graph(vec![add()]) };
    let sparse_constant = AttributeProto {
        sparse_tensor: Some(Box::new(sparse(entries, "values"))),
        ..attribute("sparse_value", AttributeType::SparseTensor)
    };
    let inner = |nodes| GraphProto { input: vec![], ..graph(nodes) };
    vec![
        ("an initializer", model(initializer(graph(vec![add()])), vec![])),
        ("a constant", model(graph(vec![constant(entries), add()]), vec![])),
        ("sparse values", model(in_sparse("values"), vec![])),
        ("sparse indices", model(in_sparse("indices"), vec![])),
        ("a sparse constant", model(graph(vec![node("Constant", &[], &["w"], vec![sparse_constant]), add()]), vec![])),
        ("an initializer of a sub-graph", branches(&|| initializer(inner(vec![add()])))),
        ("a constant of a sub-graph", branches(&|| inner(vec![constant(entries), add()]))),
        (
            "a constant of a function",
            model(graph(vec![call("f")]), vec![function("f", vec![constant(entries), add()])]),
        ),
    ]
}

/// Wherever these entries stand, the model is refused with `words`. `prepare` makes files beside the model.
fn refused_everywhere(entries: &[(&str, &str)], words: &str, prepare: impl Fn(&Path)) {
    for (place, model) in everywhere(entries) {
        let desk = Desk::new(&model);
        fs::write(desk.path("secret"), [7; 64]).unwrap();
        prepare(&desk.path("model"));
        let (code, said) = desk.compile(&[]);
        assert_eq!(code, 3, "{place}: {said}");
        assert!(said.contains(words), "{place}: `{words}` is not in\n{said}");
        assert!(!desk.path("x.plan").exists(), "{place}");
    }
}

#[test]
fn external_data_outside_of_the_folder_is_refused() {
    for location in ["../secret", "a/../../secret", "/etc/hostname", "..\\secret"] {
        refused_everywhere(&[("location", location)], location, |_| {});
    }
    let linked = [("location", "w.bin")];
    refused_everywhere(&linked, "w.bin", |model| symlink("../secret", model.join("w.bin")).unwrap());
    refused_everywhere(&linked, "w.bin", |model| fs::hard_link(model.join("../secret"), model.join("w.bin")).unwrap());
    refused_everywhere(&[("location", "sub/secret")], "sub/secret", |model| symlink("..", model.join("sub")).unwrap());
    refused_everywhere(&linked, "w.bin", |model| fs::create_dir(model.join("w.bin")).unwrap());
    refused_everywhere(&linked, "w.bin", |model| symlink("/dev/zero", model.join("w.bin")).unwrap());
}

#[test]
fn external_data_outside_of_its_file_is_refused() {
    let data = |model: &Path| fs::write(model.join("w.bin"), [0; 64]).unwrap();
    let largest = u64::MAX.to_string();
    for (offset, length) in [
        ("-4", "8"),
        ("-9223372036854775808", "8"),
        (largest.as_str(), "16"),
        ("18446744073709551616", "8"),
        ("60", "8"),
        ("64", "16"),
        ("0", largest.as_str()),
        ("8", "-8"),
    ] {
        let entries = [("location", "w.bin"), ("offset", offset), ("length", length)];
        refused_everywhere(&entries, "w", data);
    }
}

#[test]
fn a_root_allows_links_inside_it_only() {
    let mut compiled = 0;
    for (place, model) in everywhere(&[("location", "w.bin")]) {
        let desk = Desk::new(&model);
        fs::create_dir(desk.path("store")).unwrap();
        let bytes = if place == "sparse indices" { 16 } else { 8 };
        let data: Vec<u8> = (0..bytes).map(|at| u8::from(at == 8)).collect();
        fs::write(desk.path("store/w.bin"), &data).unwrap();
        fs::write(desk.path("secret"), &data).unwrap();
        let link = desk.path("model/w.bin");
        let root = ["--external-data-root", "store"];
        for target in ["store/w.bin", "secret"] {
            symlink(desk.path(target), &link).unwrap();
            let (code, said) = desk.compile(&root);
            // Whether the rest of the model is supported does not matter here.
            let outside = said.contains("w.bin");
            assert_eq!(outside, target == "secret", "{place}, {target}: {code} {said}");
            assert!(!outside || code == 3, "{place}, {target}: {code} {said}");
            compiled += usize::from(code == 0);
            fs::remove_file(&link).unwrap();
        }
    }
    assert!(compiled > 0, "no model compiled with the link that is allowed");
}

#[test]
fn sizes_that_overflow_are_refused() {
    let tensor = |dims: &[i64]| TensorProto {
        name: "w".into(),
        dims: dims.to_vec(),
        data_type: 1,
        raw_data: Some(vec![0; 8]),
        ..TensorProto::default()
    };
    for dims in [&[i64::MAX][..], &[1 << 32, 1 << 32], &[-1], &[i64::MIN, 0], &[1 << 62, 4], &[1 << 40]] {
        let graph = GraphProto { initializer: vec![tensor(dims)], ..graph(vec![add()]) };
        Desk::new(&model(graph, vec![])).refused("`w`");
    }
    let dense = SparseTensorProto { dims: vec![1 << 40], ..sparse(&[], "none") };
    let dense = SparseTensorProto {
        indices: Some(TensorProto { raw_data: Some(vec![0; 16]), data_location: 0, ..external(7, &[]) }),
        ..dense
    };
    let graph = GraphProto { sparse_initializer: vec![dense], ..graph(vec![add()]) };
    Desk::new(&model(graph, vec![])).refused("dense form");
}

/// Where a file ends says nothing of how much of it is there, or used.
#[test]
fn only_what_a_model_uses_of_a_file_is_read() {
    let offset = ((1u64 << 40) - 8).to_string();
    let entries = [("location", "w.bin"), ("offset", offset.as_str()), ("length", "8")];
    let graph = GraphProto { initializer: vec![external(1, &entries)], ..graph(vec![add()]) };
    // A text of a gibibyte that nobody reads, at the end of the model itself.
    let mut bytes = model(graph, vec![]);
    prost::encoding::encode_key(6, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(1 << 30, &mut bytes);
    let desk = Desk::new(&bytes);
    let grown = |name: &str, bytes: u64| {
        let file = fs::File::options().create(true).append(true).open(desk.path(name)).unwrap();
        file.set_len(bytes).unwrap();
    };
    grown("model/x.onnx", bytes.len() as u64 + (1 << 30));
    grown("model/w.bin", 1 << 40);
    let (code, said) = desk.compile(&[]);
    assert_eq!(code, 0, "{said}");
    let plan = planfile::PlanFile::open(&desk.path("x.plan")).unwrap().into_plan();
    let read: u64 = plan.manifest.fingerprint.ranges.iter().map(|range| range.end - range.first).sum();
    assert!(read < 4096, "{read}");
    let sources = runtime::refit::Sources { weights: &desk.path("model"), external_data_root: None };
    runtime::refit::refit(plan, sources, &desk.path("new.plan"), |_| {}).unwrap();
    assert!(fs::read(desk.path("x.plan")).unwrap() == fs::read(desk.path("new.plan")).unwrap());
}

#[test]
fn a_small_model_does_not_become_a_large_plan() {
    let axis = || AttributeProto { i: Some(0), ..attribute("axis", AttributeType::Int) };
    let constant = TensorProto {
        name: "v0".into(),
        dims: vec![2],
        data_type: 1,
        raw_data: Some(vec![1; 8]),
        ..TensorProto::default()
    };
    let with = |nodes| GraphProto {
        initializer: vec![constant.clone()],
        output: vec![value("y", 1, &[2 << 24])],
        ..graph(nodes)
    };
    let (before, after) = (|level: usize| format!("v{level}"), |level: usize| format!("v{}", level + 1));
    let doubled = |other: &dyn Fn(usize) -> NodeProto| {
        let concat =
            |level: usize| node("Concat", &[&before(level), &format!("o{level}")], &[&after(level)], vec![axis()]);
        let mut nodes: Vec<NodeProto> = (0..24).flat_map(|level| [other(level), concat(level)]).collect();
        nodes.push(node("Identity", &["v24"], &["y"], vec![]));
        nodes
    };
    // Each twice as long as the one before: the same again, and another.
    let same = |level: usize| node("Identity", &[&before(level)], &[&format!("o{level}")], vec![]);
    let other = |level: usize| node("Exp", &[&before(level)], &[&format!("o{level}")], vec![]);
    for nodes in [doubled(&same), doubled(&other)] {
        let desk = Desk::new(&model(with(nodes), vec![]));
        let (code, said) = desk.compile(&[]);
        assert_eq!(code, 0, "{said}");
        let bytes = fs::metadata(desk.path("x.plan")).unwrap().len();
        assert!(bytes < 1 << 20, "{bytes}");
    }
}

#[test]
fn names_cannot_command_a_terminal() {
    const CLEAR: &str = "\u{1b}[2J\u{9b}31m\r";
    let name = |name: &str| format!("{name}{CLEAR}\n");
    let nodes = vec![
        NodeProto { name: name("n"), ..node("Neg", &[&name("x")], &[&name("z")], vec![]) },
        NodeProto { name: name("m"), ..node("Exp", &[&name("z")], &[&name("y")], vec![]) },
    ];
    let with = |nodes: Vec<NodeProto>, sizes: &[i64]| {
        let graph = GraphProto { name: name("g"), ..graph(nodes) };
        GraphProto { input: vec![value(&name("x"), 1, sizes)], output: vec![value(&name("y"), 1, sizes)], ..graph }
    };
    let said_by = |model: &[u8], arguments: &[&str]| {
        let desk = Desk::new(model);
        let output = Command::new(env!("CARGO_BIN_EXE_compile"))
            .args(["model/x.onnx", "-o", "x.plan"])
            .args(arguments)
            .current_dir(desk.folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        let control = said.chars().find(|letter| letter.is_control() && *letter != '\n');
        assert_eq!(control, None, "{said:?}");
        (output.status.code(), said)
    };
    let whole = model(with(nodes.clone(), &[2]), vec![]);
    for arguments in [&["--run"][..], &["--run", "--json"], &["--print-after", "import"]] {
        let (code, said) = said_by(&whole, arguments);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("u{1b}[2J"), "{said}");
    }
    let odd = NodeProto { op_type: name("Odd"), ..nodes[0].clone() };
    let (code, said) = said_by(&model(with(vec![odd], &[2]), vec![]), &[]);
    assert_eq!(code, Some(3), "{said}");
    let (code, said) = said_by(&model(with(nodes[..1].to_vec(), &[2]), vec![]), &[]);
    assert_eq!(code, Some(3), "{said}");
    let (code, said) = said_by(&whole, &["--dim", &format!("d{CLEAR}=1")]);
    assert_eq!(code, Some(2), "{said}");
}

#[test]
fn a_small_model_that_asks_for_much_memory_does_not_get_it() {
    // Eight bytes that would be expanded to an exbibyte of zeros.
    let shape = TensorProto {
        name: "s".into(),
        dims: vec![2],
        data_type: 7,
        raw_data: Some([1i64 << 30, 1 << 30].iter().flat_map(|size| size.to_le_bytes()).collect()),
        ..TensorProto::default()
    };
    let nodes = vec![
        node("ConstantOfShape", &["s"], &["z"], vec![]),
        node("ReduceMax", &["z"], &["m"], vec![]),
        node("Add", &["x", "m"], &["y"], vec![]),
    ];
    let graph = GraphProto { initializer: vec![shape], ..graph(nodes) };
    let desk = Desk::new(&model(graph, vec![]));
    let (code, said) = desk.compile(&[]);
    assert_eq!(code, 0, "{said}");
    assert!(fs::metadata(desk.path("x.plan")).unwrap().len() < 1 << 20);
}
