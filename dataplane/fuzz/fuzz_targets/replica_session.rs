//! A lying engine: frames with good headers and any content on a data or a peer session of a replica server.
//! It answers or closes; afterwards every block of the store verifies.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::OpenOptions;
use dolmen_core::replica::service::{ReplicaService, Role};
use dolmen_fuzz::{drain, frame, Input};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 16 << 20;
/// Verifying reads the whole store.
const RUNS_PER_VERIFY: u64 = 64;

static RUNS: AtomicU64 = AtomicU64::new(0);

static SERVICE: OnceLock<(ReplicaService, tempfile::TempDir)> = OnceLock::new();

fn service() -> &'static ReplicaService {
    &SERVICE
        .get_or_init(|| {
            let base = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
            let dir = tempfile::tempdir_in(base).unwrap();
            let path = dir.path().join("r");
            std::fs::create_dir(&path).unwrap();
            let service = ReplicaService::new().unwrap();
            service.create_store(&path, "head", SIZE).unwrap();
            let options = OpenOptions::new(SIZE, 1, Stamp { epoch: 1, version: 1 });
            service.open_store("v", path, &["head".to_owned()], options).unwrap();
            (service, dir)
        })
        .0
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let role = if input.byte() & 1 == 0 { Role::Data } else { Role::Peer };
    let mut bytes = Vec::new();
    while !input.is_empty() && bytes.len() < 1 << 20 {
        bytes.extend_from_slice(&frame(&mut input, 1, SIZE, false));
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let service = service();
    service.attach_session("v", theirs.into(), 1, role).unwrap();
    let mut writer = ours.try_clone().unwrap();
    let feeder = std::thread::spawn(move || {
        let _ = writer.write_all(&bytes);
        let _ = writer.shutdown(Shutdown::Write);
    });
    drain(&mut ours);
    feeder.join().unwrap();
    let _ = service.poll_events();
    if RUNS.fetch_add(1, Ordering::Relaxed) % RUNS_PER_VERIFY != 0 {
        return;
    }
    let verified = service.verify("v", 0, (SIZE >> 22) as u32).unwrap();
    assert_eq!(verified.damaged_count, 0, "frames of a peer damaged the store");
});
