//! A disk in memory that remembers what was not synced, can lose power, and can be cut off at any
//! operation.
//!
//! The model of power loss: every 512-byte sector independently holds what it held at some moment
//! between the file's last sync and now. Writes never synced may be lost, kept, or torn.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dolmen_core::replica::files::{BlockFile, Disk, Nowait, ShortWrite};

const SECTOR: usize = 512;

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Zero(usize, usize),
}

#[derive(Clone, Default)]
struct FileState {
    synced: Vec<u8>,
    current: Vec<u8>,
    unsynced: Vec<Change>,
}

fn apply(bytes: &mut [u8], change: &Change, low: usize, high: usize) {
    match change {
        Change::Write(at, data) => {
            let (from, to) = (low.max(*at), high.min(at + data.len()));
            if from < to {
                bytes[from..to].copy_from_slice(&data[from - at..to - at]);
            }
        }
        Change::Zero(at, length) => {
            let (from, to) = (low.max(*at), high.min(at + length));
            if from < to {
                bytes[from..to].fill(0);
            }
        }
    }
}

fn touched(change: &Change) -> (usize, usize) {
    match change {
        Change::Write(at, data) => (*at, at + data.len()),
        Change::Zero(at, length) => (*at, at + length),
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// Nothing that was not synced survives.
    All,
    /// Each file keeps everything up to one moment.
    Prefix,
    /// Each sector keeps all or nothing.
    AllOrNothing,
    /// Each sector stops at a moment of its own.
    Torn,
}

#[derive(Default)]
struct State {
    files: BTreeMap<PathBuf, FileState>,
    boot: u8,
    /// Operations until the process is killed.
    fuse: Option<u32>,
    /// Files with this name take only so many bytes more.
    full: Option<(&'static str, usize)>,
    /// Files with this name cannot be synced.
    sync_fails: Option<&'static str>,
}

impl State {
    /// False: the process is dead, nothing happens any more.
    fn alive(&mut self) -> bool {
        match &mut self.fuse {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                *left > 0
            }
        }
    }
}

fn dead() -> io::Error {
    io::Error::other("the process was killed here")
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(28)
}

#[derive(Clone, Default)]
pub struct MemoryDisk(Arc<Mutex<State>>);

/// Deterministic, small, good enough to choose sectors.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % sides
    }
}

impl MemoryDisk {
    pub fn new() -> Self {
        let disk = Self::default();
        disk.0.lock().unwrap().boot = 1;
        disk
    }

    /// The process dies after this many more operations.
    pub fn kill_after(&self, operations: u32) {
        self.0.lock().unwrap().fuse = Some(operations);
    }

    pub fn is_dead(&self) -> bool {
        self.0.lock().unwrap().fuse == Some(0)
    }

    /// A new process finds the page cache as the old one left it.
    pub fn restart_process(&self) {
        self.0.lock().unwrap().fuse = None;
    }

    pub fn lose_power(&self, loss: Loss, seed: u64, new_boot: bool) {
        let mut state = self.0.lock().unwrap();
        state.fuse = None;
        state.boot += u8::from(new_boot);
        let mut dice = Dice(seed);
        for file in state.files.values_mut() {
            lose(file, loss, &mut dice);
        }
    }

    /// The disk is full for files called `name`, but for `left` bytes of the next write.
    pub fn fill_up(&self, name: &'static str, left: usize) {
        self.0.lock().unwrap().full = Some((name, left));
    }

    pub fn make_room(&self) {
        self.0.lock().unwrap().full = None;
    }

    pub fn fail_syncs(&self, name: Option<&'static str>) {
        self.0.lock().unwrap().sync_fails = name;
    }

    /// Moves a directory's files.
    pub fn rename(&self, from: &Path, to: &Path) {
        let mut state = self.0.lock().unwrap();
        let moved: Vec<PathBuf> = state.files.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in moved {
            let file = state.files.remove(&path).unwrap();
            state.files.insert(to.join(path.strip_prefix(from).unwrap()), file);
        }
    }

    pub fn flip(&self, path: &Path, at: usize) {
        let mut state = self.0.lock().unwrap();
        let file = state.files.get_mut(path).unwrap();
        file.current[at] ^= 1;
        file.synced[at] ^= 1;
    }
}

fn lose(file: &mut FileState, loss: Loss, dice: &mut Dice) {
    let count = file.unsynced.len();
    let mut bytes = file.synced.clone();
    bytes.resize(file.current.len(), 0);
    let prefix = dice.roll(count + 1);
    let mut sectors: Vec<usize> = Vec::new();
    for change in &file.unsynced {
        let (low, high) = touched(change);
        sectors.extend(low / SECTOR..high.div_ceil(SECTOR));
    }
    sectors.sort_unstable();
    sectors.dedup();
    for sector in sectors {
        let kept = match loss {
            Loss::All => 0,
            Loss::Prefix => prefix,
            Loss::AllOrNothing => count * dice.roll(2),
            Loss::Torn => dice.roll(count + 1),
        };
        for change in &file.unsynced[..kept] {
            apply(&mut bytes, change, sector * SECTOR, (sector + 1) * SECTOR);
        }
    }
    *file = FileState { synced: bytes.clone(), current: bytes, unsynced: Vec::new() };
}

pub struct MemoryFile {
    state: Arc<Mutex<State>>,
    path: PathBuf,
}

impl MemoryFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if !state.alive() {
            // A write of several pages may be cut between two.
            let Change::Write(at, data) = &change else { return Err(dead()) };
            let pages = data.len() / 4096 / 2;
            if state.fuse.is_some() && at % 4096 == 0 && pages > 0 {
                let cut = Change::Write(*at, data[..pages * 4096].to_vec());
                record(state.files.get_mut(&self.path).unwrap(), cut);
            }
            return Err(dead());
        }
        record(state.files.get_mut(&self.path).unwrap(), change);
        Ok(())
    }
}

fn record(file: &mut FileState, change: Change) {
    let high = touched(&change).1;
    if let Change::Write(..) = change {
        if file.current.len() < high {
            file.current.resize(high, 0);
        }
    }
    let end = file.current.len();
    apply(&mut file.current, &change, 0, end);
    file.unsynced.push(change);
}

impl BlockFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.state.lock().unwrap();
        let bytes = &state.files[&self.path].current;
        let from = (offset as usize).min(bytes.len());
        let count = buffer.len().min(bytes.len() - from);
        buffer[..count].copy_from_slice(&bytes[from..from + count]);
        Ok(count)
    }

    fn read_at_nowait(&self, buffer: &mut [u8], offset: u64) -> Nowait {
        match self.read_at(buffer, offset) {
            Ok(count) => Nowait::Done(count),
            Err(error) => Nowait::Failed(error),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ShortWrite> {
        let full = self.state.lock().unwrap().full;
        if let Some((_, left)) = full.filter(|(name, _)| self.path.ends_with(name)) {
            let written_bytes = left.min(data.len());
            if written_bytes > 0 {
                self.change(Change::Write(offset as usize, data[..written_bytes].to_vec())).unwrap();
            }
            return Err(ShortWrite { written_bytes, error: no_space() });
        }
        self.change(Change::Write(offset as usize, data.to_vec()))
            .map_err(|error| ShortWrite { written_bytes: 0, error })
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if !state.alive() {
            return Err(dead());
        }
        if state.sync_fails.is_some_and(|name| self.path.ends_with(name)) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let file = state.files.get_mut(&self.path).unwrap();
        let length = file.current.len();
        file.synced.resize(length, 0);
        for change in std::mem::take(&mut file.unsynced) {
            apply(&mut file.synced, &change, 0, length);
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Change::Zero(offset as usize, length as usize))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(offset, length)
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        let full = self.state.lock().unwrap().full;
        if full.is_some_and(|(name, _)| self.path.ends_with(name)) {
            return Err(no_space());
        }
        Ok(())
    }

    fn holds_data(&self, offset: u64, length: u64) -> bool {
        let state = self.state.lock().unwrap();
        let bytes = &state.files[&self.path].current;
        // Compared by the page: this runs over whole regions at every open.
        bytes[offset as usize..(offset + length) as usize]
            .chunks(4096)
            .any(|page| page != &[0; 4096][..page.len()])
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.files.get_mut(&self.path).unwrap().current.resize(length as usize, 0);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().unwrap().files[&self.path].current.len() as u64)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        self.len()
    }
}

impl Disk for MemoryDisk {
    type File = MemoryFile;

    fn create(&self, path: &Path) -> io::Result<MemoryFile> {
        let mut state = self.0.lock().unwrap();
        state.files.insert(path.to_owned(), FileState::default());
        Ok(MemoryFile { state: Arc::clone(&self.0), path: path.to_owned() })
    }

    fn open(&self, path: &Path) -> io::Result<MemoryFile> {
        if !self.0.lock().unwrap().files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(MemoryFile { state: Arc::clone(&self.0), path: path.to_owned() })
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.0.lock().unwrap().files.keys().any(|known| known.starts_with(path)))
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<MemoryFile>> {
        self.create(path).map(Some)
    }

    fn boot_id(&self) -> [u8; 16] {
        [self.0.lock().unwrap().boot; 16]
    }
}
