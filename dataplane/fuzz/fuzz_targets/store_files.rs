//! Damaged files: bytes of `regions`, `map` or `data` changed anywhere, the file cut short, then opened. It is an
//! error or a store; what a region that was clean reads without complaint was once written there, or is zeroes.
//! (A region that was being written when the replica died believes its data where they differ: FORMAT.md,
//! "Recovery".)
#![no_main]

use std::fs::OpenOptions as FileOptions;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use dolmen_core::checksum::block_checksum;
use dolmen_core::frame::{kind, Header, HEADER_BYTES};
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::OpenOptions;
use dolmen_core::replica::service::{ReplicaService, Role};
use dolmen_fuzz::{Input, BLOCK, PATIENCE};
use libfuzzer_sys::fuzz_target;

use std::io::{Read, Write};

const SIZE: u64 = 8 << 20;
const REGION_BLOCKS: u64 = 1024;
const FILES: [&str; 3] = ["regions", "head/map", "head/data"];

/// Ids of frames grow within a session; here over all of them.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

static TEMPLATE: OnceLock<tempfile::TempDir> = OnceLock::new();

fn base() -> &'static str {
    if Path::new("/dev/shm").is_dir() {
        "/dev/shm"
    } else {
        "/tmp"
    }
}

fn open(service: &ReplicaService, path: &Path, epoch: u64) -> bool {
    let options = OpenOptions::new(SIZE, epoch, Stamp { epoch, version: 1 });
    service.open_store("v", path.to_owned(), &["head".to_owned()], options).is_ok()
}

fn call(socket: &mut UnixStream, epoch: u64, kind: u8, offset: u64, payload: &[u8]) -> (Header, Vec<u8>) {
    let length_bytes = if kind == kind::FLUSH { 0 } else { BLOCK as u32 };
    let header = Header {
        kind,
        request_id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        epoch,
        offset_bytes: offset,
        length_bytes,
        payload_bytes: payload.len() as u32,
        ..Header::default()
    };
    socket.write_all(&header.encode()).unwrap();
    socket.write_all(payload).unwrap();
    let mut head = [0; HEADER_BYTES];
    socket.read_exact(&mut head).unwrap();
    let reply = Header::decode(&head).unwrap();
    let mut answer = vec![0; reply.payload_bytes as usize];
    socket.read_exact(&mut answer).unwrap();
    (reply, answer)
}

fn attach(service: &ReplicaService, epoch: u64) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    service.attach_session("v", theirs.into(), epoch, Role::Data).unwrap();
    ours
}

/// Half of the blocks 0 to 7 and 1020 to 1027 are written; region 0 is clean, region 1 is not.
fn content(block: u64) -> Vec<u8> {
    vec![block as u8 ^ 0x5a; BLOCK]
}

fn written() -> impl Iterator<Item = u64> {
    (0..8).chain(1020..1028).filter(|block| block % 2 == 0)
}

fn template() -> &'static Path {
    TEMPLATE
        .get_or_init(|| {
            let dir = tempfile::tempdir_in(base()).unwrap();
            let path = dir.path().join("r");
            std::fs::create_dir(&path).unwrap();
            let service = ReplicaService::new().unwrap();
            service.create_store(&path, "head", SIZE).unwrap();
            assert!(open(&service, &path, 1));
            let mut socket = attach(&service, 1);
            for block in written() {
                let data = content(block);
                let payload = [&block_checksum(block, &data).to_le_bytes()[..], &data].concat();
                assert_eq!(call(&mut socket, 1, kind::WRITE, block * BLOCK as u64, &payload).0.status, 0);
                if block == 1022 {
                    service.clean_all("v").unwrap();
                }
            }
            drop(socket);
            service.shutdown();
            dir
        })
        .path()
}

fn copy(to: &Path) {
    std::fs::create_dir_all(to.join("head")).unwrap();
    for file in FILES {
        std::fs::copy(template().join("r").join(file), to.join(file)).unwrap();
    }
}

fn damage(input: &mut Input<'_>, path: &Path) {
    let file = FileOptions::new().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let place = input.number(3) % length.max(1);
    match input.byte() % 4 {
        0 => file.set_len(place).unwrap(),
        1 => {
            // Block for block, as a disk that mixes up two sectors.
            let other = input.number(3) % length.max(1);
            let (mut a, mut b) = ([0; 512], [0; 512]);
            let (at_a, at_b) = (place / 512 * 512, other / 512 * 512);
            let _ = file.read_at(&mut a, at_a);
            let _ = file.read_at(&mut b, at_b);
            file.write_at(&b, at_a).unwrap();
            file.write_at(&a, at_b).unwrap();
        }
        2 => file.write_all_at(&vec![0; usize::from(input.byte()) * 16], place).unwrap(),
        _ => file.write_all_at(input.bytes(16), place).unwrap(),
    }
}

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir_in(base()).unwrap();
    let path = dir.path().join("r");
    copy(&path);
    let mut input = Input::new(data);
    // One file: a clean region's record and its data are two witnesses, and one of them is to be believed.
    let file = path.join(FILES[usize::from(input.byte()) % FILES.len()]);
    while !input.is_empty() {
        damage(&mut input, &file);
    }
    let service = ReplicaService::new().unwrap();
    if !open(&service, &path, 2) {
        return;
    }
    let mut socket = attach(&service, 2);
    for block in (0..8).chain(1020..1028) {
        let (reply, answer) = call(&mut socket, 2, kind::READ, block * BLOCK as u64, &[]);
        if reply.status == 0 && answer.len() > 8 && block < REGION_BLOCKS {
            assert!(answer[8..] == content(block)[..], "block {block} reads as what was never written there");
        }
    }
    drop(socket);
});
