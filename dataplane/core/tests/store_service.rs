//! A replica server as its peers meet it: sessions, epochs, resync, damage.

mod common;

use common::{block, blocks, create, open, open_as, write_payload, Client, BLOCK, REGION, SIZE, VOLUME};
use dolmen_core::frame::{flag, kind, status, Header, HEADER_BYTES};
use dolmen_core::replica::error::ErrorKind;
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::handle::Event;
use dolmen_core::replica::service::{ReplicaService, Role};

#[test]
fn what_is_written_is_read_back_and_outlives_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    assert_eq!(client.write(0, &blocks(0..256)), status::OK);
    assert_eq!(client.write(REGION - BLOCK as u64, &blocks([7, 8])), status::OK);
    assert_eq!(client.write_partial(512, &[9; 1000]), status::OK);
    assert_eq!(client.zero(4096, 8192), status::OK);
    let mut expected = blocks(0..256);
    expected[512..1512].fill(9);
    expected[4096..12288].fill(0);
    assert_eq!(client.read(0, 1 << 20).1, expected);
    assert_eq!(client.read(REGION - 4096, 8192).1, blocks([7, 8]));
    assert_eq!(client.flush(), status::OK);
    drop(client);
    service.shutdown();

    let service = ReplicaService::new().unwrap();
    let opened = open(&service, &path, 2);
    assert_eq!(opened.blocks_recomputed + opened.blocks_dropped + opened.regions_damaged, 0);
    assert!(opened.dirty_regions >= 2);
    let mut client = Client::attach(&service, 2, Role::Data);
    assert_eq!(client.read(0, 1 << 20).1, expected);
    let verified = service.verify(VOLUME, 0, 16).unwrap();
    assert_eq!((verified.blocks_verified, verified.damaged_count), (256, 0));
}

#[test]
fn a_pipeline_of_overlapping_frames_is_applied_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    // The first write must wait for its region's mark; the read behind it must not overtake.
    for region in 0..8 {
        let offset = region * REGION;
        let first = client.send(kind::WRITE, 0, offset, 4096, &write_payload(offset, &block(1)));
        let read = client.send(kind::READ, 0, offset, 4096, &[]);
        let second = client.send(kind::WRITE, flag::FUA, offset, 4096, &write_payload(offset, &block(2)));
        assert_eq!(client.reply_to(first).0.status, status::OK);
        assert_eq!(client.reply_to(read).1[8..], block(1));
        assert_eq!(client.reply_to(second).0.status, status::OK);
        assert_eq!(client.read(offset, 4096).1, block(2));
    }
}

#[test]
fn a_fenced_engine_can_neither_read_nor_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut old = Client::attach(&service, 1, Role::Data);
    assert_eq!(old.write(0, &block(1)), status::OK);
    assert_eq!(old.call(kind::LEASE, 0, 0, 0, &[]).0, status::OK);
    service.set_epoch(VOLUME, 2).unwrap();
    let mut rest = Vec::new();
    assert_eq!(std::io::Read::read_to_end(&mut old.socket, &mut rest).unwrap(), 0, "the session is closed");
    let refused = service.set_epoch(VOLUME, 1).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::StaleEpoch);
    let mut new = Client::attach(&service, 2, Role::Data);
    new.epoch = 1;
    assert_eq!(new.write(0, &block(3)), status::STALE_EPOCH);
    assert_eq!(new.call(kind::LEASE, 0, 0, 0, &[]).0, status::STALE_EPOCH);
    new.epoch = 2;
    assert_eq!(new.read(0, 4096).1, block(1));
}

#[test]
fn bad_frames_are_refused_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    let good = write_payload(0, &block(1));
    let mut wrong = good.clone();
    wrong[100] ^= 1;
    for (kind, offset, length, payload, expected) in [
        (kind::WRITE, 0, 4096, &wrong[..], status::BAD_CHECKSUM),
        (kind::WRITE, 4096, 4096, &good[..], status::BAD_CHECKSUM),
        (kind::WRITE, 0, 8192, &good[..], status::BAD_REQUEST),
        (kind::WRITE, 1, 4096, &good[..], status::BAD_REQUEST),
        (kind::WRITE, SIZE, 4096, &good[..], status::OUT_OF_RANGE),
        (kind::WRITE, u64::MAX - 4095, 4096, &good[..], status::OUT_OF_RANGE),
        (kind::READ, 0, 0, &[], status::BAD_REQUEST),
        (kind::READ, SIZE - 4096, 8192, &[], status::OUT_OF_RANGE),
        (kind::READ, 0, 2 << 20, &[], status::BAD_REQUEST),
        (kind::READ, 0, 4096, &[1], status::BAD_REQUEST),
        (kind::TRIM, 0, (64 << 20) + 4096, &[], status::BAD_REQUEST),
        (kind::TRIM, u64::MAX - 4095, 8192, &[], status::OUT_OF_RANGE),
        (kind::WRITE_PARTIAL, 4000, 200, &[0; 208], status::BAD_REQUEST),
        (kind::WRITE_PARTIAL, 0, 8, &[0; 16], status::BAD_CHECKSUM),
        (kind::REGION_SUMMARY, 4096, 4096, &[], status::BAD_REQUEST),
        (kind::LEASE, 0, 0, &[1], status::BAD_REQUEST),
        (77, 0, 4096, &[], status::BAD_REQUEST),
    ] {
        assert_eq!(client.call(kind, 0, offset, length, payload).0, expected, "kind {kind} at {offset}");
    }
    let mut peer = Client::attach(&service, 1, Role::Peer);
    assert_eq!(peer.write(0, &block(1)), status::BAD_REQUEST);
    assert_eq!(peer.flush(), status::BAD_REQUEST);
    assert_eq!(peer.call(kind::LEASE, 0, 0, 0, &[]).0, status::BAD_REQUEST);
    assert_eq!(peer.read(0, 4096).0, [0]);
    assert!(service.dirty_regions(VOLUME).unwrap().is_empty());
}

#[test]
fn a_frame_that_is_sent_again_ends_its_session_and_is_not_applied() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut engine = Client::attach(&service, 1, Role::Data);
    assert_eq!(engine.write(0, &block(1)), status::OK);
    assert_eq!(engine.write(0, &block(2)), status::OK);
    let payload = write_payload(0, &block(1));
    let again = Header {
        kind: kind::WRITE,
        request_id: 1,
        epoch: 1,
        length_bytes: BLOCK as u32,
        payload_bytes: payload.len() as u32,
        ..Header::default()
    };
    engine.socket.write_all(&[&again.encode()[..], &payload].concat()).unwrap();
    let mut rest = Vec::new();
    assert!(!matches!(engine.socket.read_to_end(&mut rest), Ok(1..)), "no answer");
    let mut next = Client::attach(&service, 1, Role::Data);
    assert_eq!(next.read(0, 4096).1, block(2));
}

#[test]
fn garbage_closes_its_own_session_only() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut good = Client::attach(&service, 1, Role::Data);
    let mut hostile = Client::attach(&service, 1, Role::Peer);
    hostile.socket.write_all(&[0x55; 4096]).unwrap();
    let mut rest = [0; 1];
    assert!(!matches!(hostile.socket.read(&mut rest), Ok(1..)));
    let events = service.poll_events();
    assert_eq!(good.write(0, &block(1)), status::OK);
    assert!(matches!(&events[..], [Event::SessionClosed { reason, .. }] if reason.contains("bad frame")));
}

#[test]
fn a_flipped_bit_is_found_at_read_and_repaired_only_then() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    assert_eq!(client.write(0, &blocks([1, 2, 3])), status::OK);
    let repair = |client: &mut Client, tag| {
        client.call(kind::REPAIR, 0, 4096, 4096, &write_payload(4096, &block(tag))).0
    };
    assert_eq!(repair(&mut client, 9), status::OK);
    assert_eq!(client.read(4096, 4096).1, block(2), "a good block is never repaired");
    let file = std::fs::OpenOptions::new().write(true).open(path.join("head/data")).unwrap();
    file.write_at(&[0xff], 5000).unwrap();
    let (entries, data) = client.read(0, 3 * 4096);
    assert_eq!(entries[1], 2);
    assert_eq!(data[..4096], block(1));
    assert_eq!(data[8192..], block(3));
    assert_eq!(client.write_partial(4096, &[1; 512]), status::IO_ERROR);
    assert_eq!(service.verify(VOLUME, 0, 1).unwrap().damaged, [1]);
    assert_eq!(repair(&mut client, 2), status::OK);
    assert_eq!(client.read(0, 3 * 4096).1, blocks([1, 2, 3]));
    let damaged = |event: &Event| matches!(event, Event::BlockDamaged { block_index: 1, .. });
    assert!(service.poll_events().iter().any(damaged));
    let stats: std::collections::HashMap<_, _> = service.stats(VOLUME).unwrap().into_iter().collect();
    assert_eq!(stats["repairs"], 1);
}

/// What Python does around pull_regions.
fn pull(
    service: &ReplicaService,
    from: &str,
    to: &str,
    regions: &[u32],
) -> dolmen_core::replica::pull::Pulled {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    service.attach_session(from, theirs.into(), 1, Role::Peer).unwrap();
    service.pull_regions(to, ours.into(), 1, regions, Default::default()).unwrap()
}

#[test]
fn a_resync_makes_regions_equal_and_spares_fresh_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let service = ReplicaService::new().unwrap();
    create(&service, &a);
    create(&service, &b);
    open_as(&service, "a", &a, 1);
    open_as(&service, "b", &b, 1);
    let mut source = Client::attach_to(&service, "a", 1, Role::Data);
    let mut target = Client::attach_to(&service, "b", 1, Role::Data);
    for client in [&mut source, &mut target] {
        assert_eq!(client.write(0, &blocks(0..256)), status::OK);
    }
    assert_eq!(source.write(40960, &blocks(500..600)), status::OK);
    assert_eq!(source.write(3 * REGION, &blocks(0..256)), status::OK);
    assert_eq!(source.zero(0, 8192), status::OK);
    assert_eq!(target.write(200 * 4096, &block(66)), status::OK);
    let regions = service.changed_since("a", Stamp::default()).unwrap();
    assert!(regions.contains(&0) && regions.contains(&3));
    service.begin_resync("b", &regions).unwrap();
    assert_eq!(target.write(45056, &block(77)), status::OK, "a live write, which the source missed");
    let pulled = pull(&service, "a", "b", &regions);
    assert_eq!(pulled.regions, regions.len() as u64);
    assert_eq!(pulled.tally.blocks_copied, 2 + 99 + 1 + 256);
    service.end_resync("b").unwrap();
    assert_eq!(target.read(45056, 4096).1, block(77));
    assert_eq!(source.write(45056, &block(77)), status::OK);
    let digests = ["a", "b"].map(|volume| service.verify(volume, 0, 16).unwrap().digest);
    assert_eq!(digests[0], digests[1]);
    assert_eq!(pull(&service, "a", "b", &regions).tally.blocks_copied, 0);
}

#[test]
fn a_live_fragment_leaves_a_block_stale_and_a_live_zeroing_makes_it_fresh() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let service = ReplicaService::new().unwrap();
    create(&service, &a);
    create(&service, &b);
    open_as(&service, "a", &a, 1);
    open_as(&service, "b", &b, 1);
    let mut source = Client::attach_to(&service, "a", 1, Role::Data);
    let mut target = Client::attach_to(&service, "b", 1, Role::Data);
    // What the target missed: both blocks. It never had anything there.
    assert_eq!(source.write(0, &blocks([1, 2])), status::OK);
    service.begin_resync("b", &[0]).unwrap();
    // Live requests that reach the target first: a fragment of one, and a zeroing of the other.
    assert_eq!(target.write_partial(0, &[9; 512]), status::OK);
    assert_eq!(target.zero(4096, 4096), status::OK);
    assert_eq!(source.write_partial(0, &[9; 512]), status::OK);
    pull(&service, "a", "b", &[0]);
    assert_eq!(source.zero(4096, 4096), status::OK);
    service.end_resync("b").unwrap();
    let digests = ["a", "b"].map(|volume| service.verify(volume, 0, 16).unwrap().digest);
    assert_eq!(digests[0], digests[1]);
    assert_eq!(target.read(0, 4096).1[512..], block(1)[512..]);
}

#[test]
fn clean_all_leaves_nothing_to_recover_and_stamps_remain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    assert_eq!(client.write(5 * REGION, &block(1)), status::OK);
    service.set_stamp(VOLUME, Stamp { epoch: 1, version: 2 }).unwrap();
    assert_eq!(service.changed_since(VOLUME, Stamp { epoch: 1, version: 1 }).unwrap(), [5]);
    service.clean_all(VOLUME).unwrap();
    assert!(service.dirty_regions(VOLUME).unwrap().is_empty());
    drop(client);
    service.shutdown();
    let service = ReplicaService::new().unwrap();
    assert_eq!(open(&service, &path, 2).dirty_regions, 0);
    assert_eq!(service.changed_since(VOLUME, Stamp { epoch: 1, version: 1 }).unwrap(), [5]);
    let mut client = Client::attach(&service, 2, Role::Data);
    assert_eq!(client.read(5 * REGION, 4096).1, block(1));
}

#[test]
fn a_replica_is_open_once_and_grows_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let (service, other) = (ReplicaService::new().unwrap(), ReplicaService::new().unwrap());
    create(&service, &path);
    assert_eq!(service.create_store(&path, "head", SIZE).unwrap_err().kind, ErrorKind::BadRequest);
    open(&service, &path, 1);
    let options = dolmen_core::replica::recovery::OpenOptions::new(SIZE, 1, Stamp { epoch: 1, version: 1 });
    let chain = ["head".to_owned()];
    assert!(other.open_store(VOLUME, path.clone(), &chain, options).is_err());
    service.resize(VOLUME, SIZE + 4096).unwrap();
    service.resize(VOLUME, SIZE + 4096).unwrap();
    assert_eq!(service.resize(VOLUME, SIZE).unwrap_err().kind, ErrorKind::BadRequest);
    let mut client = Client::attach(&service, 1, Role::Data);
    assert_eq!(client.write(SIZE, &block(1)), status::OK);
    assert_eq!(client.call(kind::REGION_SUMMARY, 0, SIZE, 4096, &[]).1.len(), 8);
    drop(client);
    service.close_store(VOLUME).unwrap();
    other.open_store(VOLUME, path, &chain, options).unwrap();
}

#[test]
fn missing_short_and_foreign_files_are_damage_and_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (number, (file, change)) in [
        ("regions", None),
        ("head/map", None),
        ("head/data", None),
        ("regions", Some(5000)),
        ("head/map", Some(100_000)),
        ("head/map", Some(10)),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("r{number}"));
        let service = ReplicaService::new().unwrap();
        create(&service, &path);
        let victim = path.join(file);
        match change {
            None => std::fs::rename(&victim, path.join("aside")).unwrap(),
            Some(length) => {
                std::fs::OpenOptions::new().write(true).open(&victim).unwrap().set_len(length).unwrap();
            }
        }
        let options =
            dolmen_core::replica::recovery::OpenOptions::new(SIZE, 1, Stamp { epoch: 1, version: 1 });
        let error = service.open_store(VOLUME, path.clone(), &["head".to_owned()], options).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Damaged, "{file} {change:?}: {error}");
        if change.is_none() {
            assert!(!victim.exists(), "nothing is formatted on a guess");
        }
    }
}

#[test]
fn a_peer_that_reads_slowly_gets_every_reply() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    let data = blocks(0..256);
    assert_eq!(client.write(0, &data), status::OK);
    // More replies than the server is willing to hold; it stops reading, and must begin again by itself.
    let ids: Vec<u64> = (0..40).map(|_| client.send(kind::READ, 0, 0, 1 << 20, &[])).collect();
    for id in ids {
        assert_eq!(client.reply_to(id).1[256 * 8..], data);
    }
}

#[test]
fn a_new_data_session_ends_the_earlier_one() {
    use std::io::Read;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut first = Client::attach(&service, 1, Role::Data);
    let mut peer = Client::attach(&service, 1, Role::Peer);
    let mut second = Client::attach(&service, 1, Role::Data);
    assert_eq!(second.write(0, &block(1)), status::OK);
    assert_eq!(first.socket.read(&mut [0]).unwrap(), 0);
    assert_eq!(peer.read(0, 4096).1, block(1));
}

#[test]
fn a_repeated_claim_ends_the_data_session_of_its_own_epoch() {
    use std::io::Read;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut left_over = Client::attach(&service, 1, Role::Data);
    let mut peer = Client::attach(&service, 1, Role::Peer);
    assert_eq!(left_over.write(0, &block(1)), status::OK);
    service.set_epoch(VOLUME, 1).unwrap();
    service.begin_resync(VOLUME, &[0]).unwrap();
    let mut next = [0; 1];
    assert!(!matches!(left_over.socket.read(&mut next), Ok(1..)), "nothing is applied or answered any more");
    assert_eq!(peer.read(0, 4096).1, block(1), "who only reads goes on");
    let mut new = Client::attach(&service, 1, Role::Data);
    assert_eq!(new.write(0, &block(2)), status::OK);
}

/// Answers one request of a puller.
fn answer(source: &mut std::os::unix::net::UnixStream, request: &Header, payload: &[u8]) {
    use std::io::Write;
    let mut reply = request.reply(status::OK);
    reply.payload_bytes = payload.len() as u32;
    source.write_all(&reply.encode()).unwrap();
    source.write_all(payload).unwrap();
}

fn asked(source: &mut std::os::unix::net::UnixStream) -> Header {
    use std::io::Read;
    let mut bytes = [0; HEADER_BYTES];
    source.read_exact(&mut bytes).unwrap();
    Header::decode(&bytes).unwrap()
}

/// A source whose block 0 is `tag`, and which has been asked for it.
fn asked_for_block_0(source: &mut std::os::unix::net::UnixStream, tag: u64) -> Header {
    let summary = asked(source);
    let mut entries = write_payload(0, &block(tag))[..8].to_vec();
    entries.resize(REGION as usize / BLOCK * 8, 0);
    answer(source, &summary, &entries);
    asked(source)
}

#[test]
fn a_pull_of_an_earlier_resync_writes_nothing_more() {
    type Begin = fn(&ReplicaService);
    let claims: Begin = |service| service.set_epoch(VOLUME, 1).unwrap();
    let begins: Begin = |service| service.begin_resync(VOLUME, &[0]).unwrap();
    let ends: Begin = |service| service.end_resync(VOLUME).unwrap();
    for change in [claims, begins, ends] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let service = ReplicaService::new().unwrap();
        create(&service, &path);
        open(&service, &path, 1);
        service.begin_resync(VOLUME, &[0]).unwrap();
        let (mut source, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let service = &service;
            let pull =
                scope.spawn(move || service.pull_regions(VOLUME, theirs.into(), 1, &[0], Default::default()));
            let read = asked_for_block_0(&mut source, 1);
            change(service);
            let mut client = Client::attach(service, 1, Role::Data);
            assert_eq!(client.write(0, &block(2)), status::OK);
            // The write is known as fresh only if it is one of the resync that goes on.
            service.begin_resync(VOLUME, &[0]).unwrap();
            answer(&mut source, &read, &write_payload(0, &block(1)));
            assert_eq!(pull.join().unwrap().unwrap_err().kind, ErrorKind::Closed);
            assert_eq!(client.read(0, 4096).1, block(2));
        });
    }
}

#[test]
fn floods_of_damage_drown_no_other_event() {
    use std::os::unix::fs::FileExt;
    const MIB: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r");
    let service = ReplicaService::new().unwrap();
    create(&service, &path);
    open(&service, &path, 1);
    let mut client = Client::attach(&service, 1, Role::Data);
    for at in 0..17 {
        assert_eq!(client.write((at * MIB) as u64, &blocks(1..257)), status::OK);
    }
    let mut gone = Client::attach(&service, 1, Role::Peer);
    gone.socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(!matches!(std::io::Read::read(&mut gone.socket, &mut [0]), Ok(1..)));
    let file = std::fs::OpenOptions::new().write(true).open(path.join("head/data")).unwrap();
    file.write_all_at(&vec![0; 17 * MIB], 0).unwrap();
    for at in (0..17).chain(0..17) {
        client.read((at * MIB) as u64, MIB as u32);
    }
    let events = service.poll_events();
    assert!(events.iter().any(|event| matches!(event, Event::SessionClosed { .. })));
    let damaged = events.iter().filter(|event| matches!(event, Event::BlockDamaged { .. })).count();
    assert_eq!(damaged, 4096, "each once, up to the limit");
    let stats: std::collections::HashMap<_, _> = service.stats(VOLUME).unwrap().into_iter().collect();
    assert_eq!(stats["damage_events_dropped"], 2 * 256);
    client.read(0, 4096);
    assert!(matches!(&service.poll_events()[..], [Event::BlockDamaged { block_index: 0, .. }]));
}

#[test]
fn equal_bytes_have_equal_digests_however_they_came_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let service = ReplicaService::new().unwrap();
    for volume in ["a", "b"] {
        let path = dir.path().join(volume);
        create(&service, &path);
        open_as(&service, volume, &path, 1);
    }
    let mut written = Client::attach_to(&service, "a", 1, Role::Data);
    assert_eq!(written.write(0, &[vec![0; BLOCK], block(1), vec![0; BLOCK]].concat()), status::OK);
    let mut zeroed = Client::attach_to(&service, "b", 1, Role::Data);
    assert_eq!(zeroed.write(4096, &block(1)), status::OK);
    assert_eq!(zeroed.zero(0, 4096), status::OK);
    let digests = ["a", "b"].map(|volume| service.verify(volume, 0, 16).unwrap().digest);
    assert_eq!(digests[0], digests[1]);
}
