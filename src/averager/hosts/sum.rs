//! Weighted mean of the shards of all hosts: each host has one part of every piece of the shard,
//! receives all hosts' values of it, and sends their mean to all. Sums are made in f64, in the
//! order of hosts, so that all hosts get the same bits.

use super::coded::Coded;
use super::mean::{mean_of, piece, Place, Value};
use crate::hosts::{Hosts, HostsError, HostsLimit};
use crate::stage::Span;

/// Buffers of the sums.
pub(super) struct Sums {
    hosts: usize,
    /// Values of a piece: to send, and received.
    send: Vec<u64>,
    receive: Vec<u64>,
    mean: Vec<u64>,
}

impl Sums {
    pub(super) fn new(hosts: usize) -> Sums {
        Sums { hosts, send: vec![], receive: vec![], mean: vec![] }
    }

    pub(super) fn bytes(&self) -> usize {
        [&self.send, &self.receive, &self.mean].map(|buffer| buffer.capacity() * 8).iter().sum()
    }

    /// Replaces the values by their mean over all hosts. A host of weight 0 only receives. Values
    /// that are equal on all hosts that count stay as they are, bit for bit, unless they are
    /// `coded`, as those in f32 can be.
    ///
    /// # Safety
    /// The spans' values are initialised, and nothing else uses them.
    pub(super) unsafe fn average(
        &mut self,
        link: &mut dyn Hosts,
        spans: &[Span],
        weights: &[f64],
        limit: &HostsLimit<'_>,
        coded: Option<&mut Coded>,
    ) -> Result<(), HostsError> {
        // SAFETY: guaranteed by the caller, here and below.
        match coded {
            Some(coded) => unsafe { coded.average(link, spans, weights, limit) },
            // SAFETY: as above.
            None => unsafe { self.average_of::<f32>(link, spans, weights, limit) },
        }?;
        // SAFETY: as above.
        unsafe { self.average_of::<f64>(link, spans, weights, limit) }
    }

    /// `average` for the values of one type.
    ///
    /// # Safety
    /// As `average`.
    unsafe fn average_of<T: Value>(
        &mut self,
        link: &mut dyn Hosts,
        spans: &[Span],
        weights: &[f64],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        // SAFETY: guaranteed by the caller. Spans are disjoint.
        let values = spans.iter().filter_map(|span| T::of(unsafe { span.values() }));
        let mut values: Vec<&mut [T]> = values.collect();
        let all: usize = values.iter().map(|values| values.len()).sum();
        let words = |values: usize| (values * size_of::<T>()).div_ceil(8);
        let most = piece(self.hosts) / size_of::<T>() / self.hosts;
        let (mut from, mut to) = (Place::default(), Place::default());
        for begin in (0..all).step_by(most * self.hosts) {
            let count = (all - begin).min(most * self.hosts);
            let part = count.div_ceil(self.hosts);
            for (buffer, length) in [
                (&mut self.send, part * self.hosts),
                (&mut self.receive, part * self.hosts),
                (&mut self.mean, part),
            ] {
                buffer.clear();
                buffer.reserve_exact(words(length));
                buffer.resize(words(length), 0); // what no value fills is 0
            }
            let send = &mut of::<T>(&mut self.send)[..part * self.hosts];
            from.each(&mut values, count, |at, run| send[at..at + run.len()].copy_from_slice(run));
            let receive = &mut of::<T>(&mut self.receive)[..part * self.hosts];
            let mean = &mut of::<T>(&mut self.mean)[..part];
            let (sent, received) = (bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive));
            link.all_to_all(sent, received, limit)?;
            mean_of(receive, weights, mean);
            let received = bytemuck::cast_slice_mut(receive);
            link.all_gather(bytemuck::cast_slice(mean), received, limit)?;
            let run_of =
                |at: usize, run: &mut [T]| run.copy_from_slice(&receive[at..][..run.len()]);
            to.each(&mut values, count, run_of);
        }
        Ok(())
    }
}

fn of<T: Value>(words: &mut [u64]) -> &mut [T] {
    bytemuck::cast_slice_mut(words)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::hosts::ThreadHosts;
    use crate::tensor::Dtype;

    /// Values of the tensors of both types.
    type Both = (Vec<Vec<f32>>, Vec<Vec<f64>>);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Any number of hosts and parts, of both types, against the sum in f64.
        #[test]
        fn all_hosts_get_the_weighted_mean(
            lengths in prop::collection::vec((0usize..40, any::<bool>()), 1..6),
            weights in prop::collection::vec(prop::sample::select(vec![0.0, 0.5, 1.0, 3e8]), 1..5),
            seed in 0u64..1000,
        ) {
            prop_assume!(weights.iter().any(|&weight| weight > 0.0));
            let value = |host: usize, tensor: usize, at: usize| {
                let mixed = (seed + 1) * (7 + 31 * host as u64 + 1009 * at as u64) + tensor as u64;
                // Some are equal on all hosts.
                if at.is_multiple_of(3) { 1.1 + tensor as f64 } else { (mixed % 1000) as f64 / 7.0 }
            };
            let hosts = weights.len();
            let results: Vec<Both> = std::thread::scope(|scope| {
                let run = |(host, mut links): (usize, Vec<ThreadHosts>)| {
                    let (lengths, weights) = (&lengths, &weights);
                    scope.spawn(move || {
                        let of = |wide: bool| -> Vec<Vec<f64>> {
                            let each = lengths.iter().enumerate().filter(|(_, l)| l.1 == wide);
                            each.map(|(tensor, (length, _))| {
                                (0..*length).map(|at| value(host, tensor, at)).collect()
                            })
                            .collect()
                        };
                        let narrow = |values: &Vec<f64>| values.iter().map(|&v| v as f32).collect();
                        let (mut wide, mut narrow): (Vec<Vec<f64>>, Vec<Vec<f32>>) =
                            (of(true), of(false).iter().map(narrow).collect());
                        let span = |dtype, address, elements| Span {
                            tensor: 0, dtype, first: 0, elements, at: 0, address,
                        };
                        let wides = wide.iter_mut().filter(|values| !values.is_empty());
                        let mut spans: Vec<Span> = wides
                            .map(|v| span(Dtype::F64, v.as_mut_ptr() as u64, v.len()))
                            .collect();
                        let narrows = narrow.iter_mut().filter(|values| !values.is_empty());
                        spans.extend(
                            narrows.map(|v| span(Dtype::F32, v.as_mut_ptr() as u64, v.len())),
                        );
                        let limit = HostsLimit::new(Duration::from_secs(60), &|| false);
                        let mut sums = Sums::new(hosts);
                        // SAFETY: the spans are those vectors, which nothing else uses.
                        unsafe { sums.average(&mut links[0], &spans, weights, &limit, None) }
                            .unwrap();
                        (narrow, wide)
                    })
                };
                let links = ThreadHosts::new(hosts, 1);
                let threads: Vec<_> = links.into_iter().enumerate().map(run).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let total: f64 = weights.iter().sum();
            let mean = |tensor, at, of: &dyn Fn(f64) -> f64| {
                let weighted = |host| weights[host] * of(value(host, tensor, at));
                (0..hosts).map(weighted).sum::<f64>() / total
            };
            for (wide, tensors) in [false, true].map(|wide| {
                let each = lengths.iter().enumerate().filter(move |(_, length)| length.1 == wide);
                (wide, each.map(|(tensor, _)| tensor).collect::<Vec<_>>())
            }) {
                for (index, &tensor) in tensors.iter().enumerate() {
                    for at in 0..lengths[tensor].0 {
                        let (found, expected, ulp) = match wide {
                            true => (results[0].1[index][at], mean(tensor, at, &|v| v), 1e-14),
                            false => (
                                results[0].0[index][at].into(),
                                mean(tensor, at, &|v| f64::from(v as f32)),
                                1e-7,
                            ),
                        };
                        let near = (found - expected).abs() <= ulp * expected.abs();
                        prop_assert!(near, "{found} {expected}");
                        if at.is_multiple_of(3) {
                            let one = 1.1 + tensor as f64;
                            let same = if wide { one } else { f64::from(one as f32) };
                            prop_assert_eq!(found.to_bits(), same.to_bits());
                        }
                    }
                }
            }
            prop_assert!(results.iter().all(|result| *result == results[0]));
        }
    }

    /// Link to hosts that all send what this one sends, with counts of what it carries.
    struct Counting {
        hosts: usize,
        calls: usize,
        bytes: usize,
    }

    impl Hosts for Counting {
        fn hosts(&self) -> usize {
            self.hosts
        }
        fn host(&self) -> usize {
            0
        }
        fn all_to_all(
            &mut self,
            send: &[u8],
            receive: &mut [u8],
            _: &HostsLimit<'_>,
        ) -> Result<(), HostsError> {
            let part = send.len() / self.hosts;
            (self.calls, self.bytes) = (self.calls + 1, self.bytes + send.len() - part);
            receive.chunks_mut(part).for_each(|from| from.copy_from_slice(&send[..part]));
            Ok(())
        }
        fn all_gather(
            &mut self,
            send: &[u8],
            receive: &mut [u8],
            _: &HostsLimit<'_>,
        ) -> Result<(), HostsError> {
            self.calls += 1;
            self.bytes += send.len() * (self.hosts - 1);
            receive.chunks_mut(send.len()).for_each(|from| from.copy_from_slice(send));
            Ok(())
        }
        fn abort(&mut self) {}
    }

    /// A rank sends 2 · (h − 1)/h of its part, for any number of hosts, and buffers stay small.
    #[test]
    fn links_carry_what_they_must_and_no_more() {
        let part = 5_000_003; // of f32, of a model of GPT-2's size among 25 ranks
        for hosts in [1, 2, 3, 64, 512, 4096] {
            let mut values = vec![1.5f32; part];
            let address = values.as_mut_ptr() as u64;
            let span =
                Span { tensor: 0, dtype: Dtype::F32, first: 0, elements: part, at: 0, address };
            let mut link = Counting { hosts, calls: 0, bytes: 0 };
            let (mut sums, weights) = (Sums::new(hosts), vec![1.0; hosts]);
            let limit = HostsLimit::new(Duration::from_secs(60), &|| false);
            // SAFETY: the span is that vector, which nothing else uses.
            unsafe { sums.average(&mut link, &[span], &weights, &limit, None) }.unwrap();
            assert!(values.iter().all(|&value| value == 1.5));
            let pieces = (4 * part).div_ceil(piece(hosts) / hosts / 4 * 4 * hosts);
            assert_eq!(link.calls, 2 * pieces);
            let least = 2 * (hosts - 1) * 4 * part / hosts;
            // One value for each host is added to the last piece at most, in both exchanges.
            let most = least + 2 * 4 * hosts;
            assert!((least..=most).contains(&link.bytes), "{hosts}: {least} {}", link.bytes);
            assert!(
                sums.bytes() <= 3 * piece(hosts).min(4 * part) + 16 * hosts,
                "{hosts}: {}",
                sums.bytes()
            );
        }
    }
}
