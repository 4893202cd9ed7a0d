//! What can go wrong in a store. The kinds are those of `NativeError` in
//! dataplane/binding/_dataplane.pyi; replica/io_path.py translates them.

use std::fmt;
use std::io;

use rustix::io::Errno;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    NoSpace,
    IoError,
    Damaged,
    StaleEpoch,
    BadRequest,
    NotFound,
    Unreachable,
    SourceFailed,
    Closed,
}

impl ErrorKind {
    /// The word Python sees. Never changes.
    pub fn word(self) -> &'static str {
        match self {
            ErrorKind::NoSpace => "no_space",
            ErrorKind::IoError => "io_error",
            ErrorKind::Damaged => "damaged",
            ErrorKind::StaleEpoch => "stale_epoch",
            ErrorKind::BadRequest => "bad_request",
            ErrorKind::NotFound => "not_found",
            ErrorKind::Unreachable => "unreachable",
            ErrorKind::SourceFailed => "source_failed",
            ErrorKind::Closed => "closed",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    pub kind: ErrorKind,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, StoreError>;

impl StoreError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// An error of the file system, with what was being done.
    pub fn from_io(what: &str, error: &io::Error) -> Self {
        let kind = match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => ErrorKind::NoSpace,
            _ => ErrorKind::IoError,
        };
        Self::new(kind, format!("{what}: {error}"))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.kind.word(), self.message)
    }
}

impl std::error::Error for StoreError {}
