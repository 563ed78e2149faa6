//! Unpacks a deflated stream while it is read.

use std::io::{self, BufRead, Read};

use miniz_oxide::inflate::stream::{InflateState, inflate};
use miniz_oxide::{DataFormat, MZError, MZFlush, MZStatus};

/// What a deflated stream unpacks to.
pub(super) struct Inflate<R> {
    packed: R,
    state: Box<InflateState>,
    ended: bool,
}

impl<R> Inflate<R> {
    pub(super) fn new(packed: R) -> Self {
        Self { packed, state: InflateState::new_boxed(DataFormat::Raw), ended: false }
    }
}

impl<R: BufRead> Read for Inflate<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while !self.ended && !out.is_empty() {
            let packed = self.packed.fill_buf()?;
            let step = inflate(&mut self.state, packed, out, MZFlush::None);
            self.packed.consume(step.bytes_consumed);
            match step.status {
                Ok(MZStatus::StreamEnd) => self.ended = true,
                // It wants more of what comes next, or more room.
                Ok(_) | Err(MZError::Buf) => {}
                Err(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "its deflated bytes are damaged")),
            }
            if step.bytes_written > 0 {
                return Ok(step.bytes_written);
            }
            // At the end of what is packed; nothing else stops it.
            if step.bytes_consumed == 0 && !self.ended {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}
