//! Thins a model file: everything the messages declare is copied, long tensor data stays behind as a range of the file.
//!
//! before  `TensorProto { dims: [4096, 4096], raw_data: 64 MiB }`
//! after   `TensorProto { dims: [4096, 4096], file_range: { offset, length } }`
//!
//! The walk knows only the wire format and on which fields a tensor can sit, so peak memory is that of the graph and no
//! weight is read. Fields that nothing reads (documentation, training information) are dropped here.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::error::OnnxError;
use crate::messages::FileRange;

/// Tensor data longer than this stays in the file, in bytes.
pub const INLINE_DATA_BYTES: u64 = 1024;

/// Most that may remain of a file once long tensor data is taken out: the graph, and weights in the old fields that are
/// neither raw nor packed floats. Decoding multiplies it by a small factor.
pub const THIN_LIMIT_BYTES: u64 = 512 << 20;

/// Fields that nothing reads and that are this long, in bytes, are not touched; shorter ones count as read, so that a
/// model with a text for each node has not as many ranges.
const UNTOUCHED_BYTES: u64 = 1 << 20;

/// Levels of messages followed; prost stops at 100, and types nest a few more levels inside.
pub const DEPTH_LIMIT: usize = 88;

const FILE_RANGE_FIELD: u32 = 1000;
const RAW_DATA_FIELD: u32 = 9;

/// The messages on the way from a file's root to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Graph,
    Function,
    Node,
    Attribute,
    SparseTensor,
    Tensor,
}

/// What to do with one field.
enum Action {
    Walk(Kind),
    /// Long data becomes a range.
    Data,
    Copy,
    Drop,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Model => "ModelProto",
            Self::Graph => "GraphProto",
            Self::Function => "FunctionProto",
            Self::Node => "NodeProto",
            Self::Attribute => "AttributeProto",
            Self::SparseTensor => "SparseTensorProto",
            Self::Tensor => "TensorProto",
        }
    }

    /// The fields of each message that [`crate::messages`] declares; all others are dropped.
    fn action(self, field: u32) -> Action {
        match (self, field) {
            (Self::Model, 7) => Action::Walk(Self::Graph),
            (Self::Model, 25) => Action::Walk(Self::Function),
            (Self::Model, 1..=5 | 8 | 14 | 26) => Action::Copy,
            (Self::Graph, 1) => Action::Walk(Self::Node),
            (Self::Graph, 5) => Action::Walk(Self::Tensor),
            (Self::Graph, 15) => Action::Walk(Self::SparseTensor),
            (Self::Graph, 2 | 11..=13) => Action::Copy,
            (Self::Function, 7) => Action::Walk(Self::Node),
            (Self::Function, 11) => Action::Walk(Self::Attribute),
            (Self::Function, 1 | 4..=6 | 9 | 10 | 12 | 13) => Action::Copy,
            (Self::Node, 5) => Action::Walk(Self::Attribute),
            (Self::Node, 1..=4 | 7 | 8 | 10) => Action::Copy,
            (Self::Attribute, 5 | 10) => Action::Walk(Self::Tensor),
            (Self::Attribute, 6 | 11) => Action::Walk(Self::Graph),
            (Self::Attribute, 22 | 23) => Action::Walk(Self::SparseTensor),
            (Self::Attribute, 1..=4 | 7..=9 | 14 | 15 | 20 | 21) => Action::Copy,
            (Self::SparseTensor, 1 | 2) => Action::Walk(Self::Tensor),
            (Self::SparseTensor, 3) => Action::Copy,
            // Packed floats have the bytes of raw data.
            (Self::Tensor, 4 | RAW_DATA_FIELD | 10) => Action::Data,
            (Self::Tensor, 1..=3 | 5..=8 | 11 | 13 | 14) => Action::Copy,
            _ => Action::Drop,
        }
    }
}

/// A model file without long tensor data.
#[derive(Debug)]
pub struct Thinned {
    /// The encoding of a `ModelProto`.
    pub message: Vec<u8>,
    /// First byte and end of what was read of the file, ascending: what makes the message what it is.
    pub read: Vec<(u64, u64)>,
}

/// Reads the file at `path`, of `len` bytes, into the encoding of a `ModelProto` without long tensor data.
///
/// # Errors
/// When the file is no protocol buffer of a model, is cut, nests too deep, or leaves too much after thinning.
pub fn thin(path: &Path, file: &File, len: u64) -> Result<Thinned, OnnxError> {
    if len == 0 {
        return Err(OnnxError::Empty { path: path.to_owned() });
    }
    let mut walk = Walk {
        path,
        reader: BufReader::with_capacity(1 << 16, file),
        offset: 0,
        len,
        is_git_lfs_pointer: false,
        out: Vec::new(),
        read: Vec::new(),
        read_from: 0,
    };
    walk.look_at_start()?;
    walk.message(Kind::Model, len, 1)?;
    walk.read.push((walk.read_from, len));
    Ok(Thinned { message: walk.out, read: walk.read })
}

struct Walk<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    /// Of the next byte of the file.
    offset: u64,
    len: u64,
    is_git_lfs_pointer: bool,
    out: Vec<u8>,
    /// See [`Thinned`]; the last range is open and begins at `read_from`.
    read: Vec<(u64, u64)>,
    read_from: u64,
}

impl Walk<'_> {
    fn look_at_start(&mut self) -> Result<(), OnnxError> {
        let start = self.reader.fill_buf().map_err(|source| io_error(self.path, source))?;
        self.is_git_lfs_pointer = start.starts_with(b"version https://git-lfs");
        Ok(())
    }

    /// Walks a message that ends at byte `end` of the file.
    fn message(&mut self, kind: Kind, end: u64, depth: usize) -> Result<(), OnnxError> {
        if depth > DEPTH_LIMIT {
            return Err(OnnxError::TooDeep { path: self.path.to_owned(), offset: self.offset, limit: DEPTH_LIMIT });
        }
        let mut has_range = false;
        while self.offset < end {
            let at = self.offset;
            let key = self.varint(kind, end)?;
            let (Ok(field), wire_type) = (u32::try_from(key >> 3), key & 7) else {
                return Err(self.malformed(kind, at, format!("the field key {key:#x}")));
            };
            if field == 0 {
                return Err(self.malformed(kind, at, "field number 0".into()));
            }
            let action = kind.action(field);
            if kind == Kind::Model {
                self.check_model_field(at, field, wire_type, &action)?;
            }
            match wire_type {
                0 => {
                    let value = self.varint(kind, end)?;
                    if !matches!(action, Action::Drop) {
                        encode_key(field, WireType::Varint, &mut self.out);
                        encode_varint(value, &mut self.out);
                    }
                }
                1 => self.fixed(kind, field, WireType::SixtyFourBit, 8, end, &action)?,
                5 => self.fixed(kind, field, WireType::ThirtyTwoBit, 4, end, &action)?,
                2 => {
                    let length = self.varint(kind, end)?;
                    self.require(kind, at, length, end)?;
                    match action {
                        Action::Drop if length < UNTOUCHED_BYTES => self.skip(length)?,
                        Action::Drop => self.leave(length)?,
                        Action::Copy => self.copy_field(field, length)?,
                        Action::Walk(child) => self.child(field, child, length, depth)?,
                        Action::Data if length <= INLINE_DATA_BYTES => self.copy_field(field, length)?,
                        Action::Data => {
                            if has_range {
                                return Err(self.malformed(kind, at, "a second piece of one tensor's data".into()));
                            }
                            has_range = true;
                            let range = FileRange { offset: self.offset, length, field };
                            encode_key(FILE_RANGE_FIELD, WireType::LengthDelimited, &mut self.out);
                            self.out.extend_from_slice(&range.encode_length_delimited_to_vec());
                            self.leave(length)?;
                        }
                    }
                }
                other => return Err(self.malformed(kind, at, format!("wire type {other}"))),
            }
            if self.out.len() as u64 > THIN_LIMIT_BYTES {
                return Err(self.too_large());
            }
        }
        Ok(())
    }

    /// Walks a nested message, whose thinned length is known only afterwards.
    fn child(&mut self, field: u32, kind: Kind, length: u64, depth: usize) -> Result<(), OnnxError> {
        encode_key(field, WireType::LengthDelimited, &mut self.out);
        // Five bytes hold any length below 2^35; a varint may be longer than it needs to be.
        let prefix = self.out.len();
        self.out.extend_from_slice(&[0; 5]);
        self.message(kind, self.offset + length, depth + 1)?;
        let mut rest = self.out.len() - prefix - 5;
        for (index, byte) in self.out[prefix..prefix + 5].iter_mut().enumerate() {
            *byte = (rest & 0x7f) as u8 | if index < 4 { 0x80 } else { 0 };
            rest >>= 7;
        }
        Ok(())
    }

    fn fixed(
        &mut self,
        kind: Kind,
        field: u32,
        wire_type: WireType,
        length: u64,
        end: u64,
        action: &Action,
    ) -> Result<(), OnnxError> {
        self.require(kind, self.offset, length, end)?;
        if matches!(action, Action::Drop) {
            return self.skip(length);
        }
        encode_key(field, wire_type, &mut self.out);
        self.copy(length)
    }

    fn copy_field(&mut self, field: u32, length: u64) -> Result<(), OnnxError> {
        encode_key(field, WireType::LengthDelimited, &mut self.out);
        encode_varint(length, &mut self.out);
        self.copy(length)
    }

    fn copy(&mut self, length: u64) -> Result<(), OnnxError> {
        if length > THIN_LIMIT_BYTES.saturating_sub(self.out.len() as u64) {
            return Err(self.too_large());
        }
        let copied = (&mut self.reader).take(length).read_to_end(&mut self.out);
        let copied = copied.map_err(|source| io_error(self.path, source))? as u64;
        if copied < length {
            return Err(self.truncated(self.offset, length, copied));
        }
        self.offset += length;
        Ok(())
    }

    fn skip(&mut self, length: u64) -> Result<(), OnnxError> {
        // `length` is within the file, whose length fits an i64.
        self.reader.seek_relative(length as i64).map_err(|source| io_error(self.path, source))?;
        self.offset += length;
        Ok(())
    }

    /// Skips what does not decide the message.
    fn leave(&mut self, length: u64) -> Result<(), OnnxError> {
        self.read.push((self.read_from, self.offset));
        self.skip(length)?;
        self.read_from = self.offset;
        Ok(())
    }

    fn varint(&mut self, kind: Kind, end: u64) -> Result<u64, OnnxError> {
        let at = self.offset;
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            self.require(kind, at, 1, end)?;
            let mut byte = [0];
            self.reader.read_exact(&mut byte).map_err(|source| io_error(self.path, source))?;
            self.offset += 1;
            if shift == 63 && byte[0] > 1 {
                break;
            }
            value |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed(kind, at, "a number of more than 64 bits".into()))
    }

    /// Checks that `length` more bytes lie before `end`; `at` is where the field that wants them starts.
    fn require(&self, kind: Kind, at: u64, length: u64, end: u64) -> Result<(), OnnxError> {
        let left = end.saturating_sub(self.offset);
        if length <= left {
            return Ok(());
        }
        if end < self.len {
            return Err(self.malformed(
                kind,
                at,
                format!("a field of {length} bytes where its message has {left} left"),
            ));
        }
        Err(self.truncated(at, length, left))
    }

    fn truncated(&self, offset: u64, needed_bytes: u64, left_bytes: u64) -> OnnxError {
        if self.is_git_lfs_pointer || offset == 0 {
            return self.not_a_model(offset, format!("a field of {needed_bytes} bytes where {left_bytes} are left"));
        }
        OnnxError::Truncated { path: self.path.to_owned(), offset, needed_bytes, left_bytes }
    }

    /// A file of another kind betrays itself by its first field, or by a field of a model with another wire type.
    fn check_model_field(&self, at: u64, field: u32, wire_type: u64, action: &Action) -> Result<(), OnnxError> {
        let expected = if matches!(field, 1 | 5) { 0 } else { 2 };
        match action {
            Action::Drop if at == 0 => {
                Err(self.not_a_model(at, format!("field {field}, which models do not begin with")))
            }
            Action::Drop => Ok(()),
            Action::Walk(_) | Action::Data | Action::Copy if wire_type == expected => Ok(()),
            Action::Walk(_) | Action::Data | Action::Copy => {
                Err(self.not_a_model(at, format!("field {field} with wire type {wire_type} instead of {expected}")))
            }
        }
    }

    /// A mistake in the first fields of a file means that it is of another kind; later, that it is damaged.
    fn malformed(&self, kind: Kind, offset: u64, found: String) -> OnnxError {
        if kind == Kind::Model && !self.seen_model() {
            return self.not_a_model(offset, found);
        }
        OnnxError::Malformed { path: self.path.to_owned(), offset, inside: kind.name(), found }
    }

    /// Whether what was read so far begins as models do: with an IR version, the first field that writers put out.
    fn seen_model(&self) -> bool {
        matches!(self.out.as_slice(), [0x08, 1..=0x7f, ..]) && !self.is_git_lfs_pointer
    }

    fn not_a_model(&self, offset: u64, found: String) -> OnnxError {
        let hint = if self.is_git_lfs_pointer {
            "it is a Git LFS pointer: run `git lfs pull`"
        } else {
            "give the `.onnx` file that an exporter wrote"
        };
        OnnxError::NotAModel { path: self.path.to_owned(), offset, found, hint }
    }

    fn too_large(&self) -> OnnxError {
        OnnxError::GraphTooLarge { path: self.path.to_owned(), offset: self.offset, limit_bytes: THIN_LIMIT_BYTES }
    }
}

fn io_error(path: &Path, source: std::io::Error) -> OnnxError {
    OnnxError::Io { path: path.to_owned(), action: "read", source }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::load::{LoadOptions, load};
    use crate::messages::{AttributeType, ModelProto, TensorProto};
    use crate::samples::{attribute, body, graph, model, node, save, save_bytes, tensor, with};

    fn thin_bytes(bytes: &[u8]) -> Result<Vec<u8>, OnnxError> {
        let saved = save_bytes(bytes);
        thin(&saved.path, &File::open(&saved.path).unwrap(), bytes.len() as u64).map(|thinned| thinned.message)
    }

    fn with_initializer(initializer: TensorProto) -> ModelProto {
        let mut graph = graph(vec![node("Identity", &["x"], &["y"])]);
        graph.initializer.push(initializer);
        model(graph)
    }

    #[test]
    fn long_data_becomes_a_range_of_the_file_and_short_data_stays() {
        let long: Vec<f32> = (0..1000_u16).map(f32::from).collect();
        let mut proto = with_initializer(tensor("long", &[1000], &long));
        let constant = crate::messages::AttributeProto {
            t: Some(Box::new(tensor("", &[500], &long[..500]))),
            ..attribute("value", AttributeType::Tensor)
        };
        let inner = graph(vec![with(node("Constant", &[], &["y"]), constant)]);
        let parts = proto.graph.as_mut().unwrap();
        parts.node.push(with(node("If", &["x"], &["z"]), body("then_branch", inner)));
        parts.initializer.push(tensor("short", &[2], &[1.0, 2.0]));
        let bytes = proto.encode_to_vec();
        let thinned = thin_bytes(&bytes).unwrap();
        assert!(thinned.len() < 1000, "{}", thinned.len());
        let thinned = ModelProto::decode(thinned.as_slice()).unwrap().graph.unwrap();
        let inner = thinned.node[1].attribute[0].g.as_ref().unwrap().node[0].attribute[0].t.as_ref().unwrap();
        for (tensor, count) in [(&thinned.initializer[0], 1000), (&**inner, 500)] {
            let range = tensor.file_range.unwrap();
            let start = usize::try_from(range.offset).unwrap();
            let data = &bytes[start..start + usize::try_from(range.length).unwrap()];
            let expected: Vec<u8> = long[..count].iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!((data, range.field, &tensor.raw_data), (expected.as_slice(), 9, &None));
        }
        assert_eq!(thinned.initializer[1], proto.graph.unwrap().initializer[1]);
    }

    #[test]
    fn all_but_weights_and_long_texts_counts_as_read() {
        let data = vec![7; 2000];
        let mut proto = with_initializer(TensorProto { raw_data: Some(data.clone()), ..tensor("w", &[500], &[]) });
        proto.producer_name = "short".to_owned();
        let mut bytes = proto.encode_to_vec();
        // A text of the model, field 6, longer than what is read in passing; and a short one.
        for length in [UNTOUCHED_BYTES, 100] {
            encode_key(6, WireType::LengthDelimited, &mut bytes);
            encode_varint(length, &mut bytes);
            bytes.resize(bytes.len() + length as usize, b't');
        }
        let saved = save_bytes(&bytes);
        let read = thin(&saved.path, &File::open(&saved.path).unwrap(), bytes.len() as u64).unwrap().read;
        let left: Vec<&[u8]> = read.windows(2).map(|pair| &bytes[pair[0].1 as usize..pair[1].0 as usize]).collect();
        assert_eq!(left, [data.as_slice(), &vec![b't'; UNTOUCHED_BYTES as usize]]);
        assert_eq!((read[0].0, read[2].1), (0, bytes.len() as u64));
    }

    #[test]
    fn what_is_short_comes_through_unchanged() {
        let proto = with_initializer(tensor("w", &[2], &[1.0, 2.0]));
        let thinned = thin_bytes(&proto.encode_to_vec()).unwrap();
        assert_eq!(ModelProto::decode(thinned.as_slice()).unwrap(), proto);
    }

    #[test]
    fn a_range_written_in_the_file_itself_is_dropped() {
        let mut hostile = tensor("w", &[2], &[]);
        hostile.file_range = Some(FileRange { offset: 0, length: 8, field: 9 });
        let thinned = thin_bytes(&with_initializer(hostile).encode_to_vec()).unwrap();
        let thinned = ModelProto::decode(thinned.as_slice()).unwrap();
        assert_eq!(thinned.graph.unwrap().initializer[0].file_range, None);
    }

    #[test]
    fn packed_floats_are_a_range_too() {
        let long = TensorProto { float_data: vec![0.5; 1000], raw_data: None, ..tensor("w", &[1000], &[]) };
        let saved = save(&with_initializer(long));
        let loaded = load(&saved.path, &LoadOptions::default()).unwrap();
        let files = crate::source_files::WeightFiles::open(&loaded.files).unwrap();
        let mut last = [0; 4];
        files.read_tensor(&loaded.graph.initializers[0].tensor.source, 3996, &mut last).unwrap();
        assert_eq!(last, 0.5_f32.to_le_bytes());
    }

    #[test]
    fn every_cut_of_a_file_is_an_error() {
        let values: Vec<f32> = (0..400_u16).map(f32::from).collect();
        let bytes = with_initializer(tensor("w", &[400], &values)).encode_to_vec();
        for len in 0..bytes.len() {
            let saved = save_bytes(&bytes[..len]);
            let error = load(&saved.path, &LoadOptions::default()).unwrap_err();
            let is_expected = match error {
                OnnxError::Empty { .. } => len == 0,
                OnnxError::NotAModel { .. } => len < 4,
                OnnxError::Truncated { left_bytes, .. } => (left_bytes as usize) < len,
                // Cut between two fields.
                OnnxError::Missing { .. } => true,
                _ => false,
            };
            assert!(is_expected, "{len}: {error:?}");
        }
    }

    #[test]
    fn other_kinds_of_file_are_told_apart() {
        let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
        for (bytes, part) in [
            (&lfs[..], "git lfs pull"),
            (b"PK\x03\x04 a zip archive", "not an ONNX model"),
            (b"hello, world, this is text", "not an ONNX model"),
            (b"{\"json\": true}", "not an ONNX model"),
            (&tensor("x", &[1], &[1.0]).encode_to_vec(), "not an ONNX model"),
        ] {
            let error = thin_bytes(bytes).unwrap_err();
            assert!(matches!(error, OnnxError::NotAModel { .. }), "{error:?}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn damage_inside_is_located() {
        let mut bytes = with_initializer(tensor("w", &[2], &[1.0, 2.0])).encode_to_vec();
        let name = bytes.windows(8).position(|window| window == b"Identity").unwrap();
        // The length of `op_type`.
        bytes[name - 1] = 0x7f;
        match thin_bytes(&bytes).unwrap_err() {
            OnnxError::Malformed { offset, inside, .. } => assert_eq!((offset, inside), (name as u64 - 2, "NodeProto")),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let mut inner = graph(vec![]);
        for _ in 0..40 {
            inner = graph(vec![with(node("If", &["x"], &["y"]), body("then_branch", inner))]);
        }
        let error = thin_bytes(&model(inner).encode_to_vec()).unwrap_err();
        assert!(matches!(error, OnnxError::TooDeep { .. }), "{error:?}");
    }

    #[test]
    fn the_deepest_nesting_that_is_followed_also_decodes() {
        let mut inner = graph(vec![]);
        for _ in 0..(DEPTH_LIMIT - 4) / 3 {
            inner = graph(vec![with(node("If", &["x"], &["y"]), body("then_branch", inner))]);
        }
        let thinned = thin_bytes(&model(inner).encode_to_vec()).unwrap();
        ModelProto::decode(thinned.as_slice()).unwrap();
    }
}
