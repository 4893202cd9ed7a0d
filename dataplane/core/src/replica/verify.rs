//! Reading and verifying everything in a range, as a reader would see it through the chain.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::checksum::{ENTRY_DAMAGED, ENTRY_ZERO};
use crate::limits::{BLOCK_BYTES, REGION_BLOCKS};

use super::error::{ErrorKind, Result, StoreError};
use super::handle::{Shared, StoreHandle};
use super::read::{read_present, Plan};

/// Damaged blocks that are named; all are counted.
const DAMAGED_NAMED_MAX: usize = 1000;
/// Blocks read at once: 1 MiB, a few times per region, so that writers get their turn between.
const BLOCKS_PER_READ: u64 = 256;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    pub blocks_verified: u64,
    pub blocks_zero: u64,
    pub damaged: Vec<u64>,
    pub damaged_count: u64,
    pub digest: u64,
}

/// Holds the store's lock only to look up entries, and to look again at what did not verify.
pub fn verify(
    shared: &Shared,
    handle: &Arc<StoreHandle>,
    first_region: u32,
    region_count: u32,
) -> Result<Verified> {
    let block_count = handle.lock(shared).store.block_count();
    let first = u64::from(first_region) * REGION_BLOCKS;
    if first >= block_count && region_count > 0 {
        return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {first_region}")));
    }
    let end = block_count.min(first + u64::from(region_count) * REGION_BLOCKS);
    let mut found = Verified::default();
    let mut digest = Xxh3::new();
    let mut plan = Plan::default();
    let mut data = vec![0; (BLOCKS_PER_READ * BLOCK_BYTES) as usize];
    let mut at = first;
    while at < end {
        let count = BLOCKS_PER_READ.min(end - at);
        let bad = {
            let mut guarded = handle.lock(shared);
            guarded.store.check_alive()?;
            guarded.store.locate(at, count, &mut plan)?;
            let result = guarded.store.commit();
            shared.settle(handle, &mut guarded);
            result?;
            drop(guarded);
            read_present(&handle.data_files, &plan, &mut data, true).expect("it may wait")
        };
        let bad =
            if bad.is_empty() { bad } else { look_again(shared, handle, at, count, &mut plan, &mut data)? };
        tally(&plan, &bad, &data, &mut found, &mut digest);
        at += count;
    }
    found.digest = digest.digest();
    Ok(found)
}

/// A write may have changed a block between its entry and its data: with the lock held it cannot.
fn look_again(
    shared: &Shared,
    handle: &Arc<StoreHandle>,
    at: u64,
    count: u64,
    plan: &mut Plan,
    data: &mut [u8],
) -> Result<Vec<usize>> {
    let mut guarded = handle.lock(shared);
    guarded.store.locate(at, count, plan)?;
    let bad = read_present(&handle.data_files, plan, data, true).expect("it may wait");
    for index in &bad {
        guarded.store.note_damaged(at + *index as u64);
    }
    shared.settle(handle, &mut guarded);
    Ok(bad)
}

fn tally(plan: &Plan, bad: &[usize], data: &[u8], found: &mut Verified, digest: &mut Xxh3) {
    let mut blocks = data.chunks_exact(BLOCK_BYTES as usize);
    for (index, entry) in plan.entries.iter().enumerate() {
        let block = plan.first_block + index as u64;
        if *entry <= ENTRY_ZERO {
            found.blocks_zero += 1;
            continue;
        }
        let content = if *entry == ENTRY_DAMAGED { None } else { blocks.next() };
        if content.is_none() || bad.contains(&index) {
            found.damaged_count += 1;
            if found.damaged.len() < DAMAGED_NAMED_MAX {
                found.damaged.push(block);
            }
        } else {
            found.blocks_verified += 1;
        }
        // Written zeroes and holes are the same bytes.
        if content.is_some_and(|content| content.iter().all(|byte| *byte == 0)) && !bad.contains(&index) {
            continue;
        }
        digest.update(&block.to_le_bytes());
        digest.update(&entry.to_le_bytes());
    }
}
