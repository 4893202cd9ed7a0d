//! NBD's transmission phase as tables: what a request may ask, how replies look on the wire.
//! Pure. Negotiation is Python (engine/negotiation.py); both follow the NBD protocol document.
//!
//! Where the document leaves a choice, ours is:
//!
//! | case | answer |
//! |---|---|
//! | unknown command or flag, flag on a command that does not know it | EINVAL, connection kept |
//! | FUA on any command | accepted, without meaning where nothing is written |
//! | length 0 | success with nothing done; BLOCK_STATUS: EINVAL |
//! | READ past 32 MiB | EINVAL (EOVERFLOW with DF) |
//! | WRITE past 32 MiB | its payload is read and dropped, then EINVAL |
//! | beyond the end | ENOSPC for WRITE and WRITE_ZEROES, EINVAL for the rest |
//! | a refused WRITE | its payload is read and dropped, connection kept |

use crate::limits::NBD_REQUEST_BYTES_MAX;

pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const REQUEST_BYTES: usize = 28;
pub const SIMPLE_REPLY_BYTES: usize = 16;
pub const CHUNK_BYTES: usize = 20;

pub mod flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

pub mod errno {
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
}

pub mod chunk {
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
}

impl Command {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => return None,
        })
    }

    /// Flags this command knows. FUA is known everywhere.
    fn flags_known(self, structured: bool) -> u16 {
        flag::FUA
            | match self {
                Command::Read if structured => flag::DF,
                Command::WriteZeroes => flag::NO_HOLE | flag::FAST_ZERO,
                Command::BlockStatus => flag::REQ_ONE,
                _ => 0,
            }
    }

    fn modifies(self) -> bool {
        matches!(self, Command::Write | Command::Trim | Command::WriteZeroes)
    }
}

/// A request as it stands on the wire. `command` is None for a number we do not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRequest {
    pub flags: u16,
    pub command: Option<Command>,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

/// The stream is not NBD, or lost its place: close it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMagic;

impl RawRequest {
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, BadMagic> {
        if be_u32(bytes, 0) != REQUEST_MAGIC {
            return Err(BadMagic);
        }
        Ok(RawRequest {
            flags: u16::from_be_bytes([bytes[4], bytes[5]]),
            command: Command::from_wire(u16::from_be_bytes([bytes[6], bytes[7]])),
            cookie: be_u64(bytes, 8),
            offset: be_u64(bytes, 16),
            length: be_u32(bytes, 24),
        })
    }

    /// Bytes that follow on the wire. Only WRITE has a payload, and has it even when it is refused.
    pub fn payload_bytes(&self) -> u64 {
        if self.command == Some(Command::Write) {
            u64::from(self.length)
        } else {
            0
        }
    }
}

/// What was negotiated, and what may change: how far the volume reaches.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    pub size_bytes: u64,
    pub read_only: bool,
    pub structured: bool,
    pub meta_context: u32,
}

/// May this be done? `Err` is the error value for the reply.
pub fn check(request: &RawRequest, terms: &Terms) -> Result<Command, u32> {
    let Some(command) = request.command else {
        return Err(errno::EINVAL);
    };
    if command == Command::Disconnect {
        return Ok(command);
    }
    if terms.read_only && command.modifies() {
        return Err(errno::EPERM);
    }
    if request.flags & !command.flags_known(terms.structured) != 0 {
        return Err(errno::EINVAL);
    }
    if command == Command::Flush {
        return Ok(command); // offset and length are reserved: not looked at
    }
    let length = u64::from(request.length);
    if length > NBD_REQUEST_BYTES_MAX && matches!(command, Command::Read | Command::Write) {
        return Err(if request.flags & flag::DF != 0 { errno::EOVERFLOW } else { errno::EINVAL });
    }
    if command == Command::BlockStatus && (length == 0 || terms.meta_context == 0) {
        return Err(errno::EINVAL);
    }
    match request.offset.checked_add(length) {
        Some(end) if end <= terms.size_bytes => Ok(command),
        _ if matches!(command, Command::Write | Command::WriteZeroes) => Err(errno::ENOSPC),
        _ => Err(errno::EINVAL),
    }
}

pub fn simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Header of one chunk of a structured reply; `length` bytes follow.
pub fn chunk_header(cookie: u64, flags: u16, kind: u16, length: u32) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    bytes[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..20].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The last chunk of a reply that failed, without a message.
pub fn error_chunk(cookie: u64, error: u32) -> [u8; CHUNK_BYTES + 6] {
    let mut bytes = [0; CHUNK_BYTES + 6];
    bytes[..CHUNK_BYTES].copy_from_slice(&chunk_header(cookie, chunk::FLAG_DONE, chunk::ERROR, 6));
    bytes[CHUNK_BYTES..CHUNK_BYTES + 4].copy_from_slice(&error.to_be_bytes());
    bytes
}

fn be_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn be_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;

    fn answer(command: u16, flags: u16, offset: u64, length: u32, read_only: bool) -> Result<Command, u32> {
        let request = RawRequest { flags, command: Command::from_wire(command), cookie: 1, offset, length };
        let terms = Terms { size_bytes: SIZE, read_only, structured: true, meta_context: 7 };
        check(&request, &terms)
    }

    #[test]
    fn the_table_of_refusals_is_kept() {
        use errno::*;
        let big = NBD_REQUEST_BYTES_MAX as u32 + 1;
        // command, flags, offset, length, read_only, error
        let rows: &[(u16, u16, u64, u32, bool, u32)] = &[
            (0, 0, SIZE, 1, false, EINVAL),
            (1, 0, SIZE, 1, false, ENOSPC),
            (4, 0, SIZE - 1, 2, false, EINVAL),
            (6, 0, SIZE - 1, 2, false, ENOSPC),
            (5, 0, SIZE, 1, false, EINVAL),
            (7, 0, SIZE, 1, false, EINVAL),
            (7, 0, 0, 0, false, EINVAL),
            (0, 0, u64::MAX, 2, false, EINVAL),
            (1, 0, u64::MAX, 2, false, ENOSPC),
            (0, 0, 0, big, false, EINVAL),
            (0, flag::DF, 0, big, false, EOVERFLOW),
            (1, 0, 0, big, false, EINVAL),
            (1, 0, 0, 1, true, EPERM),
            (4, 0, 0, 1, true, EPERM),
            (6, 0, 0, 1, true, EPERM),
            (8, 0, 0, 1, false, EINVAL),
            (999, 0, 0, 1, false, EINVAL),
            (0, 1 << 5, 0, 1, false, EINVAL),
            (0, flag::REQ_ONE, 0, 1, false, EINVAL),
            (1, flag::DF, 0, 1, false, EINVAL),
            (4, flag::NO_HOLE, 0, 1, false, EINVAL),
        ];
        for row in rows {
            assert_eq!(answer(row.0, row.1, row.2, row.3, row.4), Err(row.5), "{row:?}");
        }
    }

    #[test]
    fn fua_is_accepted_on_every_command_and_the_end_of_the_volume_can_be_reached() {
        for command in [0u16, 1, 4, 5, 6, 7] {
            assert!(answer(command, flag::FUA, SIZE - 512, 512, false).is_ok(), "{command}");
        }
        assert!(answer(3, flag::FUA, u64::MAX, u32::MAX, true).is_ok());
        assert!(answer(6, flag::FUA | flag::NO_HOLE | flag::FAST_ZERO, 0, 1, false).is_ok());
    }
}
