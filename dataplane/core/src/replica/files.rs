//! The file operations a store is made of, behind two small traits: the real disk here, a
//! recording one in core/tests/ that can lose power. Generic, so that the hot path pays nothing.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{fadvise, fallocate, flock, seek, Advice, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use crate::canary::{self, Canary};

/// How far a write came before it failed.
#[derive(Debug)]
pub struct ShortWrite {
    pub written_bytes: usize,
    pub error: io::Error,
}

/// A read that must not wait for the disk.
#[derive(Debug)]
pub enum Nowait {
    /// This many bytes, fewer than asked for only at the end of the file.
    Done(usize),
    WouldWait,
    Failed(io::Error),
}

pub trait BlockFile: Send + Sync + 'static {
    /// Reads until `buffer` is full or the file ends.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    fn read_at_nowait(&self, buffer: &mut [u8], offset: u64) -> Nowait;
    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ShortWrite>;
    fn sync_data(&self) -> io::Result<()>;
    /// The range reads as zeroes afterwards; its space is given back where the file system can.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
    /// The range reads as zeroes afterwards and stays, or becomes, allocated.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Reserves space for a range that was never written: a later write into it cannot find the disk full.
    fn reserve(&self, offset: u64, length: u64) -> io::Result<()>;
    /// May the range hold anything but zeroes? Only "no" is certain.
    fn holds_data(&self, offset: u64, length: u64) -> bool;
    fn set_len(&self, length: u64) -> io::Result<()>;
    fn len(&self) -> io::Result<u64>;
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    fn allocated_bytes(&self) -> io::Result<u64>;
    /// What the page cache believes to be on the disk is read from there again.
    fn drop_cache(&self) -> io::Result<()>;
}

pub trait Disk: Send + Sync + 'static {
    type File: BlockFile;
    /// Fails if the file exists.
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    fn open(&self, path: &Path) -> io::Result<Self::File>;
    /// Fails if the directory exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    fn exists(&self, path: &Path) -> io::Result<bool>;
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens (creates) and locks; `None` when another process holds the lock.
    fn lock(&self, path: &Path) -> io::Result<Option<Self::File>>;
    /// Changes whenever this machine may have lost its page cache.
    fn boot_id(&self) -> [u8; 16];
}

/// Every sync of a store goes through here. A failure is final: the kernel reports it once, and may have
/// dropped what it could not write (C15).
pub fn sync<F: BlockFile>(file: &F) -> io::Result<()> {
    match file.sync_data() {
        Err(_) if canary::is_set(Canary::FsyncRetried) => file.sync_data(),
        result => result,
    }
}

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Longest single write to a file. The page cache keeps a long write in large folios, and a later 4 KiB
/// write into one of those walks all of its buffers: 5 times the CPU of the same write into folios of this
/// size, which in turn cost a large write nothing (measured on ext4, Linux 6.18).
const WRITE_BYTES_MAX: usize = 64 * 1024;

pub struct RealFile(File);

impl RealFile {
    fn write_zeroes(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        while offset < end {
            let piece = (end - offset).min(ZEROES.len() as u64) as usize;
            self.write_at(&ZEROES[..piece], offset).map_err(|short| short.error)?;
            offset += piece as u64;
        }
        Ok(())
    }

    /// `fallocate`, or zeroes by hand on a file system that lacks the mode.
    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        loop {
            match fallocate(&self.0, mode, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    return self.write_zeroes(offset, length)
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl BlockFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn read_at_nowait(&self, buffer: &mut [u8], offset: u64) -> Nowait {
        let wanted = buffer.len();
        let mut buffers = [io::IoSliceMut::new(buffer)];
        match rustix::io::preadv2(&self.0, &mut buffers, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == wanted => Nowait::Done(count),
            // A short read may be the end of the file or the end of what is cached: the slow path tells.
            Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::NOSYS) => Nowait::WouldWait,
            Err(error) => Nowait::Failed(error.into()),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ShortWrite> {
        let mut done = 0;
        while done < data.len() {
            let end = data.len().min(done + WRITE_BYTES_MAX);
            match self.0.write_at(&data[done..end], offset + done as u64) {
                Ok(0) => {
                    let error = io::Error::from(io::ErrorKind::WriteZero);
                    return Err(ShortWrite { written_bytes: done, error });
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ShortWrite { written_bytes: done, error }),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)
    }

    fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::KEEP_SIZE, offset, length)
    }

    fn holds_data(&self, offset: u64, length: u64) -> bool {
        // Moves the descriptor's position, which nothing here uses.
        match seek(&self.0, SeekFrom::Data(offset)) {
            Ok(found) => found < offset + length,
            Err(Errno::NXIO) => false,
            Err(_) => true,
        }
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(fadvise(&self.0, 0, None, Advice::DontNeed)?)
    }
}

/// Files of this machine.
pub struct RealDisk;

impl Disk for RealDisk {
    type File = RealFile;

    fn create(&self, path: &Path) -> io::Result<RealFile> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map(RealFile)
    }

    fn open(&self, path: &Path) -> io::Result<RealFile> {
        OpenOptions::new().read(true).write(true).open(path).map(RealFile)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<RealFile>> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(RealFile(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn boot_id(&self) -> [u8; 16] {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        // An unreadable id compares as another boot: the careful side.
        match u128::from_str_radix(&text.trim().replace('-', ""), 16) {
            Ok(id) => id.to_be_bytes(),
            Err(_) => [0; 16],
        }
    }
}
