//! A lying engine: frames with good headers and any content on a data or a peer session of a replica server.
//! It answers or closes; afterwards every block of the store verifies.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};

use dolmen_core::replica::service::Role;
use dolmen_fuzz::{drain, frame, replica_service, Input};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 16 << 20;
/// Verifying reads the whole store.
const RUNS_PER_VERIFY: u64 = 64;

static RUNS: AtomicU64 = AtomicU64::new(0);

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let role = if input.byte() & 1 == 0 { Role::Data } else { Role::Peer };
    let mut bytes = Vec::new();
    while !input.is_empty() && bytes.len() < 1 << 20 {
        bytes.extend_from_slice(&frame(&mut input, 1, SIZE, false));
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let service = replica_service(SIZE);
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
