//! New weights in an old plan: the same bytes as compiling anew, or a refusal.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its own functions too")]

use std::fs;
use std::path::{Path, PathBuf};

use passes::settings::MeshChoice;
use passes::shard::parse_mesh;
use planfile::fingerprint::FileRange;
use planfile::plan::Manifest;
use planfile::{PlanFile, Source, Target, diff};
use planwright::compiler::Request;
use runtime::refit::{RefitError, Sources, refit};
use runtime::tensor_file::TestData;
use tempfile::TempDir;

/// A model that may be changed, and its plan.
struct Desk {
    folder: TempDir,
    data: TestData,
}

impl Desk {
    fn new(name: &str) -> Self {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx").join(name);
        let folder = tempfile::tempdir().unwrap();
        fs::copy(fixture.join("model.onnx"), folder.path().join("model.onnx")).unwrap();
        let desk = Self { folder, data: TestData::read(&fixture.join("test_data_set_0")).unwrap() };
        desk.compile("old.plan");
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn compile(&self, plan: &str) -> Vec<u8> {
        let target = Target::from_json(include_str!("../fixtures/targets/cpu.json")).unwrap();
        let mut request = Request::new(&self.path("model.onnx"), target);
        request.samples.clone_from(&self.data.inputs);
        request.mesh = MeshChoice::Fixed(parse_mesh("tensor=2").unwrap());
        request.compile(&mut |_, _| {}).unwrap().unwrap().write(&self.path(plan), |_| {}).unwrap();
        fs::read(self.path(plan)).unwrap()
    }

    fn old(&self) -> PlanFile {
        PlanFile::open(&self.path("old.plan")).unwrap()
    }

    fn refit(&self, weights: &Path) -> Result<Vec<u8>, RefitError> {
        let sources = Sources { weights, external_data_root: None };
        refit(self.old().into_plan(), sources, &self.path("new.plan"), |_| {})?;
        Ok(fs::read(self.path("new.plan")).unwrap())
    }

    /// Flips the lowest bit of a byte of the model: in a weight, that keeps it a number.
    fn flip(&self, at: u64) {
        let mut bytes = fs::read(self.path("model.onnx")).unwrap();
        bytes[at as usize] ^= 1;
        fs::write(self.path("model.onnx"), bytes).unwrap();
    }
}

/// Name and first byte of each weight that the plan copies without a look.
fn copied(manifest: &Manifest) -> Vec<(&str, u64)> {
    let free = |at: u64| !manifest.fingerprint.ranges.iter().any(|range| (range.first..range.end).contains(&at));
    let weights = manifest.weights.iter().flat_map(|weight| {
        weight.recipe.inputs.iter().filter_map(|input| match input.source {
            Source::File { file: 0, offset } => Some((weight.name.as_str(), offset)),
            _ => None,
        })
    });
    weights.filter(|(_, at)| free(*at)).collect()
}

#[test]
fn the_same_weights_give_the_same_plan() {
    let desk = Desk::new("tiny_llama");
    let old = fs::read(desk.path("old.plan")).unwrap();
    assert!(desk.refit(desk.folder.path()).unwrap() == old, "by the folder");
    assert!(desk.refit(&desk.path("model.onnx")).unwrap() == old, "by the file");
    fs::rename(desk.path("model.onnx"), desk.path("other.onnx")).unwrap();
    let renamed = desk.refit(&desk.path("other.onnx")).unwrap();
    assert_eq!(PlanFile::open(&desk.path("new.plan")).unwrap().plan().manifest.files[0].name, "other.onnx");
    assert!(renamed != old, "the plan names its files");
}

#[test]
fn new_weights_give_what_compiling_gives() {
    for name in ["tiny_bert", "tiny_resnet", "tiny_mixtral"] {
        let desk = Desk::new(name);
        let old = desk.old();
        let weights = copied(&old.plan().manifest);
        assert!(weights.len() > 4, "{name}: {weights:?}");
        for &(_, at) in &weights {
            desk.flip(at);
        }
        let compiled = desk.compile("compiled.plan");
        assert!(desk.refit(desk.folder.path()).unwrap() == compiled, "{name}");
        let new = PlanFile::open(&desk.path("new.plan")).unwrap();
        let mut found = diff::diff(old.plan(), new.plan());
        assert!(found.same, "{name}: {}", found.text());
        diff::values(&old, &new, &mut found).unwrap();
        assert!(!found.same && found.values.iter().any(|value| *value == weights[0].0), "{name}: {}", found.text());
    }
}

/// Constants that the plan keeps, weights that the compiler looked at, and the graph itself: none may change unseen.
#[test]
fn whatever_decided_the_plan_must_be_the_same() {
    let desk = Desk::new("tiny_bert");
    let manifest = desk.old().into_plan().manifest;
    let ranges = manifest.fingerprint.ranges;
    assert!(ranges.len() > 3, "{ranges:?}");
    for FileRange { first, end, .. } in ranges {
        for at in [first, first + (end - first) / 2, end - 1] {
            desk.flip(at);
            let refused = desk.refit(desk.folder.path()).err();
            assert!(matches!(refused, Some(RefitError::Changed)), "byte {at}: {refused:?}");
            desk.flip(at);
        }
    }
    assert!(!desk.path("new.plan").exists());
    desk.refit(desk.folder.path()).unwrap();
}

#[test]
fn other_files_are_refused() {
    let desk = Desk::new("tiny_bert");
    let empty = tempfile::tempdir().unwrap();
    let missing = desk.refit(empty.path()).unwrap_err();
    assert!(matches!(missing, RefitError::Io { .. }) && missing.to_string().contains("model.onnx"), "{missing}");
    let mut bytes = fs::read(desk.path("model.onnx")).unwrap();
    bytes.push(0);
    fs::write(desk.path("model.onnx"), bytes).unwrap();
    let longer = desk.refit(desk.folder.path()).unwrap_err();
    assert!(matches!(longer, RefitError::Size { .. }) && longer.to_string().contains("compile"), "{longer}");
}

/// Names of files in a plan from elsewhere lead nowhere outside of the folder.
#[test]
fn a_plan_reads_no_file_outside_of_the_folder() {
    let desk = Desk::new("tiny_bert");
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), [0; 8]).unwrap();
    std::os::unix::fs::symlink(outside.path().join("secret"), desk.path("link")).unwrap();
    fs::write(desk.path("twin"), [0; 8]).unwrap();
    fs::hard_link(desk.path("twin"), desk.path("hard")).unwrap();
    let attempt = |name: &str, root: Option<&Path>| {
        let mut plan = desk.old().into_plan();
        plan.manifest.files.push(planfile::SourceFile { name: name.to_owned(), bytes: 8 });
        let sources = Sources { weights: desk.folder.path(), external_data_root: root };
        refit(plan, sources, &desk.path("new.plan"), |_| {})
    };
    for name in ["../secret", "/etc/hostname", "", "a/../secret"] {
        assert!(matches!(attempt(name, None), Err(RefitError::Location { .. })), "{name}");
    }
    assert!(matches!(attempt("link", None), Err(RefitError::Outside { .. })));
    assert!(matches!(attempt("hard", None), Err(RefitError::HardLinked { .. })));
    attempt("link", Some(outside.path())).unwrap();
}
