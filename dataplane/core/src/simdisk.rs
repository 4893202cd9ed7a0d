//! A disk in memory that remembers what was not synced, can lose power, fail, fill up, and be cut off at
//! any operation. For tests and the simulator: compiled with the cargo feature `sim` only.
//!
//! The model of power loss: every 512-byte sector independently holds what it held at some moment
//! between the file's last sync and now. Writes never synced may be lost, kept, or torn.
//! The model of a failed sync: the page cache believes that all is written, some sectors never were, and no
//! later sync writes them (as Linux does it).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::replica::files::{BlockFile, Disk, Nowait, ShortWrite};

const SECTOR: u64 = 512;
const PAGE: usize = 4096;

/// Bytes of a file, sparse: a page that is not there is zeroes. Pages are shared between copies.
#[derive(Clone, Default)]
struct Pages {
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
    length: u64,
}

impl Pages {
    fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let count = (buffer.len() as u64).min(self.length.saturating_sub(offset)) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let piece = (PAGE - within).min(count - done);
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => buffer[done..done + piece].copy_from_slice(&page[within..within + piece]),
                None => buffer[done..done + piece].fill(0),
            }
            done += piece;
        }
        count
    }

    fn write(&mut self, data: &[u8], offset: u64) {
        self.length = self.length.max(offset + data.len() as u64);
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let piece = (PAGE - within).min(data.len() - done);
            let page = self.pages.entry(at / PAGE as u64).or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[within..within + piece].copy_from_slice(&data[done..done + piece]);
            done += piece;
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.length);
        let (first, last) = (offset / PAGE as u64, end.div_ceil(PAGE as u64));
        let touched: Vec<u64> = self.pages.range(first..last).map(|(page, _)| *page).collect();
        for number in touched {
            let start = number * PAGE as u64;
            let low = offset.max(start) - start;
            let high = end.min(start + PAGE as u64).max(start) - start;
            if (low, high) == (0, PAGE as u64) {
                self.pages.remove(&number);
            } else if low < high {
                let page = self.pages.get_mut(&number).expect("it is there");
                Arc::make_mut(page)[low as usize..high as usize].fill(0);
            }
        }
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.zero(length, self.length - length);
        }
        self.length = length;
    }
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Length(u64),
}

impl Change {
    fn apply(&self, bytes: &mut Pages) {
        match self {
            Change::Write(at, data) => bytes.write(data, *at),
            Change::Zero(at, length) => bytes.zero(*at, *length),
            Change::Length(length) => bytes.set_length(*length),
        }
    }

    /// What it does to one sector.
    fn apply_to_sector(&self, bytes: &mut Pages, sector: u64) {
        let (low, high) = (sector * SECTOR, (sector + 1) * SECTOR);
        match self {
            Change::Write(at, data) => {
                let (from, to) = (low.max(*at), high.min(at + data.len() as u64));
                if from < to {
                    bytes.write(&data[(from - at) as usize..(to - at) as usize], from);
                }
            }
            Change::Zero(at, length) => {
                let (from, to) = (low.max(*at), high.min(at + length));
                if from < to {
                    bytes.zero(from, to - from);
                }
            }
            Change::Length(_) => {}
        }
    }
}

#[derive(Clone, Default)]
struct FileState {
    /// What is on the disk whatever happens.
    synced: Pages,
    /// What the page cache holds.
    current: Pages,
    unsynced: Vec<Change>,
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

impl Loss {
    pub const ALL: [(&'static str, Loss); 4] = [
        ("all", Loss::All),
        ("prefix", Loss::Prefix),
        ("all_or_nothing", Loss::AllOrNothing),
        ("torn", Loss::Torn),
    ];
}

/// What a fault is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    Sync,
    Punch,
    Reserve,
}

impl Operation {
    pub const ALL: [(&'static str, Operation); 5] = [
        ("read", Operation::Read),
        ("write", Operation::Write),
        ("sync", Operation::Sync),
        ("punch", Operation::Punch),
        ("reserve", Operation::Reserve),
    ];
}

#[derive(Clone, Debug)]
pub struct Fault {
    /// Name of the file: `data`, `map`, `regions`; empty: any.
    pub file: String,
    pub operation: Operation,
    pub errno: i32,
    /// Operations of this kind that go well before.
    pub after: u32,
    /// How often it happens; `u32::MAX`: until it is cleared.
    pub count: u32,
    /// A write: bytes that arrive before it fails.
    pub written_bytes: usize,
}

#[derive(Clone, Default)]
struct State {
    files: BTreeMap<PathBuf, FileState>,
    boot: u64,
    /// Operations until the process is killed.
    fuse: Option<u32>,
    faults: Vec<Fault>,
    dice: u64,
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

    /// The fault that meets this operation, if one does.
    fn fault(&mut self, path: &Path, operation: Operation) -> Option<Fault> {
        let matches = |fault: &Fault| {
            fault.operation == operation && (fault.file.is_empty() || path.ends_with(&fault.file))
        };
        let at = self.faults.iter().position(matches)?;
        let fault = &mut self.faults[at];
        if fault.after > 0 {
            fault.after -= 1;
            return None;
        }
        let found = fault.clone();
        if fault.count != u32::MAX {
            fault.count -= 1;
        }
        if fault.count == 0 {
            self.faults.remove(at);
        }
        Some(found)
    }
}

fn dead() -> io::Error {
    io::Error::other("the process was killed here")
}

/// Deterministic, small, good enough to choose sectors.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % sides
    }
}

#[derive(Clone, Default)]
pub struct MemoryDisk(Arc<Mutex<State>>);

impl MemoryDisk {
    pub fn new() -> Self {
        let disk = Self::default();
        disk.state().boot = 1;
        disk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("the disk in memory")
    }

    /// An independent disk with the same content, as a copy of the whole directory would be.
    pub fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.state().clone())))
    }

    /// The process dies after this many more operations.
    pub fn kill_after(&self, operations: u32) {
        self.state().fuse = Some(operations);
    }

    pub fn is_dead(&self) -> bool {
        self.state().fuse == Some(0)
    }

    /// A new process finds the page cache as the old one left it.
    pub fn restart_process(&self) {
        self.state().fuse = None;
    }

    pub fn lose_power(&self, loss: Loss, seed: u64, new_boot: bool) {
        let mut state = self.state();
        state.fuse = None;
        state.boot += u64::from(new_boot);
        let mut dice = Dice(seed);
        for file in state.files.values_mut() {
            let kept = survivors(file, loss, &mut dice);
            *file = FileState { synced: kept.clone(), current: kept, unsynced: Vec::new() };
        }
    }

    /// The page cache forgets what it believes to be on the disk.
    pub fn drop_cache(&self) {
        self.state().files.values_mut().for_each(forget_cache);
    }

    pub fn add_fault(&self, fault: Fault) {
        assert!(fault.count > 0);
        self.state().faults.push(fault);
    }

    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// The disk is full for files called `name`, but for `left` bytes of each write.
    pub fn fill_up(&self, name: &str, left: usize) {
        for operation in [Operation::Write, Operation::Reserve] {
            self.add_fault(Fault {
                file: name.to_owned(),
                operation,
                errno: 28,
                after: 0,
                count: u32::MAX,
                written_bytes: left,
            });
        }
    }

    pub fn make_room(&self) {
        self.state().faults.retain(|fault| fault.errno != 28);
    }

    /// Every sync of files called `name` fails, until this is called with `None`.
    pub fn fail_syncs(&self, name: Option<&str>) {
        self.state().faults.retain(|fault| fault.operation != Operation::Sync);
        if let Some(name) = name {
            let file = name.to_owned();
            let (operation, count) = (Operation::Sync, u32::MAX);
            self.add_fault(Fault { file, operation, errno: 5, after: 0, count, written_bytes: 0 });
        }
    }

    /// Moves a directory's files.
    pub fn rename(&self, from: &Path, to: &Path) {
        let mut state = self.state();
        let moved: Vec<PathBuf> = state.files.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for path in moved {
            let file = state.files.remove(&path).expect("it is there");
            state.files.insert(to.join(path.strip_prefix(from).expect("a prefix")), file);
        }
    }

    /// Changes what the disk itself holds, behind everybody's back.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn damage(&self, path: &Path, offset: u64, change: impl Fn(&mut [u8]), length: usize) {
        let mut state = self.state();
        let file = state.files.get_mut(path).expect("a file to damage");
        let mut bytes = vec![0; length];
        let count = file.current.read(&mut bytes, offset);
        change(&mut bytes[..count]);
        file.current.write(&bytes[..count], offset);
        file.synced.write(&bytes[..count], offset);
    }

    pub fn flip(&self, path: &Path, at: usize) {
        self.damage(path, at as u64, |bytes| bytes[0] ^= 1, 1);
    }

    /// Two ranges of a file change places.
    pub fn swap(&self, path: &Path, one: u64, other: u64, length: usize) {
        let (mut first, mut second) = (vec![0; length], vec![0; length]);
        {
            let state = self.state();
            let file = state.files.get(path).expect("a file to damage");
            file.current.read(&mut first, one);
            file.current.read(&mut second, other);
        }
        self.damage(path, one, |bytes| bytes.copy_from_slice(&second[..bytes.len()]), length);
        self.damage(path, other, |bytes| bytes.copy_from_slice(&first[..bytes.len()]), length);
    }

    /// The file ends here from now on.
    pub fn truncate(&self, path: &Path, length: u64) {
        let mut state = self.state();
        let file = state.files.get_mut(path).expect("a file to damage");
        file.current.set_length(length);
        file.synced.set_length(length);
    }
}

/// What a power loss leaves of a file.
fn survivors(file: &FileState, loss: Loss, dice: &mut Dice) -> Pages {
    let count = file.unsynced.len();
    let mut bytes = file.synced.clone();
    let prefix = dice.roll(count + 1);
    let grown = file.current.length != file.synced.length && dice.roll(2) == 1 && !matches!(loss, Loss::All);
    for (sector, changes) in changed_sectors(file) {
        let kept = match loss {
            Loss::All => 0,
            Loss::Prefix => changes.partition_point(|index| *index < prefix),
            Loss::AllOrNothing => changes.len() * dice.roll(2),
            Loss::Torn => dice.roll(changes.len() + 1),
        };
        for index in &changes[..kept] {
            file.unsynced[*index].apply_to_sector(&mut bytes, sector);
        }
    }
    bytes.set_length(if grown { file.current.length } else { file.synced.length });
    bytes
}

/// By sector: the unsynced changes that touch it, in order. Holes over nothing are left out.
fn changed_sectors(file: &FileState) -> BTreeMap<u64, Vec<usize>> {
    let mut pages: BTreeSet<u64> = file.synced.pages.keys().copied().collect();
    for change in &file.unsynced {
        if let Change::Write(at, data) = change {
            pages.extend(at / PAGE as u64..(at + data.len() as u64).div_ceil(PAGE as u64));
        }
    }
    let mut sectors: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, change) in file.unsynced.iter().enumerate() {
        let (low, high) = match change {
            Change::Write(at, data) => (*at, at + data.len() as u64),
            Change::Zero(at, length) => (*at, at + length),
            Change::Length(_) => continue,
        };
        for page in pages.range(low / PAGE as u64..high.div_ceil(PAGE as u64)) {
            let start = page * PAGE as u64;
            let (from, to) = (low.max(start), high.min(start + PAGE as u64));
            for sector in from / SECTOR..to.div_ceil(SECTOR) {
                sectors.entry(sector).or_default().push(index);
            }
        }
    }
    sectors
}

fn forget_cache(file: &mut FileState) {
    let mut bytes = file.synced.clone();
    file.unsynced.iter().for_each(|change| change.apply(&mut bytes));
    file.current = bytes;
}

pub struct MemoryFile {
    state: Arc<Mutex<State>>,
    path: PathBuf,
}

impl MemoryFile {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the disk in memory")
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.state();
        if !state.alive() {
            // A write of several pages may be cut between two.
            let Change::Write(at, data) = &change else { return Err(dead()) };
            let pages = data.len() / PAGE / 2;
            if state.fuse.is_some() && at % PAGE as u64 == 0 && pages > 0 {
                let cut = Change::Write(*at, data[..pages * PAGE].to_vec());
                record(state.files.get_mut(&self.path).expect("an open file"), cut);
            }
            return Err(dead());
        }
        record(state.files.get_mut(&self.path).expect("an open file"), change);
        Ok(())
    }

    fn hole(&self, offset: u64, length: u64) -> io::Result<()> {
        if let Some(fault) = self.state().fault(&self.path, Operation::Punch) {
            return Err(io::Error::from_raw_os_error(fault.errno));
        }
        self.change(Change::Zero(offset, length))
    }
}

fn record(file: &mut FileState, change: Change) {
    change.apply(&mut file.current);
    file.unsynced.push(change);
}

impl BlockFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state();
        if let Some(fault) = state.fault(&self.path, Operation::Read) {
            return Err(io::Error::from_raw_os_error(fault.errno));
        }
        Ok(state.files[&self.path].current.read(buffer, offset))
    }

    fn read_at_nowait(&self, buffer: &mut [u8], offset: u64) -> Nowait {
        match self.read_at(buffer, offset) {
            Ok(count) => Nowait::Done(count),
            Err(error) => Nowait::Failed(error),
        }
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), ShortWrite> {
        let fault = self.state().fault(&self.path, Operation::Write);
        if let Some(fault) = fault {
            let written_bytes = fault.written_bytes.min(data.len());
            if written_bytes > 0 {
                self.change(Change::Write(offset, data[..written_bytes].to_vec()))
                    .map_err(|error| ShortWrite { written_bytes: 0, error })?;
            }
            let error = io::Error::from_raw_os_error(fault.errno);
            return Err(ShortWrite { written_bytes, error });
        }
        self.change(Change::Write(offset, data.to_vec()))
            .map_err(|error| ShortWrite { written_bytes: 0, error })
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state();
        if !state.alive() {
            return Err(dead());
        }
        let fault = state.fault(&self.path, Operation::Sync);
        state.dice += 1;
        let mut dice = Dice(state.dice);
        let file = state.files.get_mut(&self.path).expect("an open file");
        if let Some(fault) = fault {
            // The page cache takes its pages for written from here on.
            file.synced = survivors(file, Loss::AllOrNothing, &mut dice);
            file.unsynced.clear();
            return Err(io::Error::from_raw_os_error(fault.errno));
        }
        for change in std::mem::take(&mut file.unsynced) {
            change.apply(&mut file.synced);
        }
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.hole(offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.hole(offset, length)
    }

    fn reserve(&self, _offset: u64, _length: u64) -> io::Result<()> {
        match self.state().fault(&self.path, Operation::Reserve) {
            Some(fault) => Err(io::Error::from_raw_os_error(fault.errno)),
            None => Ok(()),
        }
    }

    fn holds_data(&self, offset: u64, length: u64) -> bool {
        let state = self.state();
        let pages = &state.files[&self.path].current.pages;
        pages
            .range(offset / PAGE as u64..(offset + length).div_ceil(PAGE as u64))
            .any(|(_, page)| **page != [0; PAGE])
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::Length(length))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state().files[&self.path].current.length)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        Ok(self.state().files[&self.path].current.pages.len() as u64 * PAGE as u64)
    }

    fn drop_cache(&self) -> io::Result<()> {
        forget_cache(self.state().files.get_mut(&self.path).expect("an open file"));
        Ok(())
    }
}

impl Disk for MemoryDisk {
    type File = MemoryFile;

    fn create(&self, path: &Path) -> io::Result<MemoryFile> {
        let mut state = self.state();
        if state.files.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.files.insert(path.to_owned(), FileState::default());
        Ok(MemoryFile { state: Arc::clone(&self.0), path: path.to_owned() })
    }

    fn open(&self, path: &Path) -> io::Result<MemoryFile> {
        if !self.state().files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(MemoryFile { state: Arc::clone(&self.0), path: path.to_owned() })
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.state().files.keys().any(|known| known.starts_with(path)))
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<MemoryFile>> {
        self.state().files.entry(path.to_owned()).or_default();
        self.open(path).map(Some)
    }

    fn boot_id(&self) -> [u8; 16] {
        u128::from(self.state().boot).to_be_bytes()
    }
}
