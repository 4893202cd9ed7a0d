//! How a store remembers that its disk failed to make something durable.
//!
//! After a failed sync the page cache lies: it shows as written what the disk never got, and a later sync says
//! that all is well. So the failure has to outlive the process that met it (C15). The superblock of
//! `regions` names the boot under which the page cache can be believed; a boot that never was says
//! that it cannot. FORMAT.md, "Failed sync", has the order.

use std::io;

use crate::canary::{self, Canary};

use super::files::{sync, BlockFile};
use super::format::{Superblock, REGIONS_MAGIC, SUPERBLOCK_USED_BYTES};

/// In the place of a boot id: what the page cache holds is not to be believed.
pub const BOOT_FAILED: [u8; 16] = [0xff; 16];

/// Durable when it returns Ok. In the page cache even if only the sync failed: enough for a process that
/// is killed, and a machine that goes down changes its boot id.
pub fn note_failure<F: BlockFile>(regions: &F) -> io::Result<()> {
    if canary::is_set(Canary::FailureForgotten) {
        return Ok(());
    }
    write_boot_id(regions, BOOT_FAILED)?;
    sync(regions)
}

/// The page cache is to be believed again, under this boot. Needs no sync: if it is lost, the next open
/// only looks at more.
pub fn write_boot_id<F: BlockFile>(regions: &F, boot_id: [u8; 16]) -> io::Result<()> {
    let mut bytes = [0; SUPERBLOCK_USED_BYTES];
    if regions.read_at(&mut bytes, 0)? < bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let known = Superblock::decode(&bytes, REGIONS_MAGIC).map_err(io::Error::other)?;
    let bytes = Superblock { boot_id, ..known }.encode();
    regions.write_at(&bytes, 0).map_err(|short| short.error)
}
