//! The store beside a dictionary. A killed process may forget nothing that was answered; power loss may
//! forget only what was not flushed, and never leaves a block that does not verify.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use dolmen_core::checksum::block_checksum;
use dolmen_core::replica::flush::{Clean, FlushPlan};
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::map::CHUNKS_CACHED_MIN;
use dolmen_core::replica::recovery::{create_store, open_store, OpenOptions};
use dolmen_core::replica::store::{regions_of, Store};
use dolmen_core::simdisk::{Loss, MemoryDisk, MemoryFile};
use proptest::prelude::*;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const REGION_BLOCKS: u64 = 1024;
const SIZE: u64 = 12 << 20;

/// The blocks that are played with: a few at each region's borders, so that requests meet.
const SPOTS: [u64; 16] = [0, 1, 2, 3, 1020, 1021, 1022, 1023, 1024, 1025, 1026, 2046, 2047, 2048, 2049, 3071];

#[derive(Debug, Clone)]
enum Op {
    Write {
        spot: usize,
        count: u64,
    },
    Partial {
        spot: usize,
        sector: usize,
        sectors: usize,
    },
    Zero {
        spot: usize,
        count: u64,
        keep: bool,
    },
    Flush,
    /// Advances a flush that others overtake: begin, data, map, done.
    FlushStep {
        clean: Clean,
    },
    Completed,
    SetEpoch,
    KillAfter(u32),
    Kill,
    LosePower {
        loss: Loss,
        seed: u64,
        new_boot: bool,
    },
}

fn ops() -> impl Strategy<Value = Op> {
    let spot = 0..SPOTS.len();
    let clean = prop_oneof![Just(Clean::Nothing), Just(Clean::Idle), Just(Clean::All)];
    let loss = prop_oneof![Just(Loss::All), Just(Loss::Prefix), Just(Loss::AllOrNothing), Just(Loss::Torn)];
    prop_oneof![
        8 => (spot.clone(), 1..4u64).prop_map(|(spot, count)| Op::Write { spot, count }),
        4 => (spot.clone(), 0..8usize, 1..8usize)
            .prop_map(|(spot, sector, sectors)| Op::Partial { spot, sector, sectors }),
        4 => (spot, 1..4u64, any::<bool>()).prop_map(|(spot, count, keep)| Op::Zero { spot, count, keep }),
        2 => Just(Op::Flush),
        6 => clean.prop_map(|clean| Op::FlushStep { clean }),
        1 => Just(Op::Completed),
        1 => Just(Op::SetEpoch),
        2 => (1..12u32).prop_map(Op::KillAfter),
        1 => Just(Op::Kill),
        2 => (loss, any::<u64>(), prop::bool::weighted(0.7))
            .prop_map(|(loss, seed, new_boot)| Op::LosePower { loss, seed, new_boot }),
    ]
}

type Content = Rc<Vec<u8>>;

/// What a block may hold. The last is what it holds now; all are legal after power loss.
struct History(Vec<(u64, Content)>);

impl History {
    fn now(&self) -> &Content {
        &self.0.last().expect("never empty").1
    }

    fn is_legal(&self, found: &[u8]) -> bool {
        (0..BLOCK)
            .step_by(SECTOR)
            .all(|at| self.0.iter().any(|(_, content)| content[at..at + SECTOR] == found[at..at + SECTOR]))
    }

    /// Everything up to `time` is durable.
    fn flushed(&mut self, time: u64) {
        let kept = self.0.iter().rposition(|(written, _)| *written <= time).unwrap_or(0);
        self.0.drain(..kept);
    }
}

struct Model {
    disk: MemoryDisk,
    store: Option<Store<MemoryFile>>,
    blocks: BTreeMap<u64, History>,
    /// Written by the request under way: it may have happened or not.
    in_flight: Vec<(u64, Content)>,
    flush: Option<(FlushPlan, u8, u64)>,
    time: u64,
    epoch: u64,
}

impl Model {
    fn new() -> Self {
        let disk = MemoryDisk::new();
        create_store(&disk, Path::new("/r"), "head", SIZE).unwrap();
        let zero = Rc::new(vec![0; BLOCK]);
        let blocks =
            (0..SIZE / BLOCK as u64).filter(|block| SPOTS.iter().any(|spot| block.abs_diff(*spot) < 8));
        let blocks = blocks.map(|block| (block, History(vec![(0, Rc::clone(&zero))]))).collect();
        let mut model =
            Self { disk, store: None, blocks, in_flight: Vec::new(), flush: None, time: 0, epoch: 1 };
        model.open();
        model
    }

    fn open(&mut self) {
        let options = OpenOptions {
            size_bytes: SIZE,
            epoch: self.epoch,
            stamp: Stamp { epoch: self.epoch, version: 1 },
            chunks_cached_max: CHUNKS_CACHED_MIN,
        };
        let (store, opened) = open_store(&self.disk, Path::new("/r"), &["head".to_owned()], options).unwrap();
        assert_eq!(opened.regions_damaged, 0);
        self.store = Some(store);
    }

    /// Runs one request; whether it was answered.
    fn request(
        &mut self,
        first: u64,
        contents: Vec<Content>,
        run: impl FnOnce(&mut Store<MemoryFile>, u64) -> bool,
    ) {
        self.time += 1;
        self.in_flight = (first..).zip(contents).collect();
        let store = self.store.as_mut().unwrap();
        store.set_now_ms(self.time * 1500);
        let answered = run(store, self.time);
        if answered {
            assert!(!self.disk.is_dead());
            for (block, content) in std::mem::take(&mut self.in_flight) {
                self.blocks.get_mut(&block).unwrap().0.push((self.time, content));
            }
        } else {
            assert!(self.disk.is_dead(), "a request failed on a good disk");
        }
    }

    fn write(&mut self, first: u64, count: u64) {
        let content = |block: u64| Rc::new(common::block(self.time * 10_000 + block));
        let contents: Vec<Content> = (first..first + count).map(content).collect();
        let data: Vec<u8> = contents.iter().flat_map(|content| content.iter().copied()).collect();
        let payload = common::write_payload(first * BLOCK as u64, &data);
        self.request(first, contents, |store, id| {
            let (sums, data) = payload.split_at(count as usize * 8);
            mark(store, first, count)
                && store.write_blocks(first, sums, data, id).is_ok()
                && store.commit().is_ok()
        });
    }

    fn partial(&mut self, block: u64, sector: usize, sectors: usize) {
        let low = sector * SECTOR;
        let high = (low + sectors * SECTOR).min(BLOCK);
        let mut content = (**self.blocks[&block].now()).clone();
        content[low..high].fill(self.time as u8);
        let fragment = content[low..high].to_vec();
        self.request(block, vec![Rc::new(content)], |store, id| {
            mark(store, block, 1)
                && store.write_partial(block * BLOCK as u64 + low as u64, &fragment, id).is_ok()
                && store.commit().is_ok()
        });
    }

    fn zero(&mut self, first: u64, count: u64, keep: bool) {
        let zero = Rc::new(vec![0; BLOCK]);
        self.request(first, vec![zero; count as usize], |store, id| {
            let noop = store.zero_is_noop(first, count, keep);
            (noop == Ok(true) || mark(store, first, count))
                && store.zero_blocks(first, count, keep, id).is_ok()
                && store.commit().is_ok()
        });
    }

    fn flush_step(&mut self, clean: Clean) {
        let store = self.store.as_mut().unwrap();
        let Some((mut plan, phase, time)) = self.flush.take() else {
            self.flush = Some((store.begin_flush(clean), 0, self.time));
            return;
        };
        let done = match phase {
            0 if plan.sync_data => store.data_files()[0].clone().sync_it(),
            0 => true,
            1 => store.after_data_sync(&mut plan).is_ok(),
            2 if plan.sync_map => store.map_file().sync_it(),
            2 => true,
            _ => {
                if store.finish_flush(plan).is_ok() {
                    self.blocks.values_mut().for_each(|history| history.flushed(time));
                }
                return;
            }
        };
        if done {
            self.flush = Some((plan, phase + 1, time));
        }
    }

    fn flush_all(&mut self) {
        if self.flush.is_none() {
            self.flush_step(Clean::Nothing);
        }
        while self.flush.is_some() && !self.disk.is_dead() {
            self.flush_step(Clean::Nothing);
        }
    }

    /// A new process, the same page cache: everything answered is there.
    fn kill(&mut self) {
        self.disk.restart_process();
        let in_flight = std::mem::take(&mut self.in_flight);
        self.flush = None;
        self.store = None;
        self.time += 1;
        self.open();
        for (block, history) in &mut self.blocks {
            let found = read(self.store.as_mut().unwrap(), *block);
            let flying = in_flight.iter().find(|(other, _)| other == block);
            let is_flying = flying.is_some_and(|(_, content)| **content == found);
            assert!(**history.now() == found || is_flying, "block {block} lost an answered write");
            // The request that was cut off is decided now; it is not durable for all that.
            if is_flying {
                history.0.push((self.time, Rc::new(found)));
            }
        }
    }

    fn lose_power(&mut self, loss: Loss, seed: u64, new_boot: bool) {
        self.disk.lose_power(loss, seed, new_boot);
        let in_flight = std::mem::take(&mut self.in_flight);
        self.flush = None;
        self.store = None;
        self.time += 1;
        self.open();
        let store = self.store.as_mut().unwrap();
        let dirty: BTreeSet<u32> = store.log().dirty_sorted().into_iter().collect();
        for (block, history) in &mut self.blocks {
            let found = read(store, *block);
            let before = Rc::clone(history.now());
            for (_, content) in in_flight.iter().filter(|(other, _)| other == block) {
                history.0.push((self.time, Rc::clone(content)));
            }
            assert!(history.is_legal(&found), "block {block} holds what was never legal");
            let region = (block / REGION_BLOCKS) as u32;
            assert!(found == **before || dirty.contains(&region), "block {block} changed unnoticed");
            if new_boot {
                // Recovery made it durable: no later power loss may bring anything older back.
                history.0 = vec![(self.time, Rc::new(found))];
            } else {
                history.0.push((self.time, Rc::new(found)));
            }
        }
    }

    fn run(&mut self, op: &Op) {
        match *op {
            Op::Write { spot, count } => {
                self.write(SPOTS[spot], count.min(SIZE / BLOCK as u64 - SPOTS[spot]))
            }
            Op::Partial { spot, sector, sectors } => self.partial(SPOTS[spot], sector, sectors),
            Op::Zero { spot, count, keep } => {
                self.zero(SPOTS[spot], count.min(SIZE / BLOCK as u64 - SPOTS[spot]), keep);
            }
            Op::Flush => self.flush_all(),
            Op::FlushStep { clean } => self.flush_step(clean),
            Op::Completed => {
                let time = self.time;
                let store = self.store.as_mut().unwrap();
                store.note_completed(time);
                store.complete_regions(&[0, 1, 2]);
            }
            Op::SetEpoch => {
                self.epoch += 1;
                let store = self.store.as_mut().unwrap();
                assert!(store.set_epoch(self.epoch));
                let stamp = Stamp { epoch: self.epoch, version: 1 };
                let done = store.begin_set_stamp(stamp).is_ok() && store.regions_file().sync_it();
                assert!(done || self.disk.is_dead());
            }
            Op::KillAfter(operations) => self.disk.kill_after(operations),
            Op::Kill => self.kill(),
            Op::LosePower { loss, seed, new_boot } => self.lose_power(loss, seed, new_boot),
        }
        if self.disk.is_dead() {
            // Half of the deaths are power cuts.
            match self.time % 4 {
                0 => self.lose_power(Loss::Torn, self.time, true),
                1 => self.lose_power(Loss::AllOrNothing, self.time, true),
                _ => self.kill(),
            }
        }
    }

    fn check(&mut self) {
        let store = self.store.as_mut().unwrap();
        for (block, history) in &self.blocks {
            assert_eq!(read(store, *block), **history.now(), "block {block}");
        }
    }
}

trait SyncIt {
    fn sync_it(&self) -> bool;
}

impl SyncIt for std::sync::Arc<MemoryFile> {
    fn sync_it(&self) -> bool {
        dolmen_core::replica::files::BlockFile::sync_data(&**self).is_ok()
    }
}

fn mark(store: &mut Store<MemoryFile>, first: u64, count: u64) -> bool {
    store.mark_now(regions_of(first * BLOCK as u64, count * BLOCK as u64), false).is_ok()
}

/// # Panics
/// If the block does not verify.
fn read(store: &mut Store<MemoryFile>, block: u64) -> Vec<u8> {
    let mut data = [0; BLOCK];
    let entry =
        store.read_block(block, &mut data).unwrap().unwrap_or_else(|| panic!("block {block} is damaged"));
    assert!(entry < 2 || entry == block_checksum(block, &data));
    data.to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_store_behaves_like_a_dictionary_that_survives(ops in prop::collection::vec(ops(), 1..80)) {
        let mut model = Model::new();
        for op in &ops {
            model.run(op);
        }
        model.check();
        model.kill();
        model.check();
    }
}
