//! A lying source of a resync: anything in answer to REGION_SUMMARY and READ. The pull ends, with an error or
//! with blocks that verify.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::pull::PullOptions;
use dolmen_core::replica::recovery::OpenOptions;
use dolmen_core::replica::service::ReplicaService;
use dolmen_fuzz::{frame, Input};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 16 << 20;

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
    let mut lies = Vec::new();
    while !input.is_empty() && lies.len() < 256 << 10 {
        lies.extend_from_slice(&frame(&mut input, 1, SIZE, true));
    }
    let service = service();
    service.begin_resync("v", &[0, 1]).unwrap();
    let (mut source, target) = UnixStream::pair().unwrap();
    let feeder = std::thread::spawn(move || {
        let _ = source.write_all(&lies);
        let _ = source.shutdown(Shutdown::Write);
        source
    });
    let _ = service.pull_regions("v", target.into(), 1, &[0, 1], PullOptions::default());
    drop(feeder.join().unwrap());
    let _ = service.poll_events();
    let verified = service.verify("v", 0, (SIZE >> 22) as u32).unwrap();
    assert_eq!(verified.damaged_count, 0, "a lying source damaged the store");
});
