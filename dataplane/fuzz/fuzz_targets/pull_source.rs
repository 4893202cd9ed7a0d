//! A lying source of a resync: anything in answer to REGION_SUMMARY and READ. The pull ends, with an error or
//! with blocks that verify.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use dolmen_core::replica::pull::PullOptions;
use dolmen_fuzz::{frame, replica_service, Input};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 16 << 20;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut lies = Vec::new();
    while !input.is_empty() && lies.len() < 256 << 10 {
        lies.extend_from_slice(&frame(&mut input, 1, SIZE, true));
    }
    let service = replica_service(SIZE);
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
