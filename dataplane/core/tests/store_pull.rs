//! Pulls: their pace, sources with damaged blocks, and who is to blame when one fails.

mod common;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{block, blocks, create, open_as, Client, BLOCK, REGION};
use dolmen_core::checksum::ENTRY_DAMAGED;
use dolmen_core::frame::status;
use dolmen_core::replica::error::{ErrorKind, StoreError};
use dolmen_core::replica::handle::Event;
use dolmen_core::replica::pull::{PullOptions, Pulled};
use dolmen_core::replica::service::{ReplicaService, Role};

const B: u64 = BLOCK as u64;
const TAKE: PullOptions = PullOptions { rate_bytes_s: 0, take_damaged: true };

struct Rig {
    dir: tempfile::TempDir,
    service: ReplicaService,
}

impl Rig {
    /// Stores named by letters, each with the same ten blocks.
    fn new(names: &str) -> Self {
        let rig = Self { dir: tempfile::tempdir().unwrap(), service: ReplicaService::new().unwrap() };
        for name in names.chars() {
            let path = rig.dir.path().join(name.to_string());
            create(&rig.service, &path);
            open_as(&rig.service, &name.to_string(), &path, 1);
            assert_eq!(rig.client(name).write(0, &blocks(0..10)), status::OK);
        }
        rig
    }

    fn client(&self, name: char) -> Client {
        Client::attach_to(&self.service, &name.to_string(), 1, Role::Data)
    }

    fn pull(&self, from: char, to: char, options: PullOptions) -> Result<Pulled, StoreError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.service.attach_session(&from.to_string(), theirs.into(), 1, Role::Peer).unwrap();
        self.service.pull_regions(&to.to_string(), ours.into(), 1, &[0], options)
    }

    /// The disk changes a block behind the store's back.
    fn rot(&self, name: char, at: u64) {
        let path = self.dir.path().join(name.to_string()).join("head/data");
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"rot", at * B).unwrap();
    }
}

#[test]
fn a_pull_keeps_to_its_rate() {
    let rig = Rig::new("ab");
    assert_eq!(rig.client('a').write(REGION / 4, &blocks(100..356)), status::OK);
    assert_eq!(rig.client('a').write(REGION / 2, &blocks(400..656)), status::OK);
    rig.service.begin_resync("b", &[0]).unwrap();
    let started = Instant::now();
    let options = PullOptions { rate_bytes_s: 8 << 20, take_damaged: false };
    let pulled = rig.pull('a', 'b', options).unwrap();
    assert_eq!((pulled.regions, pulled.tally.bytes_copied), (1, 2 << 20));
    // The second MiB waited for the share of the first.
    assert!(started.elapsed() >= Duration::from_millis(124), "{:?}", started.elapsed());
}

#[test]
fn what_no_source_has_is_damaged_at_the_target_too_if_that_is_asked_for() {
    let rig = Rig::new("ab");
    assert_eq!(rig.client('a').write(2 * B, &blocks([52, 53, 54])), status::OK);
    rig.rot('a', 3);
    rig.rot('a', 7); // equal at the target, and good there
    rig.service.begin_resync("b", &[0]).unwrap();
    let pulled = rig.pull('a', 'b', PullOptions::default()).unwrap();
    assert_eq!((pulled.regions, pulled.tally.blocks_unreadable, pulled.tally.blocks_damaged), (0, 1, 0));
    assert_eq!(rig.client('b').read(3 * B, 4096).1, block(3), "left as it is");
    rig.service.poll_events();
    let pulled = rig.pull('a', 'b', TAKE).unwrap();
    assert_eq!((pulled.regions, pulled.tally.blocks_unreadable, pulled.tally.blocks_damaged), (1, 0, 1));
    assert!(rig
        .service
        .poll_events()
        .iter()
        .any(|event| matches!(event, Event::BlockDamaged { volume_id, block_index: 3 } if volume_id == "b")));
    let (entries, data) = rig.client('b').read(0, 10 * 4096);
    assert_eq!(entries.iter().position(|entry| *entry == ENTRY_DAMAGED), Some(3));
    assert_eq!(data[4 * BLOCK..5 * BLOCK], block(54));
    assert_eq!(data[7 * BLOCK..8 * BLOCK], block(7));
    // It is durable, and a write heals it.
    rig.service.end_resync("b").unwrap();
    assert_eq!(rig.client('b').write(3 * B, &block(63)), status::OK);
    assert_eq!(rig.client('b').read(3 * B, 4096).1, block(63));
}

#[test]
fn a_block_that_one_source_gave_is_not_taken_away_by_another() {
    let rig = Rig::new("abc");
    for source in ['a', 'b'] {
        assert_eq!(rig.client(source).write(2 * B, &blocks([52, 53, 54])), status::OK);
    }
    rig.rot('a', 2);
    rig.rot('b', 4);
    rig.service.begin_resync("c", &[0]).unwrap();
    let first = rig.pull('a', 'c', PullOptions::default()).unwrap();
    assert_eq!((first.regions, first.tally.blocks_unreadable), (0, 1));
    let second = rig.pull('b', 'c', PullOptions::default()).unwrap();
    assert_eq!((second.regions, second.tally.blocks_unreadable), (1, 0), "block 4 came from the first");
    assert_eq!(rig.client('c').read(2 * B, 3 * 4096).1, blocks([52, 53, 54]));

    // The same, where nobody has block 3, and both say so by entry 2.
    let rig = Rig::new("abc");
    for source in ['a', 'b'] {
        assert_eq!(rig.client(source).write(2 * B, &blocks([52, 53, 54])), status::OK);
        rig.rot(source, 3);
    }
    rig.rot('b', 4);
    rig.service.begin_resync("c", &[0]).unwrap();
    assert_eq!(rig.pull('a', 'c', PullOptions::default()).unwrap().regions, 0);
    assert_eq!(rig.pull('b', 'c', TAKE).unwrap().tally.blocks_damaged, 1);
    let entries = rig.client('c').read(2 * B, 3 * 4096).0;
    assert!(entries[0] > ENTRY_DAMAGED && entries[1] == ENTRY_DAMAGED && entries[2] > ENTRY_DAMAGED);
}

/// A pull from a source that never answers, ended by `end`.
fn stuck_pull(end: impl FnOnce(&Rig, &UnixStream)) -> ErrorKind {
    use std::io::Read;
    let rig = Rig::new("b");
    rig.service.begin_resync("b", &[0]).unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let keep = ours.try_clone().unwrap();
    std::thread::scope(|scope| {
        let pull =
            scope.spawn(|| rig.service.pull_regions("b", ours.into(), 1, &[0], PullOptions::default()));
        theirs.read_exact(&mut [0; 1]).unwrap(); // it has asked
        end(&rig, &keep);
        pull.join().unwrap().unwrap_err().kind
    })
}

#[test]
fn only_a_failing_source_is_blamed() {
    let shut = |socket: &UnixStream| socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(stuck_pull(|_, socket| shut(socket)), ErrorKind::Unreachable);
    let closed = stuck_pull(|rig, socket| {
        rig.service.close_store("b").unwrap();
        shut(socket);
    });
    assert_eq!(closed, ErrorKind::Closed);
    let claimed = stuck_pull(|rig, socket| {
        rig.service.set_epoch("b", 2).unwrap();
        shut(socket);
    });
    assert_eq!(claimed, ErrorKind::StaleEpoch);
    let over = stuck_pull(|rig, socket| {
        rig.service.begin_resync("b", &[0]).unwrap();
        shut(socket);
    });
    assert_eq!(over, ErrorKind::Closed);
}

#[test]
fn a_source_that_lies_is_blamed() {
    use std::io::{Read, Write};
    let rig = Rig::new("b");
    rig.service.begin_resync("b", &[0]).unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let pull =
            scope.spawn(|| rig.service.pull_regions("b", ours.into(), 1, &[0], PullOptions::default()));
        let mut frame = [0; dolmen_core::frame::HEADER_BYTES];
        theirs.read_exact(&mut frame).unwrap();
        let asked = dolmen_core::frame::Header::decode(&frame).unwrap();
        theirs.write_all(&asked.reply(status::OK).encode()).unwrap(); // without a summary
        assert_eq!(pull.join().unwrap().unwrap_err().kind, ErrorKind::SourceFailed);
    });
}
