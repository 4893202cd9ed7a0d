//! Making regions of this replica equal to a source's: the resync puller.
//!
//! Blocking client code on a thread of Python's. Compares checksums first, copies only what differs,
//! verifies every copied block, and never writes over a block that a live write made fresh. What is done
//! stays done when it fails. Called by replica/io_path.py through service.rs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{recv, send, RecvFlags, SendFlags};

use crate::frame::{kind, status, Header, HEADER_BYTES, REPLY};
use crate::limits::{BLOCK_BYTES, REGION_BYTES};

use super::error::{ErrorKind, Result, StoreError};
use super::handle::{Shared, StoreHandle};
use super::resync::{verified_reply, Pass, RegionPull, Tally};

/// A source that says nothing for this long is given up; the caller tries another.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// READs under way: enough to fill a fast link, little enough not to crowd out clients.
const READS_IN_FLIGHT_MAX: usize = 4;
/// Regions being compared ahead of the copying.
const SUMMARIES_IN_FLIGHT_MAX: usize = 4;
/// Runs waiting to be read before another region is compared.
const RUNS_WAITING_MAX: usize = 256;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pulled {
    pub regions: u64,
    pub tally: Tally,
}

/// What the caller may choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PullOptions {
    /// Bytes read from the source per second; 0: as fast as it goes.
    pub rate_bytes_s: u64,
    /// Where the source has no good copy, say so here too, and call the region done.
    pub take_damaged: bool,
}

enum Asked {
    Summary { region: u32 },
    Read { region: u32, first_block: u64, count: u64 },
}

struct Puller<'a> {
    shared: &'a Shared,
    handle: &'a Arc<StoreHandle>,
    pass: Pass,
    size_bytes: u64,
    source: Source,
    asked: HashMap<u64, Asked>,
    reads_in_flight: usize,
    runs: VecDeque<(u32, u64, u64)>,
    open: HashMap<u32, RegionPull>,
    pulled: Pulled,
    pace: Pace,
}

/// Spreads reads over time. One read may begin at once; each makes the next one wait for its share.
struct Pace {
    rate_bytes_s: u64,
    next: Instant,
}

impl Pace {
    fn wait(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    fn spend(&mut self, bytes: u64) {
        if self.rate_bytes_s > 0 {
            let share = Duration::from_secs_f64(bytes as f64 / self.rate_bytes_s as f64);
            // Time that went by unused is not made up for: clients would feel the burst.
            self.next = self.next.max(Instant::now()) + share;
        }
    }
}

pub fn pull_regions(
    shared: &Shared,
    handle: &Arc<StoreHandle>,
    fd: OwnedFd,
    epoch: u64,
    regions: &[u32],
    options: PullOptions,
) -> Result<Pulled> {
    let (size_bytes, pass) = {
        let guarded = handle.lock(shared);
        let pass = Pass { epoch, ..guarded.store.pass(options.take_damaged) };
        (guarded.store.size_bytes(), pass)
    };
    let source = Source { fd, epoch, next_id: 1, input: vec![0; 256 * 1024], start: 0, end: 0 };
    let pace = Pace { rate_bytes_s: options.rate_bytes_s, next: Instant::now() };
    let pulled = pull(shared, handle, (size_bytes, pass), (source, pace), regions);
    pulled.map_err(|error| whose_fault(shared, handle, &pass, error))
}

/// A replica that is closed, or claimed anew, ends its own pulls, and their sockets with them: then nothing is
/// wrong with the source.
fn whose_fault(shared: &Shared, handle: &Arc<StoreHandle>, pass: &Pass, error: StoreError) -> StoreError {
    let guarded = handle.lock(shared);
    if guarded.closed {
        return StoreError::new(ErrorKind::Closed, "this replica was closed while it pulled");
    }
    guarded.store.check_pass(pass).and_then(|()| guarded.store.check_alive()).err().unwrap_or(error)
}

fn pull(
    shared: &Shared,
    handle: &Arc<StoreHandle>,
    (size_bytes, pass): (u64, Pass),
    (source, pace): (Source, Pace),
    regions: &[u32],
) -> Result<Pulled> {
    let mut puller = Puller {
        shared,
        handle,
        pass,
        size_bytes,
        source,
        asked: HashMap::new(),
        reads_in_flight: 0,
        runs: VecDeque::new(),
        open: HashMap::new(),
        pulled: Pulled::default(),
        pace,
    };
    let mut waiting: VecDeque<u32> = regions.iter().copied().collect();
    while !(waiting.is_empty() && puller.asked.is_empty() && puller.runs.is_empty()) {
        puller.ask(&mut waiting)?;
        puller.take_reply()?;
    }
    Ok(puller.pulled)
}

impl Puller<'_> {
    /// Keeps the source busy, within limits.
    fn ask(&mut self, waiting: &mut VecDeque<u32>) -> Result<()> {
        while self.reads_in_flight < READS_IN_FLIGHT_MAX {
            let Some(&(region, first_block, count)) = self.runs.front() else { break };
            let wait = self.pace.wait();
            if !wait.is_zero() {
                // With nothing under way nobody would wake us.
                if self.asked.is_empty() && !self.source.spoke_within(wait)? {
                    continue;
                }
                break;
            }
            self.runs.pop_front();
            self.pace.spend(count * BLOCK_BYTES);
            let id = self.source.ask(kind::READ, first_block * BLOCK_BYTES, count * BLOCK_BYTES)?;
            self.asked.insert(id, Asked::Read { region, first_block, count });
            self.reads_in_flight += 1;
        }
        while self.asked.len() - self.reads_in_flight < SUMMARIES_IN_FLIGHT_MAX
            && self.runs.len() < RUNS_WAITING_MAX
        {
            let Some(region) = waiting.pop_front() else { break };
            let offset = u64::from(region) * REGION_BYTES;
            if offset >= self.size_bytes {
                return Err(StoreError::new(ErrorKind::BadRequest, format!("there is no region {region}")));
            }
            let length = REGION_BYTES.min(self.size_bytes - offset);
            let id = self.source.ask(kind::REGION_SUMMARY, offset, length)?;
            self.asked.insert(id, Asked::Summary { region });
        }
        Ok(())
    }

    fn take_reply(&mut self) -> Result<()> {
        let (header, payload) = self.source.receive()?;
        let Some(asked) = self.asked.remove(&header.request_id) else {
            return Err(source_failed("it answered what was not asked"));
        };
        match header.status {
            status::OK => {}
            status::STALE_EPOCH => {
                return Err(StoreError::new(ErrorKind::StaleEpoch, "the source is in another epoch"));
            }
            code => return Err(source_failed(&format!("it answered with status {code}"))),
        }
        match asked {
            Asked::Summary { region } => self.compare(region, &payload),
            Asked::Read { region, first_block, count } => {
                self.reads_in_flight -= 1;
                self.copy(region, first_block, count, &payload)
            }
        }
    }

    /// Zeroes what must be zero, and lists what must be read.
    fn compare(&mut self, region: u32, summary: &[u8]) -> Result<()> {
        let mut guarded = self.handle.ensure_marked(self.shared, region..=region, true)?;
        let compared = guarded.store.compare_region(&self.pass, region, summary, &mut self.pulled.tally);
        let committed = guarded.store.commit();
        self.shared.settle(self.handle, &mut guarded);
        drop(guarded);
        let (pull, runs) = compared?;
        committed?;
        self.runs.extend(runs.into_iter().map(|(first_block, count)| (region, first_block, count)));
        self.open.insert(region, pull);
        self.close_if_done(region)
    }

    /// Verifies what was read and writes it.
    fn copy(&mut self, region: u32, first_block: u64, count: u64, payload: &[u8]) -> Result<()> {
        let (entries, data) = verified_reply(first_block, count, payload)?;
        let pull = self.open.get_mut(&region).expect("a region that is read is open");
        let mut guarded = self.handle.ensure_marked(self.shared, region..=region, true)?;
        let tally = &mut self.pulled.tally;
        let copied = guarded.store.copy_run(&self.pass, pull, first_block, (&entries, data), tally);
        let committed = guarded.store.commit();
        self.shared.settle(self.handle, &mut guarded);
        drop(guarded);
        copied?;
        committed?;
        self.close_if_done(region)
    }

    fn close_if_done(&mut self, region: u32) -> Result<()> {
        if self.open.get(&region).is_some_and(RegionPull::reads_are_done) {
            let pull = self.open.remove(&region).expect("it is there");
            let done = self.handle.lock(self.shared).store.finish_region(&self.pass, &pull)?;
            self.pulled.regions += u64::from(done);
        }
        Ok(())
    }
}

fn source_failed(why: &str) -> StoreError {
    StoreError::new(ErrorKind::SourceFailed, format!("the source failed: {why}"))
}

fn unreachable(why: &str) -> StoreError {
    StoreError::new(ErrorKind::Unreachable, format!("the source is gone: {why}"))
}

/// The connection to the source.
struct Source {
    fd: OwnedFd,
    epoch: u64,
    next_id: u64,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

impl Source {
    fn ask(&mut self, kind: u8, offset_bytes: u64, length_bytes: u64) -> Result<u64> {
        let request_id = self.next_id;
        self.next_id += 1;
        let header = Header {
            kind,
            request_id,
            epoch: self.epoch,
            offset_bytes,
            length_bytes: length_bytes as u32,
            ..Header::default()
        };
        let bytes = header.encode();
        let mut sent = 0;
        while sent < bytes.len() {
            match send(&self.fd, &bytes[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(unreachable(&error.to_string())),
            }
        }
        Ok(request_id)
    }

    fn receive(&mut self) -> Result<(Header, Vec<u8>)> {
        let mut first = [0; HEADER_BYTES];
        self.receive_exactly(&mut first)?;
        let header = Header::decode(&first).map_err(|why| source_failed(&format!("a bad frame: {why:?}")))?;
        if header.kind & REPLY == 0 {
            return Err(source_failed("a request where replies belong"));
        }
        let mut payload = vec![0; header.payload_bytes as usize];
        self.receive_exactly(&mut payload)?;
        Ok((header, payload))
    }

    fn receive_exactly(&mut self, wanted: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < wanted.len() {
            if self.start == self.end {
                // The rest of a large payload goes straight to its place.
                let direct = wanted.len() - done >= self.input.len();
                let place = if direct { &mut wanted[done..] } else { &mut self.input[..] };
                match recv(&self.fd, place, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => return Err(unreachable("it closed the connection")),
                    Ok((count, _)) if direct => done += count,
                    Ok((count, _)) => (self.start, self.end) = (0, count),
                    Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(unreachable(&error.to_string())),
                }
                continue;
            }
            let count = (self.end - self.start).min(wanted.len() - done);
            wanted[done..done + count].copy_from_slice(&self.input[self.start..self.start + count]);
            self.start += count;
            done += count;
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags) -> Result<()> {
        match self.poll(flags, SILENCE_MAX)? {
            true => Ok(()),
            false => Err(unreachable("it said nothing for 10 s")),
        }
    }

    /// Waits although nothing was asked for. True: the source says something all the same, its end above all.
    fn spoke_within(&self, wait: Duration) -> Result<bool> {
        Ok(self.start < self.end || self.poll(PollFlags::IN, wait)?)
    }

    /// Whether it got ready in time.
    fn poll(&self, flags: PollFlags, time: Duration) -> Result<bool> {
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.fd, flags)], Some(&timeout)) {
                Ok(count) => return Ok(count > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(unreachable(&error.to_string())),
            }
        }
    }
}
