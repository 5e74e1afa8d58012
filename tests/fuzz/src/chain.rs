//! Inputs that consist of several files, of which each can be an ancestor of those behind it.

use std::mem::offset_of;
use std::sync::Arc;

use snaprestore_fixtures::chain::InMemory;
use snaprestore_fixtures::images::SplitMix;
use snaprestore_fixtures::pieces::{What, pieces, reseal};
use snapshot_format::digest;
use snapshot_format::layout::{
    HEADER_BYTES, RawAncestorEntry, RawTrailer, SectionKind, TRAILER_BYTES,
};
use snapshot_format::{Layer, MemoryStore, OpenError, Snapshot, SnapshotOptions};

use crate::below;

/// Files of an input.
const MAX_FILES: usize = 4;

/// Splits an input into its files, ancestors first. The trailer of each says where it begins.
pub fn split(bytes: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut files) = (bytes, Vec::new());
    while files.len() + 1 < MAX_FILES
        && let Some(len) = length(rest)
        && (HEADER_BYTES + TRAILER_BYTES..rest.len()).contains(&len)
    {
        let (before, file) = rest.split_at(rest.len() - len);
        files.push(file);
        rest = before;
    }
    if !rest.is_empty() {
        files.push(rest);
    }
    files.reverse();
    files
}

/// Returns the length that the trailer at the end of `bytes` has for its file.
fn length(bytes: &[u8]) -> Option<usize> {
    let trailer = bytes.len().checked_sub(TRAILER_BYTES)?;
    let len = &bytes[trailer + offset_of!(RawTrailer, file_bytes)..];
    usize::try_from(u64::from_le_bytes(*len.first_chunk()?)).ok()
}

/// Returns the id in a file's trailer.
fn id(file: &[u8]) -> Option<[u8; 16]> {
    let trailer = file.len().checked_sub(TRAILER_BYTES)?;
    let id = &file[trailer + offset_of!(RawTrailer, snapshot_id)..];
    id.first_chunk().copied()
}

/// Returns those of the files that can be ancestors.
pub fn ancestors(files: &[&[u8]]) -> Arc<InMemory> {
    let layers = files.iter().filter_map(|file| {
        let store = Arc::new(MemoryStore::named(file.to_vec(), "ancestor"));
        Layer::open(store).ok().map(Arc::new)
    });
    Arc::new(InMemory(layers.collect()))
}

/// Opens the snapshot in `bytes`.
pub fn open(bytes: &[u8], ancestors: &Arc<InMemory>) -> Result<Snapshot, OpenError> {
    let options = SnapshotOptions::default().ancestors(Arc::clone(ancestors) as _);
    Snapshot::open_with(Arc::new(MemoryStore::new(bytes.to_vec())), &options)
}

/// Mutates one file of an input, and returns the input's new length. Most of the time, files behind
/// it are made to refer to the mutated one.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut rng = SplitMix(seed.into());
    let mut files: Vec<Vec<u8>> = split(&data[..size]).iter().map(|f| f.to_vec()).collect();
    if files.is_empty() {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let changed = below(&mut rng, files.len());
    let old_id = id(&files[changed]);
    let room = max_size - (size - files[changed].len());
    let mut file = vec![0; room];
    let len = files[changed].len();
    file[..len].copy_from_slice(&files[changed]);
    let len = crate::mutate(&mut file, len, room, seed.rotate_left(16));
    file.truncate(len);
    files[changed] = file;
    if let Some(old_id) = old_id
        && rng.next() % 8 != 0
    {
        relink(&mut files, changed, old_id);
    }
    let bytes = files.concat();
    data[..bytes.len()].copy_from_slice(&bytes);
    bytes.len()
}

/// Makes the files behind a changed one refer to it, whose id was `old_id`, and to each other.
fn relink(files: &mut [Vec<u8>], changed: usize, old_id: [u8; 16]) {
    let mut known = vec![(old_id, record(&files[changed]))];
    for file in &mut files[changed + 1..] {
        let list = What::Section {
            kind: SectionKind::Ancestors as u32,
        };
        let lists = pieces(file).into_iter().filter(|piece| piece.what == list);
        for piece in lists.collect::<Vec<_>>() {
            let entries = file[piece.bytes].chunks_exact_mut(size_of::<RawAncestorEntry>());
            for entry in entries {
                let record = known.iter().find(|(id, _)| entry.starts_with(id));
                if let Some((_, Some(record))) = record {
                    entry.copy_from_slice(record);
                }
            }
        }
        reseal(file);
        known.extend(id(file).map(|id| (id, record(file))));
    }
}

/// Returns the record of an ancestor.
fn record(file: &[u8]) -> Option<[u8; size_of::<RawAncestorEntry>()]> {
    let mut record = [0; size_of::<RawAncestorEntry>()];
    record[..16].copy_from_slice(&id(file)?);
    let len = (file.len() as u64).to_le_bytes();
    record[offset_of!(RawAncestorEntry, file_bytes)..][..8].copy_from_slice(&len);
    let hash = digest::stored(&file[file.len() - TRAILER_BYTES..]);
    record[offset_of!(RawAncestorEntry, trailer_hash)..].copy_from_slice(&hash);
    Some(record)
}
