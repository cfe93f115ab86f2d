//! States of a `LocalSgd` for serde.

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::StateError;
use crate::saved::Sections;

/// State of a [`LocalSgd`](crate::LocalSgd), as a field of a trainer's own checkpoint: the bytes of
/// [`save`](crate::LocalSgd::save), checked when it is deserialized.
///
/// ```
/// # use param_averager::{Communicator, Device, LocalSgd, ParamAverager, SavedState, Schedule};
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Checkpoint {
///     model: Vec<f32>,
///     sgd: SavedState,
/// }
/// # Communicator::run(&[Device::cpu()], |communicator| -> param_averager::Result<()> {
/// # let mut model = vec![0.0f32; 10];
/// # let averager = ParamAverager::builder(communicator).build(&mut model)?;
/// # let mut sgd = LocalSgd::new(averager, Schedule::every(8));
/// sgd.sync(&mut model)?;
/// let checkpoint = Checkpoint { model: model.clone(), sgd: sgd.save()?.try_into().unwrap() };
/// let json = serde_json::to_string(&checkpoint).unwrap();
/// let checkpoint: Checkpoint = serde_json::from_str(&json).unwrap();
/// sgd.load(checkpoint.sgd.as_ref())?;
/// # Ok(())
/// # })?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState(Vec<u8>);

impl TryFrom<Vec<u8>> for SavedState {
    type Error = StateError;

    fn try_from(bytes: Vec<u8>) -> Result<SavedState, StateError> {
        Sections::from_bytes(&bytes)?;
        Ok(SavedState(bytes))
    }
}

impl AsRef<[u8]> for SavedState {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<SavedState> for Vec<u8> {
    fn from(state: SavedState) -> Vec<u8> {
        state.0
    }
}

impl Serialize for SavedState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for SavedState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SavedState, D::Error> {
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// Visitor of a saved state: bytes, or a sequence of numbers in formats such as JSON.
struct Bytes;

impl<'de> Visitor<'de> for Bytes {
    type Value = SavedState;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of LocalSgd::save")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<SavedState, E> {
        self.visit_byte_buf(bytes.to_owned())
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<SavedState, E> {
        SavedState::try_from(bytes).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<SavedState, A::Error> {
        let mut bytes = vec![];
        while let Some(byte) = numbers.next_element()? {
            bytes.push(byte);
        }
        self.visit_byte_buf(bytes)
    }
}
