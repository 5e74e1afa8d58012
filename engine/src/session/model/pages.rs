//! The snapshot of a session in the model.

use snapshot_format::Reason;

use crate::session::failure::{Failure, FailureKind};
use crate::session::platform::{Content, FrameId, Image, PageNumber, Run};

/// Returns the content of a page, whose number is its initial place.
pub(super) fn content_of(page: u64) -> u8 {
    u8::try_from(page).unwrap() + 1
}

/// The snapshot of the model: page n repeats n + 1 and is in frame n / 2, slot n % 2.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pages {
    /// The damaged frame.
    pub(super) damaged: Option<u64>,
}

impl Pages {
    /// Returns whether `page` is in the damaged frame.
    pub(super) fn is_damaged(&self, page: PageNumber) -> bool {
        self.damaged == Some(page / 2)
    }
}

impl Image for Pages {
    /// The number of the frame.
    type Frame = u64;
    /// The bytes of the last frame, as far as it is decoded.
    type Decoder = Vec<u8>;

    fn id(&self, frame: &u64) -> FrameId {
        FrameId {
            layer: 0,
            offset: *frame,
        }
    }

    fn content(&self, page: PageNumber, _: Reason) -> Result<Content<u64>, Failure> {
        Ok(Content::Stored(page / 2, u16::try_from(page % 2).unwrap()))
    }

    fn slots(&self, _: &u64) -> u16 {
        2
    }

    fn decode(
        &self,
        decoder: &mut Self::Decoder,
        frame: &u64,
        slots: u16,
        _: Reason,
    ) -> Result<(), Failure> {
        decoder.clear();
        if self.damaged == Some(*frame) {
            return Err(Failure {
                kind: FailureKind::Damaged,
                ..self.failure("damaged".to_owned())
            });
        }
        for page in (frame * 2..).take(slots.into()) {
            decoder.resize(decoder.len() + 4096, 0);
            let start = decoder.len() - 4096;
            decoder[start] = content_of(page);
        }
        Ok(())
    }

    fn runs(
        &self,
        decoder: &mut Self::Decoder,
        _: PageNumber,
        _: Reason,
        runs: &mut Vec<Run>,
    ) -> usize {
        runs.clear();
        runs.push(Run {
            page: first_page(decoder),
            slot: 0,
            count: 2,
        });
        runs.len()
    }

    fn bytes<'a>(&self, decoder: &'a Self::Decoder) -> &'a [u8] {
        decoder
    }

    fn failure(&self, detail: String) -> Failure {
        Failure {
            file: "model".to_owned(),
            offset: None,
            page: 0,
            address: None,
            kind: FailureKind::Io,
            detail,
        }
    }
}

/// Returns the first page of the last frame decoded.
fn first_page(decoder: &[u8]) -> PageNumber {
    decoder.first().map_or(0, |first| u64::from(*first) - 1)
}
