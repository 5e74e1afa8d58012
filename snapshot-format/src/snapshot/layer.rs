//! One file of a chain: its store, its checked ends, the ancestors that it lists, and its
//! dictionaries.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::ancestors::{Ancestor, name_property};
use super::{buffer, get_or_try};
use crate::error::{Defect, Flaw, OpenError, Part, ReadError};
use crate::index::records;
use crate::layout::{
    HEADER_BYTES, PAGES_PER_BLOCK_U64, RawAncestorEntry, SectionKind, TRAILER_BYTES,
};
use crate::open::{self, Ends, Tail};
use crate::sections::{self, Blob, Section};
use crate::store::{FileStore, Reason, Store};
use crate::types::SnapshotId;

/// Number of bytes of a blob that are in memory at a time.
const PIECE: usize = 64 << 10;

/// One open file of a snapshot: the snapshot's own file, or one of its ancestors.
///
/// Several snapshots can share one layer, so that a file that they have in common is open once.
pub struct Layer {
    store: Arc<dyn Store>,
    name: String,
    ends: Ends,
    /// Ancestors that the file lists.
    listed: Vec<Ancestor>,
    dictionaries: OnceLock<Vec<Dictionary>>,
    is_absent: bool,
}

/// A dictionary of the file, and its prepared form once it was needed.
struct Dictionary {
    blob: Blob,
    prepared: OnceLock<Prepared>,
}

/// A dictionary that was read and checked.
struct Prepared {
    digested: zstd::zstd_safe::DDict<'static>,
    /// The dictionary's bytes, for contexts that digest them themselves.
    bytes: Vec<u8>,
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer")
            .field("name", &self.name)
            .field("id", &self.ends.id)
            .finish_non_exhaustive()
    }
}

impl Layer {
    /// Opens the snapshot file in `store` as an ancestor of another: reads and checks its trailer
    /// and its list of ancestors, and opens none of them.
    pub fn open(store: Arc<dyn Store>) -> Result<Self, OpenError> {
        let (ends, tail) = open::ends(&*store, TRAILER_BYTES)?;
        let mut layer = Self::new(store, ends);
        layer.read_listed(&tail)?;
        Ok(layer)
    }

    /// Opens the regular file or block device at `path` as [`Layer::open`] does.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open(FileStore::open_snapshot(path.as_ref())?)
    }

    /// Creates a layer that doesn't know its ancestors yet.
    pub(super) fn new(store: Arc<dyn Store>, ends: Ends) -> Self {
        let name = store.name();
        Self {
            store,
            name,
            ends,
            listed: Vec::new(),
            dictionaries: OnceLock::new(),
            is_absent: false,
        }
    }

    /// Creates a stand-in for the file of an ancestor that is missing, of which nothing can be
    /// read. A snapshot that was opened with it can be given [another base](crate::rebase).
    pub fn absent(wanted: &Ancestor) -> Self {
        let name = match &wanted.name[..] {
            "" => wanted.id.to_string(),
            name => format!("{name} ({})", wanted.id),
        };
        let ends = Ends::absent(wanted.id, wanted.file_bytes, wanted.trailer_hash);
        let store = Arc::new(AbsentStore {
            name,
            file_bytes: wanted.file_bytes,
        });
        Self {
            is_absent: true,
            ..Self::new(store, ends)
        }
    }

    /// Returns whether the layer stands in for a file that is [missing](Layer::absent).
    pub fn is_absent(&self) -> bool {
        self.is_absent
    }

    /// Returns the id of the file.
    pub fn id(&self) -> SnapshotId {
        self.ends.id
    }

    /// Returns the name of the file in messages, which is the store's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the length of the file, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.ends.file_bytes
    }

    /// Returns whether the content of the two files is the same, as far as their trailers tell.
    /// Files with other content can claim as much.
    pub fn claims_content_of(&self, other: &Self) -> bool {
        let claim = |layer: &Self| (layer.id(), layer.file_bytes(), layer.ends.trailer_hash);
        claim(self) == claim(other)
    }

    /// Returns the store that the file is read from.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Returns the store that the file is read from, to share it.
    pub fn shared_store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// Returns the ancestors that the file lists. They need not be open.
    pub fn listed_ancestors(&self) -> &[Ancestor] {
        &self.listed
    }

    /// Returns the ancestors that the file lists, with the names under which they were last known,
    /// which are read from the properties. Without those they have no names.
    pub fn named_ancestors(&self) -> Vec<Ancestor> {
        let properties = self.properties().unwrap_or_default();
        let named = self.listed.iter().map(|ancestor| {
            let key = name_property(ancestor.id);
            let known = properties.iter().find(|(known, _)| *known == key);
            Ancestor {
                name: known.map(|(_, name)| name.clone()).unwrap_or_default(),
                ..ancestor.clone()
            }
        });
        named.collect()
    }

    /// Returns the size of the file's page-number space.
    pub(crate) fn page_slots(&self) -> u64 {
        let top = self.ends.directory.get(SectionKind::Top);
        top.map_or(0, |section| section.count) * PAGES_PER_BLOCK_U64
    }

    pub(crate) fn ends(&self) -> &Ends {
        &self.ends
    }

    /// Reads the list of ancestors, if the file has one. `tail` is the end of the file.
    pub(super) fn read_listed(&mut self, tail: &Tail) -> Result<(), OpenError> {
        let Some(section) = self.ends.directory.get(SectionKind::Ancestors) else {
            return Ok(());
        };
        let part = Part::Section(SectionKind::Ancestors);
        let mut bytes = buffer(section.len).map_err(|source| OpenError::Io {
            file: self.name.clone(),
            part,
            offset: section.offset,
            len: section.len,
            source,
        })?;
        tail.read_exact_at(&*self.store, part, &mut bytes, section.offset)?;
        self.listed = check_listed(&bytes, section).map_err(|flaw| {
            let (offset, defect) = (flaw.at, flaw.defect);
            OpenError::Damaged {
                file: self.name.clone(),
                part,
                offset,
                defect,
            }
        })?;
        if self.listed.iter().any(|ancestor| ancestor.id == self.id()) {
            return Err(OpenError::AncestorCycle {
                file: self.name.clone(),
                id: self.id(),
                ancestor: self.name.clone(),
            });
        }
        Ok(())
    }

    /// Adds the names under which the ancestors were last known.
    pub(super) fn name_listed(&mut self) {
        self.listed = self.named_ancestors();
    }
}

/// The store of a file that is missing.
#[derive(Debug)]
struct AbsentStore {
    name: String,
    file_bytes: u64,
}

impl Store for AbsentStore {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file_bytes)
    }

    fn read_exact_at(&self, _buf: &mut [u8], _offset: u64, _reason: Reason) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the file is missing",
        ))
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// Checks a section of ancestors.
fn check_listed(bytes: &[u8], section: &Section) -> Result<Vec<Ancestor>, Flaw> {
    let (stored, computed) = (section.crc, crc32fast::hash(bytes));
    if stored != computed {
        let defect = Defect::Checksum { stored, computed };
        return Err(Flaw::new(section.offset, defect));
    }
    let mut seen = HashSet::new();
    let mut listed = Vec::with_capacity(bytes.len() / size_of::<RawAncestorEntry>());
    for (number, raw) in records::<RawAncestorEntry>(bytes).iter().enumerate() {
        let at = section.offset + (number * size_of::<RawAncestorEntry>()) as u64;
        if raw.reserved.get() != 0 {
            let field = "reserved bytes of an ancestor";
            return Err(Flaw::new(at, Defect::Reserved { field }));
        }
        let id = SnapshotId(raw.snapshot_id);
        if !seen.insert(id) {
            let defect = Defect::Text {
                field: "id of an ancestor",
                detail: "appears twice".into(),
            };
            return Err(Flaw::new(at, defect));
        }
        listed.push(Ancestor {
            id,
            file_bytes: raw.file_bytes.get(),
            trailer_hash: Some(raw.trailer_hash).filter(|hash| *hash != [0; 32]),
            name: String::new(),
        });
    }
    Ok(listed)
}

/// Reading and checking, used by everything that follows.
impl Layer {
    /// Compares the header with the trailer: for the verifier.
    pub(crate) fn check_header(&self) -> Result<(), ReadError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read(Part::Header, &mut bytes, 0, Reason::Verify)?;
        open::check_header(&bytes, &self.ends)
            .map_err(|defect| self.damaged(Part::Header, Flaw::new(0, defect)))
    }

    /// Reads bytes whose length was checked against a limit and the file.
    pub(crate) fn read_checked(
        &self,
        part: Part,
        offset: u64,
        len: u64,
        crc: u32,
    ) -> Result<Vec<u8>, ReadError> {
        let mut bytes = buffer(len).map_err(|source| ReadError::Io {
            file: self.name.clone(),
            part,
            offset,
            len,
            source,
        })?;
        self.read(part, &mut bytes, offset, Reason::Open)?;
        self.check_crc(part, offset, crc, crc32fast::hash(&bytes))?;
        Ok(bytes)
    }

    pub(crate) fn check_crc(
        &self,
        part: Part,
        offset: u64,
        stored: u32,
        computed: u32,
    ) -> Result<(), ReadError> {
        if stored == computed {
            return Ok(());
        }
        let defect = Defect::Checksum { stored, computed };
        Err(self.damaged(part, Flaw::new(offset, defect)))
    }

    pub(crate) fn read(
        &self,
        part: Part,
        buf: &mut [u8],
        offset: u64,
        reason: Reason,
    ) -> Result<(), ReadError> {
        self.store
            .read_exact_at(buf, offset, reason)
            .map_err(|source| ReadError::Io {
                file: self.name.clone(),
                part,
                offset,
                len: buf.len() as u64,
                source,
            })
    }

    pub(crate) fn damaged(&self, part: Part, flaw: Flaw) -> ReadError {
        ReadError::Damaged {
            file: self.name.clone(),
            part,
            offset: flaw.at,
            defect: flaw.defect,
        }
    }

    pub(crate) fn optional_section(
        &self,
        kind: SectionKind,
    ) -> Result<Option<(&Section, Vec<u8>)>, ReadError> {
        let Some(section) = self.ends.directory.get(kind) else {
            return Ok(None);
        };
        let part = Part::Section(kind);
        let bytes = self.read_checked(part, section.offset, section.len, section.crc)?;
        Ok(Some((section, bytes)))
    }

    pub(crate) fn blobs(&self, kind: SectionKind) -> Result<Vec<Blob>, ReadError> {
        let Some((section, bytes)) = self.optional_section(kind)? else {
            return Ok(Vec::new());
        };
        sections::blobs(&bytes, section, kind, self.ends.body)
            .map_err(|flaw| self.damaged(Part::Section(kind), flaw))
    }

    /// Reads a blob piece by piece, passes the pieces on, and returns an error at the end if its
    /// checksum is wrong.
    pub(crate) fn check_blob<E: From<ReadError>>(
        &self,
        part: Part,
        blob: &Blob,
        reason: Reason,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut hasher = crc32fast::Hasher::new();
        let mut piece = vec![0; usize::try_from(blob.len).map_or(PIECE, |len| len.min(PIECE))];
        let mut done = 0;
        while done < blob.len {
            let len = usize::try_from(blob.len - done).map_or(PIECE, |left| left.min(PIECE));
            let piece = &mut piece[..len];
            self.read(part, piece, blob.offset + done, reason)?;
            hasher.update(piece);
            each(piece)?;
            done += len as u64;
        }
        Ok(self.check_crc(part, blob.offset, blob.crc, hasher.finalize())?)
    }

    /// Reads a section piece by piece, only to check it.
    pub(crate) fn check_section(&self, section: &Section, part: Part) -> Result<(), ReadError> {
        let blob = Blob {
            offset: section.offset,
            len: section.len,
            crc: section.crc,
            tag: 0,
            name: String::new(),
        };
        self.check_blob(part, &blob, Reason::Verify, |_| Ok(()))
    }

    /// Returns the writer's properties, sorted by key.
    pub(crate) fn properties(&self) -> Result<Vec<(String, String)>, ReadError> {
        let kind = SectionKind::Properties;
        let Some((section, bytes)) = self.optional_section(kind)? else {
            return Ok(Vec::new());
        };
        sections::properties(&bytes, section)
            .map_err(|flaw| self.damaged(Part::Section(kind), flaw))
    }
}

/// Dictionaries, for the decoder and the verifier.
impl Layer {
    /// Reads and prepares all dictionaries.
    pub(super) fn prepare(&self) -> Result<(), ReadError> {
        for dictionary in self.dictionary_table()? {
            self.prepared(dictionary)?;
        }
        Ok(())
    }

    /// Returns number and length of each dictionary.
    pub(super) fn dictionary_lengths(&self) -> Result<Vec<(u16, u64)>, ReadError> {
        let table = self.dictionary_table()?.iter();
        // `sections::blobs` has checked that the number fits.
        let number = |dictionary: &Dictionary| u16::try_from(dictionary.blob.tag).unwrap_or(0);
        Ok(table
            .map(|dictionary| (number(dictionary), dictionary.blob.len))
            .collect())
    }

    /// Returns the prepared dictionary for the number that a frame of this file names.
    pub(crate) fn dictionary(
        &self,
        number: u16,
    ) -> Result<&zstd::zstd_safe::DDict<'static>, ReadError> {
        Ok(&self.numbered(number)?.digested)
    }

    /// Returns the bytes of the dictionary for the number that a frame of this file names.
    pub(crate) fn dictionary_bytes(&self, number: u16) -> Result<&[u8], ReadError> {
        Ok(&self.numbered(number)?.bytes)
    }

    fn numbered(&self, number: u16) -> Result<&Prepared, ReadError> {
        let known = self
            .dictionary_table()?
            .iter()
            .find(|dictionary| dictionary.blob.tag == u32::from(number));
        if let Some(dictionary) = known {
            return self.prepared(dictionary);
        }
        let section = self.ends.directory.get(SectionKind::Dictionaries);
        let what = format!("dictionary {number}").into();
        let flaw = Flaw::new(
            section.map_or(0, |section| section.offset),
            Defect::Missing { what },
        );
        Err(self.damaged(Part::Section(SectionKind::Dictionaries), flaw))
    }

    /// Returns the first `most` dictionaries, with their numbers.
    pub(crate) fn first_dictionaries(&self, most: usize) -> Result<Vec<(u16, &[u8])>, ReadError> {
        let table = self.dictionary_table()?.iter().take(most);
        let read = table.filter_map(|dictionary| {
            // No frame can name a larger number.
            let number = u16::try_from(dictionary.blob.tag).ok()?;
            let prepared = self.prepared(dictionary);
            Some(prepared.map(|prepared| (number, &prepared.bytes[..])))
        });
        read.collect()
    }

    fn dictionary_table(&self) -> Result<&[Dictionary], ReadError> {
        let table = get_or_try(&self.dictionaries, || {
            let blobs = self.blobs(SectionKind::Dictionaries)?;
            Ok(blobs
                .into_iter()
                .map(|blob| Dictionary {
                    blob,
                    prepared: OnceLock::new(),
                })
                .collect())
        })?;
        Ok(table)
    }

    fn prepared<'a>(&self, dictionary: &'a Dictionary) -> Result<&'a Prepared, ReadError> {
        get_or_try(&dictionary.prepared, || {
            let blob = &dictionary.blob;
            let bytes = self.read_checked(Part::Dictionary, blob.offset, blob.len, blob.crc)?;
            let digested = zstd::zstd_safe::DDict::try_create(&bytes).ok_or_else(|| {
                let reason = "not a dictionary".into();
                self.damaged(
                    Part::Dictionary,
                    Flaw::new(blob.offset, Defect::Decode { reason }),
                )
            })?;
            Ok(Prepared { digested, bytes })
        })
    }
}
