//! CPU time of the replica's loop thread per request. Not a test: run it by hand with
//! `cargo test --release -p dolmen-core --test store_speed -- --ignored --nocapture`.

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use common::{block, write_payload, VOLUME};
use dolmen_core::frame::{kind, Header, HEADER_BYTES};
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::OpenOptions;
use dolmen_core::replica::service::{ReplicaService, Role};
use dolmen_core::simdisk::Dice;

const SIZE: u64 = 1 << 30;
const DEPTH: usize = 32;

/// User and system time of the loop thread so far, in microseconds: from its schedstat.
fn loop_cpu_us() -> f64 {
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        if std::fs::read_to_string(path.join("comm")).unwrap().trim() == "replica-loop" {
            let stat = std::fs::read_to_string(path.join("schedstat")).unwrap();
            return stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1000.0;
        }
    }
    panic!("no loop thread")
}

struct Load {
    socket: TcpStream,
    id: u64,
    dice: Dice,
}

impl Load {
    /// One write, one flush, again and again.
    fn run_flushed(&mut self, what: &str, count: usize) {
        let started = Instant::now();
        let data = block(5);
        for _ in 0..count {
            let offset = (self.dice.roll(SIZE as usize / 4096) * 4096) as u64;
            for (kind, payload) in [(kind::WRITE, write_payload(offset, &data)), (kind::FLUSH, Vec::new())] {
                self.id += 1;
                let length_bytes = if kind == kind::FLUSH { 0 } else { 4096 };
                let payload_bytes = payload.len() as u32;
                let header = Header {
                    kind,
                    request_id: self.id,
                    epoch: 1,
                    offset_bytes: offset,
                    length_bytes,
                    payload_bytes,
                    ..Header::default()
                };
                self.socket.write_all(&[&header.encode()[..], &payload].concat()).unwrap();
                let mut reply = [0; HEADER_BYTES];
                self.socket.read_exact(&mut reply).unwrap();
                assert_eq!(Header::decode(&reply).unwrap().status, 0);
            }
        }
        println!("{what:32} {:9.0}/s", count as f64 / started.elapsed().as_secs_f64());
    }

    /// `count` requests, `depth` in flight; sends and receives in batches as an engine does.
    fn run(&mut self, what: &str, kind: u8, length: usize, sequential: bool, count: usize, depth: usize) {
        let (started, cpu) = (Instant::now(), loop_cpu_us());
        let blocks = length / 4096;
        let data: Vec<u8> = (0..blocks as u64).flat_map(block).collect();
        let mut sent = 0;
        let mut got = 0;
        let mut out = Vec::new();
        let mut input = vec![0; 4 << 20];
        let mut held = 0;
        while got < count {
            out.clear();
            while sent < count && sent - got < depth {
                let slots = SIZE as usize / length;
                let slot = if sequential { sent % slots } else { self.dice.roll(slots) };
                let offset = (slot * length) as u64;
                let payload = if kind == kind::WRITE { write_payload(offset, &data) } else { Vec::new() };
                self.id += 1;
                let header = Header {
                    kind,
                    request_id: self.id,
                    epoch: 1,
                    offset_bytes: offset,
                    length_bytes: if kind == kind::FLUSH { 0 } else { length as u32 },
                    payload_bytes: payload.len() as u32,
                    ..Header::default()
                };
                out.extend_from_slice(&header.encode());
                out.extend_from_slice(&payload);
                sent += 1;
            }
            self.socket.write_all(&out).unwrap();
            held += self.socket.read(&mut input[held..]).unwrap();
            let mut at = 0;
            while let Some(bytes) = input[at..held].first_chunk::<HEADER_BYTES>() {
                let header = Header::decode(bytes).unwrap();
                let end = at + HEADER_BYTES + header.payload_bytes as usize;
                if end > held {
                    break;
                }
                assert_eq!(header.status, 0);
                at = end;
                got += 1;
            }
            input.copy_within(at..held, 0);
            held -= at;
        }
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{what:32} {:9.0}/s {:8.0} MiB/s  loop {:6.2} us/request",
            count as f64 / seconds,
            (count * length) as f64 / seconds / 1048576.0,
            (loop_cpu_us() - cpu) / count as f64
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn measure() {
    let base = std::env::var("SPEED_DIR").unwrap_or_else(|_| "/var/tmp".to_owned());
    let dir = tempfile::tempdir_in(base).unwrap();
    let service = ReplicaService::new().unwrap();
    service.create_store(dir.path(), "head", SIZE).unwrap();
    let options = OpenOptions::new(SIZE, 1, Stamp { epoch: 1, version: 1 });
    service.open_store(VOLUME, dir.path().to_owned(), &["head".to_owned()], options).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    service.attach_session(VOLUME, listener.accept().unwrap().0.into(), 1, Role::Data).unwrap();
    let mut load = Load { socket, id: 0, dice: Dice(7) };
    load.run("fill, 1 MiB QD8", kind::WRITE, 1 << 20, true, 1024, 8);
    load.run("write 1 MiB QD8", kind::WRITE, 1 << 20, true, 1024, 8);
    for _ in 0..std::env::var("COLD_ROUNDS").map_or(0, |rounds| rounds.parse().unwrap()) {
        service.flush(VOLUME).unwrap();
        let data = std::fs::File::open(dir.path().join("head/data")).unwrap();
        rustix::fs::fadvise(&data, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        load.run("cold randread 4 KiB QD1", kind::READ, 4096, false, 20_000, 1);
        rustix::fs::fadvise(&data, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        load.run("cold randread 4 KiB QD32", kind::READ, 4096, false, 50_000, DEPTH);
        load.run("cold read 1 MiB QD8", kind::READ, 1 << 20, true, 200, 8);
    }
    service.flush(VOLUME).unwrap();
    load.run_flushed("randwrite 4 KiB QD1 + FLUSH", 300);
    for _ in 0..2 {
        load.run("randwrite 4 KiB QD32", kind::WRITE, 4096, false, 100_000, DEPTH);
        load.run("randwrite 4 KiB QD1", kind::WRITE, 4096, false, 20_000, 1);
        load.run("write 4 KiB QD32", kind::WRITE, 4096, true, 100_000, DEPTH);
        load.run("randread 4 KiB QD32", kind::READ, 4096, false, 100_000, DEPTH);
        load.run("randread 4 KiB QD1", kind::READ, 4096, false, 20_000, 1);
        load.run("read 1 MiB QD8", kind::READ, 1 << 20, true, 1024, 8);
    }
}
