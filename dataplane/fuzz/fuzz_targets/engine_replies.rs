//! A lying replica: one of two answers the engine with anything. The engine closes that link or believes a
//! consistent lie, but never hangs, never crashes, and goes on with the other once it is the only member.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use dolmen_core::engine::{ClientTerms, EngineHandle, Options};
use dolmen_fuzz::{drain, frame, EmptyReplica, Input};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 16 << 20;

/// A read, a write, a flush, a read over two blocks, a trim, block status; then the client says goodbye.
fn requests() -> Vec<u8> {
    let mut out = Vec::new();
    for (cookie, (command, offset, length)) in [
        (0u16, 0u64, 4096u32),
        (1, 4096, 4096),
        (3, 0, 0),
        (0, 6144, 8192),
        (4, 0, 65536),
        (7, 0, 65536),
        (2, 0, 0),
    ]
    .into_iter()
    .enumerate()
    {
        out.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        out.extend_from_slice(&0u16.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&(cookie as u64).to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
        if command == 1 {
            out.extend(std::iter::repeat_n(7u8, length as usize));
        }
    }
    out
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let mut lies = Vec::new();
    while !input.is_empty() && lies.len() < 256 << 10 {
        lies.extend_from_slice(&frame(&mut input, 1, SIZE, true));
    }
    let engine = EngineHandle::start(Options { spin: false, ..Options::new(SIZE, 1, 2) }).unwrap();
    let mut honest = EmptyReplica::start();
    let (mut liar, liar_engine_end) = UnixStream::pair().unwrap();
    let lying = engine.attach_link(1, liar_engine_end.into(), true).unwrap();
    engine.attach_link(0, honest.engine_end.take().unwrap(), true).unwrap();
    engine.set_members(&[0, 1]).unwrap();
    engine.set_readers(&[0, 1]).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    engine
        .add_client(theirs.into(), ClientTerms { structured: true, meta_context: 1, read_only: false })
        .unwrap();
    ours.write_all(&requests()).unwrap();
    let _ = liar.write_all(&lies);
    let _ = liar.shutdown(Shutdown::Both);
    engine.detach_link(1, lying).unwrap();
    engine.set_readers(&[0]).unwrap();
    engine.set_members(&[0]).unwrap();
    drain(&mut ours);
    engine.stop();
});
