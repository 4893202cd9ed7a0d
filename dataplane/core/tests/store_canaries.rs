//! The tests are tested: each switchable bug is noticed by a scenario that passes without it. The scenarios
//! run one after the other, because a canary is one for the whole process.

mod common;

use common::{block, blocks, BLOCK, REGION};
use dolmen_core::replica::flush::Clean;
use dolmen_core::replica::format::Stamp;
use dolmen_core::simdisk::{Fault, Loss, Operation};
use dolmen_core::simstore::{checksums_of, set_canary, SimStore};

const SIZE: u64 = 2 * REGION;
const B: u64 = BLOCK as u64;
const SEEDS: u64 = 60;
const EIO: i32 = 5;

type Verdict = Result<(), String>;
type Scenario = fn() -> Verdict;

fn fresh() -> SimStore {
    let mut store = SimStore::new();
    store.create(SIZE).unwrap();
    open(&mut store);
    store
}

fn open(store: &mut SimStore) {
    store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).unwrap();
}

fn write(store: &mut SimStore, at: u64, tag: u64, id: u64) {
    store.write(at * B, &block(tag), id, None, None).unwrap();
}

fn fail_next(store: &SimStore, file: &str, operation: Operation) {
    let file = file.to_owned();
    store.disk().add_fault(Fault { file, operation, errno: EIO, after: 0, count: 1, written_bytes: 0 });
}

/// `None`: no good copy.
fn read(store: &mut SimStore, at: u64) -> Option<Vec<u8>> {
    let found = store.read(at * B, B, None).unwrap();
    (found.entries[0] != 2).then_some(found.data)
}

fn expect(store: &mut SimStore, at: u64, allowed: &[Vec<u8>]) -> Verdict {
    match read(store, at) {
        Some(found) if allowed.contains(&found) => Ok(()),
        Some(_) => Err(format!("block {at} holds what was never there")),
        None => Err(format!("block {at} is damaged")),
    }
}

fn a_flush_that_was_answered_is_on_the_disk() -> Verdict {
    let mut store = fresh();
    store.write(0, &blocks(1..9), 1, None, None).unwrap();
    fail_next(&store, "data", Operation::Sync);
    if store.flush(Clean::Nothing).is_err() {
        return Ok(());
    }
    store.power_loss(Loss::All, 1);
    open(&mut store);
    (0..8).try_for_each(|at| expect(&mut store, at, &[block(at + 1)]))
}

/// A block that was never flushed is there as a whole or not at all, whatever `before` the loss.
fn no_halves(before: impl Fn(&mut SimStore)) -> Verdict {
    for seed in 0..SEEDS {
        let mut store = fresh();
        write(&mut store, 3, 7, 1);
        before(&mut store);
        store.power_loss(Loss::Torn, seed);
        open(&mut store);
        expect(&mut store, 3, &[block(7), vec![0; BLOCK]]).map_err(|why| format!("{why}, seed {seed}"))?;
    }
    Ok(())
}

fn a_cut_off_flush_leaves_no_halves() -> Verdict {
    no_halves(|store| {
        store.flush_step(Clean::Nothing).unwrap();
    })
}

fn a_power_loss_leaves_no_halves() -> Verdict {
    no_halves(|_| {})
}

fn what_power_loss_changed_is_in_a_dirty_region() -> Verdict {
    for seed in 0..SEEDS {
        let mut store = fresh();
        write(&mut store, 3, 7, 1);
        store.flush(Clean::All).unwrap();
        write(&mut store, 3, 8, 2);
        store.power_loss(Loss::Torn, seed);
        open(&mut store);
        let changed = read(&mut store, 3) != Some(block(7));
        if changed && !store.dirty_regions().unwrap().contains(&0) {
            return Err(format!("unnoticed, seed {seed}"));
        }
        if read(&mut store, 3).is_none() {
            return Err(format!("damaged, seed {seed}"));
        }
    }
    Ok(())
}

fn a_killed_process_forgets_nothing_it_answered() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 1);
    store.crash();
    open(&mut store);
    expect(&mut store, 3, &[block(7)])
}

fn every_block_verifies_after_power_loss() -> Verdict {
    for seed in 0..SEEDS {
        let mut store = fresh();
        write(&mut store, 3, 7, 1);
        store.flush(Clean::Nothing).unwrap();
        write(&mut store, 3, 8, 2);
        store.power_loss(Loss::Torn, seed);
        open(&mut store);
        if read(&mut store, 3).is_none() {
            return Err(format!("damaged, seed {seed}"));
        }
    }
    Ok(())
}

fn flushed_zeroes_do_not_bring_back_what_was_before() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 1);
    store.flush(Clean::Nothing).unwrap();
    fail_next(&store, "data", Operation::Punch);
    // It may have happened or not; the first read decides.
    let _ = store.zero(3 * B, B, false, 2, None);
    let decided = read(&mut store, 3).ok_or("damaged")?;
    store.flush(Clean::Nothing).unwrap();
    write(&mut store, 3, 8, 3);
    store.power_loss(Loss::Prefix, 1);
    for seed in 0..SEEDS {
        let mut copy = store.copy();
        copy.power_loss(Loss::Prefix, seed);
        open(&mut copy);
        expect(&mut copy, 3, &[decided.clone(), block(8)])?;
    }
    Ok(())
}

fn a_copy_never_replaces_a_newer_write() -> Verdict {
    let (mut source, mut target) = (fresh(), fresh());
    for at in 0..4 {
        write(&mut source, at, 10 + at, 1);
    }
    target.begin_resync(&[0]).unwrap();
    let pass = target.pull_pass(false).unwrap();
    let mut pull = target.pull_compare(pass, 0, &source.summary(0).unwrap()).unwrap();
    let (first, count) = pull.reads[0];
    let (_, reply) = source.read_reply(first * B, count * B, None).unwrap();
    write(&mut source, 2, 99, 2);
    write(&mut target, 2, 99, 2);
    target.pull_copy(&mut pull, first, count, &reply).unwrap();
    assert!(target.pull_finish(&pull).unwrap());
    expect(&mut target, 2, &[block(99)])?;
    expect(&mut target, 1, &[block(11)])
}

fn a_repair_leaves_a_good_block_alone() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 1);
    store.repair(3, &block(6), None).unwrap();
    expect(&mut store, 3, &[block(7)])
}

fn a_region_is_clean_only_when_its_flush_is_done() -> Verdict {
    for seed in 0..SEEDS {
        let mut store = fresh();
        write(&mut store, 3, 7, 1);
        store.flush(Clean::All).unwrap();
        write(&mut store, 3, 8, 2);
        store.completed(2).unwrap();
        store.set_now_ms(10_000);
        store.flush_step(Clean::Idle).unwrap();
        store.power_loss(Loss::Torn, seed);
        open(&mut store);
        if read(&mut store, 3).is_none() {
            return Err(format!("damaged, seed {seed}"));
        }
    }
    Ok(())
}

fn a_region_that_may_differ_stays_dirty() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 5);
    store.completed(4).unwrap();
    store.set_now_ms(10_000);
    store.flush(Clean::Idle).unwrap();
    let dirty = store.dirty_regions().unwrap();
    dirty.contains(&0).then_some(()).ok_or_else(|| "it was cleaned".to_owned())
}

fn a_write_in_the_wrong_place_is_refused() -> Verdict {
    let mut store = fresh();
    let sums = checksums_of(3, &block(7));
    match store.write(4 * B, &block(7), 1, None, Some(&sums)) {
        Ok(()) => Err("it was written".to_owned()),
        Err(_) => expect(&mut store, 4, &[vec![0; BLOCK]]),
    }
}

fn what_was_written_under_a_new_record_is_listed() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 1);
    store.set_stamp(Stamp { epoch: 1, version: 2 }).unwrap();
    write(&mut store, 3, 8, 2);
    let listed = store.changed_since(Stamp { epoch: 1, version: 1 }).unwrap();
    listed.contains(&0).then_some(()).ok_or_else(|| "it is missing".to_owned())
}

fn a_failed_sync_is_remembered() -> Verdict {
    let mut store = fresh();
    write(&mut store, 3, 7, 1);
    fail_next(&store, "data", Operation::Sync);
    assert!(store.flush(Clean::Nothing).is_err());
    store.crash();
    let opened = store.open(SIZE, 1, Stamp { epoch: 1, version: 1 }).unwrap();
    (opened.sync_failed == 1).then_some(()).ok_or_else(|| "it was forgotten".to_owned())
}

#[test]
fn every_canary_is_noticed() {
    let cases: [(&str, Scenario); 14] = [
        ("fsync_retried", a_flush_that_was_answered_is_on_the_disk),
        ("stable_before_data", a_cut_off_flush_leaves_no_halves),
        ("mark_not_synced", what_power_loss_changed_is_in_a_dirty_region),
        ("entry_after_answer", a_killed_process_forgets_nothing_it_answered),
        ("recover_trusts_map", every_block_verifies_after_power_loss),
        ("recompute_never_stable", a_power_loss_leaves_no_halves),
        ("punch_after_entry", flushed_zeroes_do_not_bring_back_what_was_before),
        ("pull_over_fresh", a_copy_never_replaces_a_newer_write),
        ("repair_unconditional", a_repair_leaves_a_good_block_alone),
        ("dirty_cleared_early", a_region_is_clean_only_when_its_flush_is_done),
        ("cleaned_uncompleted", a_region_that_may_differ_stays_dirty),
        ("checksum_without_place", a_write_in_the_wrong_place_is_refused),
        ("stamp_not_renewed", what_was_written_under_a_new_record_is_listed),
        ("failure_forgotten", a_failed_sync_is_remembered),
    ];
    for (name, scenario) in cases {
        scenario().unwrap_or_else(|why| panic!("{name} is off, and yet: {why}"));
        assert!(set_canary(name, true));
        let noticed = scenario();
        set_canary(name, false);
        assert!(noticed.is_err(), "{name} went unnoticed");
    }
}

#[test]
#[ignore = "a measurement"]
fn measure_a_cycle() {
    for size in [8 << 20, 64 << 20] {
        let mut store = SimStore::new();
        store.create(size).unwrap();
        let started = std::time::Instant::now();
        for round in 0..20 {
            store.open(size, 1, Stamp { epoch: 1, version: 1 }).unwrap();
            for op in 0..100 {
                let at = (round * 100 + op * 37) % (size / B);
                match op % 10 {
                    0 => store.flush(Clean::Nothing).unwrap(),
                    1 => drop(store.read(at * B, B, None).unwrap()),
                    _ => write(&mut store, at, op, op),
                }
            }
            store.power_loss(Loss::Torn, round);
        }
        println!("{} MiB: {:?} a cycle", size >> 20, started.elapsed() / 20);
    }
}
