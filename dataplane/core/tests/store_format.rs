//! FORMAT.md's byte tables against the code: no gap, no overlap, and every field where the code puts it.

use dolmen_core::replica::format::{
    chunk_at, header_at, Record, RegionHeader, Stamp, Superblock, BIT_WORDS, GROUP_BYTES, MAP_MAGIC,
    RECORD_BYTES, REGION_HEADER_BYTES, SUPERBLOCK_USED_BYTES,
};

const FORMAT: &str = include_str!("../../../FORMAT.md");

/// The "offset | size | field" table of a section.
fn fields(section: &str) -> Vec<(usize, usize, String)> {
    let start = FORMAT.find(&format!("\n## {section}\n")).expect("a section") + 4;
    let text = &FORMAT[start..];
    let text = &text[..text.find("\n## ").unwrap_or(text.len())];
    let table = &text[text.find("| offset | size | field |").expect("a table")..];
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let cells =
        rows.map(|row| row.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>());
    cells.map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap(), row[2].to_owned())).collect()
}

fn check_whole(section: &str, size: usize) -> impl Fn(&str) -> std::ops::Range<usize> {
    let fields = fields(section);
    let mut at = 0;
    for (offset, length, name) in &fields {
        assert_eq!(*offset, at, "{section}: {name}");
        at += length;
    }
    assert_eq!(at, size, "{section}");
    move |wanted| {
        let found = fields.iter().find(|(_, _, name)| name == wanted);
        let (offset, length, _) = found.unwrap_or_else(|| panic!("{wanted}"));
        *offset..offset + length
    }
}

#[test]
fn the_superblock_is_as_documented() {
    let place = check_whole("Superblock", SUPERBLOCK_USED_BYTES);
    let bytes = Superblock { magic: MAP_MAGIC, size_bytes: 0x0102_0304, boot_id: [7; 16] }.encode();
    assert_eq!(bytes[place("magic")], *b"DLMNMAP1");
    assert_eq!(bytes[place("format_version")], 1u32.to_le_bytes());
    assert_eq!(bytes[place("size_bytes")], 0x0102_0304u64.to_le_bytes());
    assert_eq!(bytes[place("boot_id")], [7; 16]);
    assert_ne!(bytes[place("check")], [0; 8]);
}

#[test]
fn a_region_header_is_as_documented() {
    let place = check_whole("map", REGION_HEADER_BYTES);
    let bytes = RegionHeader::encode(5, &[u64::MAX; BIT_WORDS], Some(0x1122));
    assert!(bytes[place("stable")].iter().all(|byte| *byte == 0xff));
    assert_eq!(bytes[place("flags")], 1u32.to_le_bytes());
    assert_eq!(bytes[place("chunk_check")], 0x1122u64.to_le_bytes());
    assert_ne!(bytes[place("header_check")], [0; 8]);
    assert!(FORMAT.contains(&format!("4096 + {GROUP_BYTES} g")));
    assert_eq!(header_at(17), 4096 + GROUP_BYTES + 256);
    assert_eq!(chunk_at(17), 4096 + GROUP_BYTES + 4096 + 8192);
}

#[test]
fn a_region_record_is_as_documented() {
    let place = check_whole("regions", RECORD_BYTES);
    let bytes = Record::encode(5, Stamp { epoch: 9, version: 3 }, true);
    assert_eq!(bytes[place("epoch")], 9u64.to_le_bytes());
    assert_eq!(bytes[place("version")], 3u32.to_le_bytes());
    assert_eq!(bytes[place("flags")], 1u32.to_le_bytes());
    assert_ne!(bytes[place("check")], [0; 8]);
}
