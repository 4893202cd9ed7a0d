//! A client that speaks frames to a replica server over a socket pair.
#![allow(dead_code)] // each test file uses its part

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use dolmen_core::checksum::{block_checksum, fragment_checksum};
use dolmen_core::frame::{kind, Header, HEADER_BYTES};
use dolmen_core::replica::format::Stamp;
use dolmen_core::replica::recovery::{OpenOptions, Opened};
use dolmen_core::replica::service::{ReplicaService, Role};

pub const BLOCK: usize = 4096;
pub const REGION: u64 = 4 << 20;
pub const SIZE: u64 = 64 << 20;
pub const VOLUME: &str = "v";

pub fn create(service: &ReplicaService, path: &Path) {
    std::fs::create_dir(path).unwrap();
    service.create_store(path, "head", SIZE).unwrap();
}

pub fn open(service: &ReplicaService, path: &Path, epoch: u64) -> Opened {
    open_as(service, VOLUME, path, epoch)
}

pub fn open_as(service: &ReplicaService, volume: &str, path: &Path, epoch: u64) -> Opened {
    let options = OpenOptions::new(SIZE, epoch, Stamp { epoch, version: 1 });
    service.open_store(volume, path.to_owned(), &["head".to_owned()], options).unwrap()
}

/// A block whose content says who wrote it.
pub fn block(tag: u64) -> Vec<u8> {
    (0..BLOCK as u64 / 8).flat_map(|word| (tag * 1_000_003 + word).to_le_bytes()).collect()
}

pub fn blocks(tags: impl IntoIterator<Item = u64>) -> Vec<u8> {
    tags.into_iter().flat_map(block).collect()
}

pub fn write_payload(offset: u64, data: &[u8]) -> Vec<u8> {
    let first = offset / BLOCK as u64;
    let sums = data.chunks(BLOCK).zip(first..).flat_map(|(data, at)| block_checksum(at, data).to_le_bytes());
    sums.chain(data.iter().copied()).collect()
}

pub struct Client {
    pub socket: UnixStream,
    pub epoch: u64,
    next_id: u64,
    early: HashMap<u64, (Header, Vec<u8>)>,
}

impl Client {
    pub fn attach(service: &ReplicaService, epoch: u64, role: Role) -> Self {
        Self::attach_to(service, VOLUME, epoch, role)
    }

    pub fn attach_to(service: &ReplicaService, volume: &str, epoch: u64, role: Role) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        service.attach_session(volume, theirs.into(), epoch, role).unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { socket: ours, epoch, next_id: 1, early: HashMap::new() }
    }

    /// Sends one frame; returns its request id.
    pub fn send(&mut self, kind: u8, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u64 {
        let request_id = self.next_id;
        self.next_id += 1;
        let header = Header {
            kind,
            flags,
            request_id,
            epoch: self.epoch,
            offset_bytes: offset,
            length_bytes: length,
            payload_bytes: payload.len() as u32,
            status: 0,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(payload);
        self.socket.write_all(&bytes).unwrap();
        request_id
    }

    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut first = [0; HEADER_BYTES];
        self.socket.read_exact(&mut first).unwrap();
        let header = Header::decode(&first).unwrap();
        let mut payload = vec![0; header.payload_bytes as usize];
        self.socket.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    pub fn reply_to(&mut self, id: u64) -> (Header, Vec<u8>) {
        while !self.early.contains_key(&id) {
            let (header, payload) = self.receive();
            self.early.insert(header.request_id, (header, payload));
        }
        self.early.remove(&id).unwrap()
    }

    pub fn call(&mut self, kind: u8, flags: u16, offset: u64, length: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        let id = self.send(kind, flags, offset, length, payload);
        let (header, payload) = self.reply_to(id);
        (header.status, payload)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.write_with(offset, data, 0)
    }

    pub fn write_with(&mut self, offset: u64, data: &[u8], flags: u16) -> u32 {
        self.call(kind::WRITE, flags, offset, data.len() as u32, &write_payload(offset, data)).0
    }

    pub fn write_partial(&mut self, offset: u64, data: &[u8]) -> u32 {
        let mut payload = fragment_checksum(offset, data).to_le_bytes().to_vec();
        payload.extend_from_slice(data);
        self.call(kind::WRITE_PARTIAL, 0, offset, data.len() as u32, &payload).0
    }

    pub fn zero(&mut self, offset: u64, length: u32) -> u32 {
        self.call(kind::WRITE_ZEROES, 0, offset, length, &[]).0
    }

    pub fn flush(&mut self) -> u32 {
        self.call(kind::FLUSH, 0, 0, 0, &[]).0
    }

    pub fn completed(&mut self) {
        let id = self.next_id - 1;
        let header = Header { kind: kind::COMPLETED, request_id: id, epoch: self.epoch, ..Header::default() };
        self.socket.write_all(&header.encode()).unwrap();
    }

    /// Entries of a READ, and the bytes a reader would see. Verifies every checksum.
    pub fn read(&mut self, offset: u64, length: u32) -> (Vec<u64>, Vec<u8>) {
        let (status, payload) = self.call(kind::READ, 0, offset, length, &[]);
        assert_eq!(status, 0);
        let count = length as usize / BLOCK;
        let entries: Vec<u64> =
            payload[..count * 8].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let mut present = payload[count * 8..].chunks(BLOCK);
        let mut data = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            if *entry >= 3 {
                let bytes = present.next().unwrap();
                assert_eq!(block_checksum(offset / BLOCK as u64 + index as u64, bytes), *entry);
                data.extend_from_slice(bytes);
            } else {
                data.extend_from_slice(&[0; BLOCK]);
            }
        }
        assert!(present.next().is_none());
        (entries, data)
    }
}
