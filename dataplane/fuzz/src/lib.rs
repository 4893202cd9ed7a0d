//! What the fuzz targets share: a reader of fuzz input, frames with headers that check, a replica that
//! answers as it should, and one that answers whatever it is told.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use dolmen_core::checksum::{block_checksum, fragment_checksum};
use dolmen_core::frame::{kind, status, Header, HEADER_BYTES, REPLY};
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::OpenOptions;
use dolmen_core::replica::service::ReplicaService;

pub const BLOCK: usize = 4096;
/// Longer than any honest turn of a loop: past it something hangs, and that is a finding.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Takes numbers off the front of the input; zero when it is used up.
pub struct Input<'a> {
    rest: &'a [u8],
    frames: u64,
}

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { rest: data, frames: 0 }
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.rest.split_at(count.min(self.rest.len()));
        self.rest = rest;
        front
    }

    pub fn number(&mut self, bytes: usize) -> u64 {
        let mut word = [0u8; 8];
        let got = self.bytes(bytes);
        word[..got.len()].copy_from_slice(got);
        u64::from_le_bytes(word)
    }

    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// A frame whose header checks, whatever its fields say; or, seldom, bytes that are none.
pub fn frame(input: &mut Input<'_>, epoch: u64, size_bytes: u64, reply: bool) -> Vec<u8> {
    let shape = input.byte();
    if shape == 0xff {
        return input.bytes(64).to_vec();
    }
    input.frames += 1;
    let kinds = [
        kind::WRITE,
        kind::WRITE_PARTIAL,
        kind::READ,
        kind::WRITE_ZEROES,
        kind::TRIM,
        kind::FLUSH,
        kind::BLOCK_STATUS,
        kind::CACHE,
        kind::COMPLETED,
        kind::REPAIR,
        kind::REGION_SUMMARY,
        11,
        12,
        0,
    ];
    let mut header = Header {
        kind: kinds[usize::from(shape & 15) % kinds.len()] | if reply { REPLY } else { 0 },
        flags: u16::from(input.byte() & 7),
        request_id: if shape & 16 == 0 { input.frames } else { input.number(8) },
        epoch: if shape & 32 == 0 { epoch } else { input.number(2) },
        offset_bytes: input.number(2) * BLOCK as u64 % (size_bytes + 2 * BLOCK as u64),
        length_bytes: (input.number(1) as u32 + 1) * BLOCK as u32,
        payload_bytes: 0,
        status: if reply { u32::from(input.byte() & 7) } else { 0 },
    };
    if shape & 64 != 0 {
        header.offset_bytes = input.number(8);
        header.length_bytes = input.number(4) as u32;
    }
    let payload = payload(input, &header, reply);
    header.payload_bytes = payload.len() as u32;
    if shape & 128 != 0 {
        header.payload_bytes = header.payload_bytes.wrapping_add(input.number(1) as u32);
    }
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&payload);
    bytes
}

/// Mostly what the kind wants, with checksums that fit; sometimes anything.
fn payload(input: &mut Input<'_>, header: &Header, reply: bool) -> Vec<u8> {
    let shape = input.byte();
    if shape & 3 == 3 {
        return input.bytes(usize::from(shape)).to_vec();
    }
    let blocks = (header.length_bytes as usize / BLOCK).min(8);
    let first = header.offset_bytes / BLOCK as u64;
    let filled = vec![shape; BLOCK];
    let sums = |count: usize| {
        (0..count as u64)
            .flat_map(|index| block_checksum(first.wrapping_add(index), &filled).to_le_bytes())
            .collect::<Vec<u8>>()
    };
    match (header.kind & !REPLY, reply) {
        (kind::WRITE | kind::REPAIR, false) | (kind::READ, true) => {
            let mut bytes = sums(blocks);
            bytes.extend(std::iter::repeat_n(shape, blocks * BLOCK));
            bytes
        }
        (kind::WRITE_PARTIAL, false) => {
            let data = vec![shape; (header.length_bytes as usize).min(BLOCK)];
            let mut bytes = fragment_checksum(header.offset_bytes, &data).to_le_bytes().to_vec();
            bytes.extend_from_slice(&data);
            bytes
        }
        (kind::REGION_SUMMARY, true) => {
            (0..1024u64).flat_map(|index| (index % u64::from(shape.max(1))).to_le_bytes()).collect()
        }
        (kind::BLOCK_STATUS, true) => {
            let mut bytes = (blocks.max(1) as u32).to_le_bytes().to_vec();
            bytes.extend_from_slice(&u32::from(shape & 7).to_le_bytes());
            bytes
        }
        _ => Vec::new(),
    }
}

/// Reads until the other side closes. Returns how many bytes came. Panics when it never closes.
pub fn drain(socket: &mut UnixStream) -> usize {
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut total = 0;
    let mut buffer = [0u8; 65536];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return total,
            Ok(count) => total += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return total,
            Err(error) => panic!("the peer neither answers nor closes: {error}"),
        }
    }
}

/// A replica that answers every frame at once and holds nothing: reads are zeroes.
pub struct EmptyReplica {
    pub engine_end: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl EmptyReplica {
    pub fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let thread = std::thread::spawn(move || serve(ours));
        Self { engine_end: Some(theirs.into()), thread: Some(thread) }
    }
}

impl Drop for EmptyReplica {
    fn drop(&mut self) {
        self.engine_end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut socket: UnixStream) {
    let mut head = [0u8; HEADER_BYTES];
    while socket.read_exact(&mut head).is_ok() {
        let header = Header::decode(&head).expect("the engine sends good headers");
        let mut payload = vec![0; header.payload_bytes as usize];
        if socket.read_exact(&mut payload).is_err() {
            return;
        }
        if header.kind == kind::COMPLETED {
            continue;
        }
        let blocks = header.length_bytes as usize / BLOCK;
        let answer = match header.kind {
            kind::READ => vec![0; blocks * 8],
            kind::BLOCK_STATUS => [(blocks as u32).to_le_bytes(), 3u32.to_le_bytes()].concat(),
            _ => Vec::new(),
        };
        let mut reply = header.reply(status::OK);
        reply.payload_bytes = answer.len() as u32;
        let mut bytes = reply.encode().to_vec();
        bytes.extend_from_slice(&answer);
        if socket.write_all(&bytes).is_err() {
            return;
        }
    }
}

static SERVICE: OnceLock<(ReplicaService, tempfile::TempDir)> = OnceLock::new();

/// The process's one replica server, with the volume "v" open in epoch 1; in memory where the machine has it.
pub fn replica_service(size_bytes: u64) -> &'static ReplicaService {
    let start = || {
        let base = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
        let dir = tempfile::tempdir_in(base).unwrap();
        let path = dir.path().join("r");
        std::fs::create_dir(&path).unwrap();
        let service = ReplicaService::new().unwrap();
        service.create_store(&path, "head", size_bytes).unwrap();
        let options = OpenOptions::new(size_bytes, 1, Stamp { epoch: 1, version: 1 });
        service.open_store("v", path, &["head".to_owned()], options).unwrap();
        (service, dir)
    };
    &SERVICE.get_or_init(start).0
}
