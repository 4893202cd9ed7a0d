//! A session's two buffers. Both are plain memory with two cursors: nothing is zeroed twice, and
//! replies are built where they are sent from.

use crate::frame::HEADER_BYTES;
use crate::limits::FRAME_PAYLOAD_BYTES_MAX;

/// What a session's input buffer starts with: dozens of small frames per read.
const IN_BYTES_START: usize = 256 * 1024;
/// One frame of the largest size.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + FRAME_PAYLOAD_BYTES_MAX as usize;
/// An output buffer that grew past this is given back once it is empty.
const OUT_BYTES_KEPT: usize = 2 * FRAME_BYTES_MAX;

/// Received bytes: `start..end` is not parsed yet.
pub struct InBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for InBuffer {
    fn default() -> Self {
        Self { bytes: vec![0; IN_BYTES_START], start: 0, end: 0 }
    }
}

impl InBuffer {
    /// Stands in for a buffer that is lent out. Holds no memory.
    pub fn hollow() -> Self {
        Self { bytes: Vec::new(), start: 0, end: 0 }
    }

    pub fn unparsed(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start);
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Where to receive. `frame_bytes`: the size of the frame at the front, if its header is here.
    pub fn space(&mut self, frame_bytes: Option<usize>) -> &mut [u8] {
        let held = self.end - self.start;
        let wanted = frame_bytes.unwrap_or(HEADER_BYTES);
        if wanted > self.bytes.len() {
            self.bytes.resize(FRAME_BYTES_MAX, 0);
        }
        if self.start + wanted > self.bytes.len() || self.end == self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            self.start = 0;
            self.end = held;
        }
        // The rest of a large frame is received alone: what follows it then starts at the front of the
        // buffer, and nothing is ever moved.
        let stop = match frame_bytes {
            Some(frame) if frame.saturating_sub(held) > IN_BYTES_START / 4 => self.start + frame,
            _ => self.bytes.len(),
        };
        &mut self.bytes[self.end..stop]
    }

    pub fn received(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.bytes.len());
    }
}

/// Replies: `start..end` is not sent yet.
#[derive(Default)]
pub struct OutBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl OutBuffer {
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub fn sent(&mut self, count: usize) {
        assert!(count <= self.end - self.start);
        self.start += count;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if self.bytes.len() > OUT_BYTES_KEPT {
                self.bytes = Vec::new();
            }
        }
    }

    /// Room for `count` bytes after what is there, with any content. Part of the output only after
    /// `append_reserved`.
    pub fn reserve(&mut self, count: usize) -> &mut [u8] {
        if self.end + count > self.bytes.len() && self.start > 0 {
            // A peer that never lets the buffer run empty must not make it grow.
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end + count > self.bytes.len() {
            self.bytes.resize((self.end + count).max(self.bytes.len() * 3 / 2), 0);
        }
        &mut self.bytes[self.end..self.end + count]
    }

    pub fn append_reserved(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.bytes.len());
    }

    pub fn append(&mut self, data: &[u8]) {
        self.reserve(data.len()).copy_from_slice(data);
        self.append_reserved(data.len());
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
