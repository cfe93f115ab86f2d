//! Coded averages over hosts: what travels is how far a host's mean has come from the reference,
//! which all hosts have, and what of that its codes have rounded away before.

use super::mean::{mean_of, piece, Place};
use crate::hosts::{Hosts, HostsError, HostsLimit};
use crate::stage::{Span, Values};
use crate::{Compression, Dtype};

/// Least share of the weights with which a host sends what it owes.
const LEAST_SHARE: f32 = 1.0 / 1024.0;

/// State of a rank's codes, for the values of its shard that are in f32.
#[derive(Default)]
struct State {
    /// The values that all hosts have had last.
    reference: Vec<f32>,
    /// Rest of this host's differences that its codes have rounded away, times the host's share of
    /// the weights: in the units of the mean, so that weights may change.
    own: Vec<f32>,
    /// Rest of the mean differences, for this host's part of each piece.
    mean: Vec<f32>,
}

/// A rank's part of coded averages over hosts.
pub(super) struct Coded {
    code: Compression,
    /// State after the last average that was committed, and after the one under way.
    now: State,
    next: State,
    /// True if `now` has a reference. With an outer optimizer that is its anchor.
    is_set: bool,
    has_outer: bool,
    /// True if the last average of all hosts has made `next`.
    is_made: bool,
    /// Values and codes of a piece.
    values: Vec<f32>,
    sent: Vec<u8>,
    received: Vec<u8>,
}

impl Coded {
    pub(super) fn new(code: Compression, has_outer: bool) -> Coded {
        let [now, next] = Default::default();
        let (values, sent, received) = Default::default();
        let (is_set, is_made) = (false, false);
        Coded { code, now, next, is_set, has_outer, is_made, values, sent, received }
    }

    /// True if there is a reference, the same on all hosts: the result of the last average, or the
    /// anchor of an outer optimizer.
    pub(super) fn is_set(&self, has_anchor: bool) -> bool {
        if self.has_outer {
            has_anchor
        } else {
            self.is_set
        }
    }

    /// Bytes of state and buffers.
    pub(super) fn bytes(&self) -> usize {
        let of = |state: &State| {
            state.reference.capacity() + state.own.capacity() + state.mean.capacity()
        };
        4 * (of(&self.now) + of(&self.next) + self.values.capacity())
            + self.sent.capacity()
            + self.received.capacity()
    }

    /// Sets the reference to the anchor of the outer optimizer.
    ///
    /// # Safety
    /// The spans' values are initialised, and nothing changes them.
    pub(super) unsafe fn refer_to(&mut self, anchors: &[Span]) {
        self.now.reference.clear();
        // SAFETY: guaranteed by the caller.
        unsafe { append(anchors, &mut self.now.reference) };
    }

    /// Notes an average that was made in full: its result is the next reference, and nothing is
    /// owed.
    ///
    /// # Safety
    /// The spans' values are initialised, and nothing changes them.
    pub(super) unsafe fn made_in_full(&mut self, spans: &[Span]) {
        let State { reference, own, mean } = &mut self.next;
        [&mut *reference, &mut *own, mean].into_iter().for_each(|values| values.clear());
        if !self.has_outer {
            // SAFETY: guaranteed by the caller.
            unsafe { append(spans, reference) };
        }
        self.is_made = true;
    }

    /// Notes that the last average of all hosts was committed.
    pub(super) fn commit(&mut self) {
        if std::mem::take(&mut self.is_made) {
            let State { reference, own, mean } = &mut self.next;
            std::mem::swap(&mut self.now.own, own);
            std::mem::swap(&mut self.now.mean, mean);
            if !self.has_outer {
                std::mem::swap(&mut self.now.reference, reference);
            }
            self.is_set = true;
        }
    }

    /// Replaces the values in f32 by the reference and the weighted mean of all hosts' differences
    /// from it, both sent in code. All hosts get the same bits.
    ///
    /// # Safety
    /// The spans' values are initialised, and nothing else uses them.
    pub(super) unsafe fn average(
        &mut self,
        link: &mut dyn Hosts,
        spans: &[Span],
        weights: &[f64],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        self.is_made = false;
        let Coded { code, has_outer, now, next, values: buffer, sent, received, .. } = self;
        let (code, has_outer, hosts) = (*code, *has_outer, weights.len());
        // A host of no weight sends nothing, and goes on to owe what it owes. One of little weight
        // pays nothing of it: as a difference of its own it might be too large.
        let most = weights.iter().copied().fold(0.0, f64::max); // or their sum may be infinity
        let all: f64 = weights.iter().map(|weight| weight / most).sum();
        let share = (weights[link.host()] / most / all) as f32;
        let (sends, pays) = (share > 0.0, share > LEAST_SHARE);
        let payment = if pays { 1.0 / share } else { 0.0 };
        let kept = if pays { 0.0 } else { 1.0 };
        // SAFETY: guaranteed by the caller. Spans are disjoint.
        let spans = spans.iter().map(|span| unsafe { span.values() });
        let mut values: Vec<&mut [f32]> = spans.filter_map(of_f32).collect();
        let all: usize = values.iter().map(|values| values.len()).sum();
        let most = piece(hosts) / size_of::<f32>() / hosts;
        let pieces = (0..all).step_by(most * hosts).map(|begin| {
            let count = (all - begin).min(most * hosts);
            (begin, count, count.div_ceil(hosts))
        });
        let parts: usize = pieces.clone().map(|(.., part)| part).sum();
        for (state, length) in [(&mut now.own, all), (&mut now.mean, parts)] {
            state.resize(length, 0.0); // nothing was owed
        }
        for (state, length) in [(&mut next.own, all), (&mut next.mean, parts)] {
            state.resize(length, 0.0);
        }
        next.reference.clear();
        next.reference.reserve_exact(if has_outer { 0 } else { all });
        let (mut from, mut to, mut before) = (Place::default(), Place::default(), 0);
        for (begin, count, part) in pieces {
            let (many, length) = (part * hosts, code.length(part));
            buffer.resize(2 * many + part, 0.0);
            let (differences, rest) = buffer.split_at_mut(many);
            let (decoded, mean) = rest.split_at_mut(many);
            sent.resize(length * hosts, 0);
            received.resize(length * hosts, 0);
            let reference = &now.reference[begin..][..count];
            let own = &now.own[begin..][..count];
            from.each(&mut values, count, |at, run| {
                let known = reference[at..].iter().zip(&own[at..]);
                for ((to, value), (reference, own)) in
                    differences[at..].iter_mut().zip(run).zip(known)
                {
                    *to = if sends { *value - reference + own * payment } else { 0.0 };
                }
            });
            differences[count..].fill(0.0);
            for (codes, values) in sent.chunks_mut(length).zip(differences.chunks(part)) {
                code.encode(values, codes);
            }
            decode_parts(code, part, sent, decoded);
            let rests = differences.iter().zip(&*decoded).zip(own);
            for (next, ((value, decoded), own)) in next.own[begin..][..count].iter_mut().zip(rests)
            {
                *next = own * kept + (value - decoded) * share;
            }
            link.all_to_all(sent, received, limit)?;
            decode_parts(code, part, received, decoded);
            mean_of(decoded, weights, mean);
            let (owed, owes) = (&now.mean[before..][..part], &mut next.mean[before..][..part]);
            mean.iter_mut().zip(owed).for_each(|(mean, owed)| *mean += owed);
            code.encode(mean, &mut sent[..length]);
            code.decode(&sent[..length], &mut decoded[..part]);
            for ((owes, value), decoded) in owes.iter_mut().zip(&*mean).zip(&*decoded) {
                *owes = value - decoded;
            }
            link.all_gather(&sent[..length], received, limit)?;
            decode_parts(code, part, received, decoded);
            to.each(&mut values, count, |at, run| {
                let known = reference[at..].iter().zip(&decoded[at..]);
                run.iter_mut().zip(known).for_each(|(to, (reference, change))| {
                    *to = reference + change;
                });
                if !has_outer {
                    next.reference.extend_from_slice(run);
                }
            });
            before += part;
        }
        self.is_made = true;
        Ok(())
    }
}

/// Decodes the codes of parts that follow one another.
fn decode_parts(code: Compression, part: usize, codes: &[u8], values: &mut [f32]) {
    let parts = codes.chunks(code.length(part)).zip(values.chunks_mut(part));
    parts.for_each(|(codes, values)| code.decode(codes, values));
}

fn of_f32(values: Values<'_>) -> Option<&mut [f32]> {
    match values {
        Values::F32(values) => Some(values),
        Values::F64(_) => None,
    }
}

/// Appends the values that are in f32.
///
/// # Safety
/// The spans' values are initialised, and nothing changes them.
unsafe fn append(spans: &[Span], to: &mut Vec<f32>) {
    let all = spans.iter().filter(|span| span.dtype != Dtype::F64).map(|span| span.elements);
    to.reserve_exact(all.sum());
    // SAFETY: guaranteed by the caller.
    let values = spans.iter().filter_map(|span| of_f32(unsafe { span.values() }));
    values.for_each(|values| to.extend_from_slice(values));
}
