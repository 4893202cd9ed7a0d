//! A hostile NBD client in the transmission phase: any requests, any bytes, cut anywhere. The engine answers
//! or closes, keeps nothing of it, and serves the next client.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Instant;

use dolmen_core::engine::{ClientTerms, EngineHandle, Options};
use dolmen_fuzz::{drain, EmptyReplica, Input, PATIENCE};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 64 << 20;

static ENGINE: OnceLock<EngineHandle> = OnceLock::new();

fn engine() -> &'static EngineHandle {
    ENGINE.get_or_init(|| {
        let engine = EngineHandle::start(Options { spin: false, ..Options::new(SIZE, 1, 1) }).unwrap();
        let mut replica = EmptyReplica::start();
        engine.attach_link(0, replica.engine_end.take().unwrap(), true).unwrap();
        engine.set_members(&[0]).unwrap();
        engine.set_readers(&[0]).unwrap();
        std::mem::forget(replica); // lives as long as the process
        engine
    })
}

fn request(input: &mut Input<'_>, out: &mut Vec<u8>) {
    let shape = input.byte();
    if shape == 0xff {
        out.extend_from_slice(input.bytes(40));
        return;
    }
    let command = u16::from(shape & 7);
    let flags = u16::from(input.byte() & 31);
    let cookie = input.number(1);
    let (mut offset, mut length) = (input.number(2) * 512, (input.number(1) as u32) * 512);
    if shape & 8 != 0 {
        (offset, length) = (input.number(8), input.number(4) as u32);
    }
    if shape & 16 != 0 {
        (offset, length) = (offset % SIZE + input.number(1), length % 65536 + input.number(1) as u32);
    }
    out.extend_from_slice(&0x2560_9513u32.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    if command == 1 {
        // Sometimes the payload breaks off: the end of the stream comes in the middle of it.
        let payload = if shape & 32 != 0 { length / 2 } else { length };
        out.extend(std::iter::repeat_n(shape, payload.min(1 << 20) as usize));
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let terms = input.byte();
    let mut bytes = Vec::new();
    while !input.is_empty() && bytes.len() < 4 << 20 {
        request(&mut input, &mut bytes);
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let terms = ClientTerms {
        structured: terms & 1 != 0,
        meta_context: u32::from(terms >> 1 & 1),
        read_only: terms & 4 != 0,
    };
    engine().add_client(theirs.into(), terms).unwrap();
    let mut writer = ours.try_clone().unwrap();
    let feeder = std::thread::spawn(move || {
        let _ = writer.write_all(&bytes);
        let _ = writer.shutdown(Shutdown::Write);
    });
    drain(&mut ours);
    drop(ours);
    feeder.join().unwrap();
    let _ = engine().poll_events();
    // What was asked of the replica before the end is still answered.
    let waited = Instant::now();
    while engine().stats().unwrap().in_flight_bytes > 0 {
        assert!(waited.elapsed() < PATIENCE, "memory of a client that is gone is kept");
        std::thread::yield_now();
    }
});
