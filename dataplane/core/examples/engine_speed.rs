//! What the engine's loop alone costs: one client, three replicas in memory over TCP, all in this
//! process. `cargo run --release --example engine_speed -- [seconds] [case]`
//!
//! The CPU of the loop thread per request is the figure to watch: replicas here only verify nothing
//! and answer, so IOPS say little. About 14 µs per 4 KiB write at queue depth 32 leaves room for the
//! goal of bench/goals.py, which is a ratio to the ceiling program.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dolmen_core::checksum::block_checksum;
use dolmen_core::engine::{ClientTerms, EngineHandle, Options};
use dolmen_core::frame::{kind, Header, HEADER_BYTES};

const SIZE: u64 = 1 << 30;
const BLOCK: usize = 4096;

/// Answers every frame at once; reads give one fixed block, with the checksum of its place.
fn replica(mut stream: TcpStream) {
    stream.set_nodelay(true).expect("nodelay");
    let data = vec![0xA5u8; 1 << 20];
    let mut input = vec![0u8; 4 << 20];
    let mut have = 0;
    let mut output = Vec::with_capacity(4 << 20);
    loop {
        match stream.read(&mut input[have..]) {
            Ok(count) if count > 0 => have += count,
            _ => return,
        }
        let mut at = 0;
        while have - at >= HEADER_BYTES {
            let head: &[u8; HEADER_BYTES] = input[at..at + HEADER_BYTES].try_into().expect("48 bytes");
            let header = Header::decode(head).expect("a frame");
            let whole = HEADER_BYTES + header.payload_bytes as usize;
            if have - at < whole {
                break;
            }
            at += whole;
            if header.kind == kind::COMPLETED {
                continue;
            }
            let mut reply = header.reply(0);
            if header.kind == kind::READ {
                let count = header.length_bytes as usize / BLOCK;
                reply.payload_bytes = (count * (8 + BLOCK)) as u32;
                output.extend_from_slice(&reply.encode());
                let first = header.offset_bytes / BLOCK as u64;
                for index in 0..count as u64 {
                    output.extend_from_slice(&block_checksum(first + index, &data[..BLOCK]).to_le_bytes());
                }
                output.extend_from_slice(&data[..count * BLOCK]);
            } else {
                output.extend_from_slice(&reply.encode());
            }
        }
        input.copy_within(at..have, 0);
        have -= at;
        if stream.write_all(&output).is_err() {
            return;
        }
        output.clear();
    }
}

struct Case {
    name: &'static str,
    write: bool,
    length: usize,
    depth: usize,
}

/// CPU nanoseconds of the loop thread so far.
fn loop_cpu_ns() -> u64 {
    for task in std::fs::read_dir("/proc/self/task").expect("tasks").flatten() {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.trim() == "engine-loop" {
            let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            return stat.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0);
        }
    }
    0
}

fn request(command: u16, cookie: u64, offset: u64, length: usize, out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(&0x2560_9513u32.to_be_bytes());
    out.extend_from_slice(&0u16.to_be_bytes());
    out.extend_from_slice(&command.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
    out.extend_from_slice(&(length as u32).to_be_bytes());
    if command == 1 {
        out.extend_from_slice(&data[..length]);
    }
}

/// Keep `depth` requests in flight (simple replies); returns requests, seconds, loop CPU.
fn run(case: &Case, stream: &mut UnixStream, time: Duration) -> (u64, f64, u64) {
    let data = vec![0x5Au8; case.length];
    let mut input = vec![0u8; 4 << 20];
    let (mut have, mut done, mut state) = (0usize, 0u64, 88_172_645_463_325_252u64);
    let reply_bytes = if case.write { 16 } else { 16 + case.length };
    let mut output = Vec::new();
    let (began, cpu_began) = (Instant::now(), loop_cpu_ns());
    let mut to_send = case.depth;
    let mut in_flight = 0usize;
    loop {
        for _ in 0..to_send {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let offset = state % (SIZE / case.length as u64) * case.length as u64;
            request(u16::from(case.write), done, offset, case.length, &mut output, &data);
        }
        in_flight += to_send;
        stream.write_all(&output).expect("sent");
        output.clear();
        if in_flight == 0 {
            break;
        }
        have += stream.read(&mut input[have..]).expect("replies");
        let count = have / reply_bytes;
        input.copy_within(count * reply_bytes..have, 0);
        have -= count * reply_bytes;
        done += count as u64;
        in_flight -= count;
        to_send = if began.elapsed() < time { count } else { 0 };
    }
    (done, began.elapsed().as_secs_f64(), loop_cpu_ns() - cpu_began)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let seconds: f64 = args.next().and_then(|text| text.parse().ok()).unwrap_or(2.0);
    let wanted = args.next().unwrap_or_default();
    let cases = [
        Case { name: "randwrite 4k qd1", write: true, length: 4096, depth: 1 },
        Case { name: "randwrite 4k qd32", write: true, length: 4096, depth: 32 },
        Case { name: "randread 4k qd1", write: false, length: 4096, depth: 1 },
        Case { name: "randread 4k qd32", write: false, length: 4096, depth: 32 },
        Case { name: "write 1m qd8", write: true, length: 1 << 20, depth: 8 },
        Case { name: "read 1m qd8", write: false, length: 1 << 20, depth: 8 },
    ];
    for spin in [true, false] {
        let options = Options { spin, ..Options::new(SIZE, 1, 3) };
        let engine = EngineHandle::start(options).expect("a loop");
        for slot in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let address = listener.local_addr().expect("bound");
            let ours = TcpStream::connect(address).expect("connected");
            let (theirs, _) = listener.accept().expect("accepted");
            std::thread::spawn(move || replica(theirs));
            engine.attach_link(slot, OwnedFd::from(ours), true).expect("attached");
        }
        engine.set_members(&[0, 1, 2]).expect("open");
        engine.set_readers(&[0, 1, 2]).expect("open");
        engine.set_lease(&[(vec![0, 1, 2], 2)]).expect("open");
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let terms = ClientTerms { structured: false, meta_context: 0, read_only: false };
        engine.add_client(OwnedFd::from(theirs), terms).expect("open");
        for case in cases.iter().filter(|case| case.name.contains(&wanted)) {
            run(case, &mut ours, Duration::from_secs_f64(seconds / 4.0));
            let (done, elapsed, cpu_ns) = run(case, &mut ours, Duration::from_secs_f64(seconds));
            println!(
                "spin {:5}  {:18}  {:8.0}/s  {:7.1} µs each  loop CPU {:6.2} µs each ({:3.0} %)",
                spin,
                case.name,
                done as f64 / elapsed,
                elapsed * 1e6 / done as f64,
                cpu_ns as f64 / 1000.0 / done as f64,
                cpu_ns as f64 / 1e7 / elapsed,
            );
        }
    }
}
