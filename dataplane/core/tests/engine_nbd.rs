//! NBD against the running loop: commands, alignments, the table of refusals, hostile bytes.

mod engine_support;

use std::io::Write;

use engine_support::*;
use proptest::prelude::*;

const SIZE: u64 = 16 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

#[test]
fn what_is_written_is_read_back_and_stands_on_every_replica() {
    let rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    for (offset, length) in [(0u64, 4096usize), (8192, 65536), (1 << 20, 3 << 20), (5000, 10), (4095, 4098)] {
        let data = pattern(offset, length);
        assert_eq!(client.write(offset, &data), 0);
        assert!(client.read(offset, length as u32).expect("readable") == data, "{offset} {length}");
    }
    assert_eq!(client.command(FLUSH, 0, 0, 0), 0);
    for block in 0..(5 << 20) / 4096 {
        let first = rig.replicas[0].store().block(block);
        assert!(rig.replicas[1].store().block(block) == first);
        assert!(rig.replicas[2].store().block(block) == first);
    }
    let stats = rig.engine.stats().expect("open");
    assert_eq!((stats.counters.writes, stats.counters.flushes, stats.in_flight), (5, 1, 0));
    assert_eq!(stats.counters.latency_write.buckets.iter().sum::<u64>(), 5);
}

#[test]
fn simple_replies_carry_the_whole_data_even_across_frames() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client_with(false, 0, false);
    let data = pattern(1, 2_500_000);
    assert_eq!(client.write(777, &data), 0);
    assert!(client.read_simple(777, data.len() as u32).expect("readable") == data);
    assert!(client.read_simple(SIZE - 5000, 5000).expect("readable").iter().all(|byte| *byte == 0));
    assert_eq!(client.read_simple(0, 0), Ok(Vec::new()));
    assert_eq!(client.read_simple(SIZE, 1), Err(EINVAL));
}

#[test]
fn a_read_that_must_not_be_fragmented_is_one_chunk() {
    let rig = Rig::new(SIZE, 1);
    let mut client = rig.client();
    let data = pattern(2, 3 << 20);
    assert_eq!(client.write(512, &data), 0);
    client.send(READ, DF, 0, 6 << 20, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.flags), (1, 1));
    assert!(chunk.body[8..8 + 512].iter().all(|byte| *byte == 0));
    assert!(chunk.body[8 + 512..8 + 512 + data.len()] == data);
    assert_eq!(chunk.body.len(), 8 + (6 << 20));
}

#[test]
fn one_block_comes_as_one_chunk_and_a_long_hole_as_a_hole() {
    let rig = Rig::new(SIZE, 1);
    let mut client = rig.client();
    assert_eq!(client.write(4096, &pattern(3, 4096)), 0);
    client.send(READ, 0, 4096, 4096, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.flags, chunk.body.len()), (1, 1, 4104));
    client.send(READ, 0, 8192, 65536, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.flags, chunk.body.len()), (2, 1, 12));
    assert_eq!(client.read(0, 0), Ok(Vec::new()));
}

#[test]
fn the_largest_requests_go_through() {
    let rig = Rig::new(64 << 20, 2);
    let mut client = rig.client();
    let data = pattern(4, 32 << 20);
    let mut writer = client.stream.try_clone().expect("a clone");
    let bytes = data.clone();
    // A client reads while it writes, or both sides wait for each other.
    let sender = std::thread::spawn(move || {
        writer.write_all(&request_bytes(WRITE, FUA, 77, 4096, 32 << 20)).expect("sent");
        writer.write_all(&bytes).expect("sent");
    });
    assert_eq!(client.simple(), (77, 0));
    sender.join().expect("sent");
    assert!(client.read(4096, 32 << 20).expect("readable") == data);
}

#[test]
fn zeroes_and_trim_touch_no_neighbour() {
    let rig = Rig::new(SIZE, 2);
    let mut client = rig.client();
    let mut model = pattern(5, SIZE as usize);
    for (index, part) in model.chunks(1 << 20).enumerate() {
        assert_eq!(client.write((index << 20) as u64, part), 0);
    }
    for (offset, length) in [(100usize, 50usize), (4000, 200), (8192, 4096), (12000, 30000), (1, 6 << 20)] {
        assert_eq!(client.command(WRITE_ZEROES, 1 << 4, offset as u64, length as u32), 0);
        model[offset..offset + length].fill(0);
    }
    // Only whole blocks of a TRIM go; its edges stay.
    assert_eq!(client.command(TRIM, 0, 9_000_000, 1_000_000), 0);
    let (first, last) = (9_000_000usize.div_ceil(4096) * 4096, 10_000_000 / 4096 * 4096);
    model[first..last].fill(0);
    assert_eq!(client.command(TRIM, FUA, 4096 * 3000 + 1, 4094), 0);
    assert!(client.read(0, SIZE as u32).expect("readable") == model);
}

#[test]
fn block_status_tells_holes_and_data() {
    let rig = Rig::new(SIZE, 1);
    let mut client = rig.client_with(true, 7, false);
    assert_eq!(client.write(8192, &pattern(6, 8192)), 0);
    client.send(BLOCK_STATUS, 0, 100, 40_000, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, chunk.flags), (5, 1));
    let words: Vec<u32> = chunk.body.chunks(4).map(be_u32).collect();
    assert_eq!(words, [7, 8092, 3, 8192, 0, 40_100 - 16_384, 3]);
    client.send(BLOCK_STATUS, 1 << 3, 100, 40_000, &[]);
    let words: Vec<u32> = client.chunk().body.chunks(4).map(be_u32).collect();
    assert_eq!(words, [7, 8092, 3]);
    client.send(BLOCK_STATUS, 0, 0, 0, &[]);
    let chunk = client.chunk();
    assert_eq!((chunk.kind, be_u32(&chunk.body[0..4])), (0x8001, EINVAL));
}

#[test]
fn a_refused_request_is_answered_and_the_connection_goes_on() {
    let mut rig = Rig::new(SIZE, 1);
    let mut client = rig.client();
    let cookie = client.send(WRITE, 0, SIZE - 1, 2, &[1, 2]);
    assert_eq!(client.simple(), (cookie, ENOSPC));
    assert_eq!(client.command(WRITE_ZEROES, 0, SIZE, 1), ENOSPC);
    assert_eq!(client.command(TRIM, 0, SIZE, 1), EINVAL);
    assert_eq!(client.command(CACHE, 0, SIZE, 1), EINVAL);
    assert_eq!(client.command(99, 0, 0, 1), EINVAL);
    assert_eq!(client.command(TRIM, 1 << 9, 0, 1), EINVAL);
    assert_eq!(client.read(SIZE, 1), Err(EINVAL));
    assert_eq!(client.read(0, (32 << 20) + 1), Err(EINVAL));
    assert_eq!(client.read(u64::MAX - 1, 4096), Err(EINVAL));
    let too_much = vec![9; (32 << 20) + 512];
    assert_eq!(client.write(0, &too_much), EINVAL);
    assert_eq!(client.command(CACHE, 0, 0, 1 << 20), 0);
    for command in [WRITE, TRIM, WRITE_ZEROES, CACHE, FLUSH] {
        assert_eq!(client.command(command, FUA, 4096, 0), 0, "length 0 of {command}");
    }
    assert_eq!(client.write(0, &[7; 512]), 0);
    let mut reader = rig.client_with(true, 1, true);
    assert_eq!(reader.write(0, &[1; 4096]), EPERM);
    assert_eq!(reader.command(TRIM, 0, 0, 4096), EPERM);
    assert_eq!(reader.command(FLUSH, 0, 0, 0), 0);
    assert_eq!(reader.read(0, 512).expect("readable"), [7; 512]);
    reader.send(DISC, 0, 0, 0, &[]);
    reader.assert_closed();
    rig.event("client_closed", |event| {
        matches!(event, dolmen_core::engine::Event::ClientClosed { reason, .. } if reason == "disconnected")
    });
}

#[test]
fn the_volume_grows_under_its_clients() {
    let rig = Rig::new(SIZE, 1);
    let mut client = rig.client();
    assert_eq!(client.write(SIZE, &[1; 4096]), ENOSPC);
    rig.engine.set_size(SIZE * 2).expect("grown");
    rig.settle();
    assert_eq!(client.write(SIZE, &[1; 4096]), 0);
    assert!(rig.engine.set_size(SIZE).is_err());
}

#[test]
fn bytes_that_are_not_nbd_close_that_connection_alone() {
    let rig = Rig::new(SIZE, 2);
    let mut good = rig.client();
    for seed in 0..50 {
        let mut bad = rig.client();
        let _ = bad.stream.write_all(&pattern(seed, 64 + seed as usize * 300));
        bad.assert_closed();
    }
    // Cut short: in the header, and in a payload.
    for cut in [1, 27, 28, 29, 5000] {
        let mut client = rig.client();
        let mut bytes = request_bytes(WRITE, 0, 1, 0, 1 << 20);
        bytes.extend_from_slice(&pattern(9, 1 << 16));
        client.stream.write_all(&bytes[..cut]).expect("sent");
        client.stream.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut rest = Vec::new();
        use std::io::Read;
        let _ = client.stream.read_to_end(&mut rest);
    }
    assert_eq!(good.write(0, &pattern(1, 4096)), 0);
    assert!(good.read(0, 4096).expect("readable") == pattern(1, 4096));
    let stats = rig.engine.stats().expect("open");
    assert_eq!((stats.clients, stats.in_flight), (1, 0));
}

#[test]
fn requests_with_random_fields_are_answered_or_refused_and_nothing_is_left() {
    let rig = Rig::new(SIZE, 2);
    for seed in 0..60u64 {
        let mut client = rig.client_with(seed % 2 == 0, (seed % 3) as u32, seed % 5 == 0);
        let mut bytes = Vec::new();
        for (index, field) in pattern(seed, 40 * 16).chunks(16).enumerate() {
            let wide = u64::from_le_bytes(field[0..8].try_into().expect("8 bytes"));
            let command = if field[8] < 200 { u16::from(field[8] % 9) } else { u16::from(field[8]) << 3 };
            if command == DISC {
                continue;
            }
            let flags = if field[9] < 128 { u16::from(field[9] % 32) } else { 0 };
            let offset = if field[10] < 200 { wide % SIZE } else { wide };
            let small = u32::from(field[11]) * 37;
            let length = if field[12] < 220 || command == WRITE { small } else { wide as u32 };
            bytes.extend(request_bytes(command, flags, index as u64, offset, length));
            if command == WRITE {
                bytes.extend(pattern(seed, length as usize));
            }
        }
        bytes.extend(request_bytes(DISC, 0, 99, 0, 0));
        let mut reader = client.stream.try_clone().expect("a clone");
        let replies = std::thread::spawn(move || {
            let mut all = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut all).map(|count| count > 0)
        });
        client.stream.write_all(&bytes).expect("sent");
        assert!(replies.join().expect("no panic").expect("closed in order"), "seed {seed}");
    }
    let stats = rig.engine.stats().expect("open");
    assert_eq!((stats.clients, stats.in_flight, stats.waiting), (0, 0, 0));
}

#[test]
fn a_client_that_does_not_read_costs_bounded_memory_and_disturbs_nobody() {
    let rig = Rig::new(64 << 20, 1);
    let mut greedy = rig.client();
    let data = pattern(8, 1 << 20);
    for index in 0..32u64 {
        assert_eq!(greedy.write(index << 20, &data), 0);
    }
    let mut sender = greedy.stream.try_clone().expect("a clone");
    sender.set_nonblocking(true).expect("set");
    // Ask for 40 GB and read nothing; requests past the limit stay in the socket.
    for cookie in 0..1300u64 {
        if sender.write_all(&request_bytes(READ, 0, 1000 + cookie, 0, 32 << 20)).is_err() {
            break;
        }
    }
    let mut other = rig.client();
    for index in 0..200u64 {
        assert_eq!(other.write(index * 4096, &pattern(index, 4096)), 0);
        assert!(other.read(index * 4096, 4096).expect("readable") == pattern(index, 4096));
    }
    let stats = rig.engine.stats().expect("open");
    assert!(stats.in_flight_bytes <= 100 << 20, "{}", stats.in_flight_bytes);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let rig = Rig::new(SIZE, 3);
    let mut client = rig.client();
    let mut writer = client.stream.try_clone().expect("a clone");
    let count = 5000u64;
    let sender = std::thread::spawn(move || {
        for cookie in 0..count {
            let mut bytes = request_bytes(WRITE, 0, cookie, cookie % 4096 * 4096, 4096);
            bytes.extend_from_slice(&pattern(cookie, 4096));
            writer.write_all(&bytes).expect("sent");
        }
    });
    let mut seen = vec![false; count as usize];
    for _ in 0..count {
        let (cookie, error) = client.simple();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true));
    }
    sender.join().expect("sent");
    for block in 0..4096u64 {
        let last = if block + 4096 < count { block + 4096 } else { block };
        let read = client.read(block * 4096, 4096).expect("readable");
        assert!(read == pattern(last, 4096), "{block}");
    }
}

#[test]
fn an_error_in_one_part_is_the_error_of_the_request() {
    let rig = Rig::new(SIZE, 1);
    let mut client = rig.client();
    assert_eq!(client.write(0, &pattern(1, 2 << 20)), 0);
    rig.replicas[0].store().damaged.insert(300);
    assert_eq!(client.read(0, 2 << 20), Err(EIO));
    let mut simple = rig.client_with(false, 0, false);
    assert_eq!(simple.read_simple(0, 2 << 20), Err(EIO));
    assert!(simple.read_simple(0, 1 << 20).expect("readable") == pattern(1, 1 << 20));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize),
    Zeroes(u64, usize),
    Trim(u64, usize),
    Read(u64, usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = (0u64..(3 << 20), prop_oneof![1usize..10_000, 1usize..(1 << 20)]);
    let step = (place, 0u8..5).prop_map(|((offset, length), what)| match what {
        0 | 1 => Step::Write(offset, length),
        2 => Step::Zeroes(offset, length),
        3 => Step::Trim(offset, length),
        _ => Step::Read(offset, length, length % 2 == 0),
    });
    proptest::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_alignment_behaves_like_an_array_of_bytes(steps in steps()) {
        const LENGTH: usize = 4 << 20;
        let rig = Rig::new(LENGTH as u64, 2);
        let mut client = rig.client();
        let mut simple = rig.client_with(false, 0, false);
        let mut model = vec![0u8; LENGTH];
        for (seed, step) in steps.iter().enumerate() {
            match step {
                Step::Write(offset, length) => {
                    let data = pattern(seed as u64 + 1, *length);
                    prop_assert_eq!(client.write(*offset, &data), 0);
                    model[*offset as usize..*offset as usize + length].copy_from_slice(&data);
                }
                Step::Zeroes(offset, length) => {
                    prop_assert_eq!(client.command(WRITE_ZEROES, 0, *offset, *length as u32), 0);
                    model[*offset as usize..*offset as usize + length].fill(0);
                }
                Step::Trim(offset, length) => {
                    prop_assert_eq!(client.command(TRIM, 0, *offset, *length as u32), 0);
                    let first = (*offset as usize).div_ceil(BLOCK) * BLOCK;
                    let last = (*offset as usize + length) / BLOCK * BLOCK;
                    if first < last {
                        model[first..last].fill(0);
                    }
                }
                Step::Read(offset, length, by_chunks) => {
                    let client = if *by_chunks { &mut client } else { &mut simple };
                    let read = if *by_chunks {
                        client.read(*offset, *length as u32)
                    } else {
                        client.read_simple(*offset, *length as u32)
                    };
                    let wanted = &model[*offset as usize..*offset as usize + length];
                    prop_assert!(read.expect("readable") == wanted);
                }
            }
        }
        prop_assert!(client.read(0, LENGTH as u32).expect("readable") == model);
        for block in 0..(LENGTH / BLOCK) as u64 {
            let wanted = &model[block as usize * BLOCK..][..BLOCK];
            prop_assert!(rig.replicas[1].store().block(block) == wanted);
        }
    }
}
