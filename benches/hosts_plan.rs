//! Bytes, messages and seconds of averages over 64, 512 and 4,096 hosts with 8 ranks each: `cargo
//! bench --bench hosts_plan`. The averages of one host are made, with a link that counts, and whose
//! other hosts send what this one sends. With `-- --test`, a small model.
//!
//! Seconds are computed: the messages between hosts in a row, each with the latency of a link, and
//! the bytes that a host sends at its rate. Time within a host is not counted. The flat ring has
//! neighbours in the order of hosts, so that a value crosses a link with every 8th message; the
//! tree is binary and pipelined, as NCCL's. This crate's messages are counted as if each waited for
//! the one before.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use param_averager::{
    Communicator, Device, Hierarchy, Hosts, HostsError, HostsLimit, ParamAverager, Result,
};

const RANKS: usize = 8;
/// Links of a host: name, bytes in a second, seconds of a message.
const LINKS: [(&str, f64, f64); 3] = [
    ("10 Gbit/s, 25 us", 1.25e9, 25e-6),
    ("100 Gbit/s, 5 us", 12.5e9, 5e-6),
    ("400 Gbit/s, 2 us", 50e9, 2e-6),
];

/// Bytes and messages that a rank has sent to other hosts.
#[derive(Default)]
struct Sent {
    bytes: AtomicU64,
    messages: AtomicU64,
}

/// Link to hosts that have the same values as this one.
struct Counting {
    hosts: usize,
    sent: Arc<Sent>,
    /// All parts of a piece, of which the hosts average one each.
    piece: Option<Vec<u8>>,
}

impl Counting {
    fn count(&self, part: usize) {
        let others = self.hosts as u64 - 1;
        self.sent.bytes.fetch_add(others * part as u64, Ordering::Relaxed);
        self.sent.messages.fetch_add(others, Ordering::Relaxed);
    }
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
    ) -> std::result::Result<(), HostsError> {
        let part = send.len() / self.hosts;
        self.count(part);
        receive.chunks_mut(part).for_each(|from| from.copy_from_slice(&send[..part]));
        self.piece = Some(send.to_vec());
        Ok(())
    }

    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        _: &HostsLimit<'_>,
    ) -> std::result::Result<(), HostsError> {
        self.count(send.len());
        match self.piece.take() {
            Some(piece) => receive.copy_from_slice(&piece),
            None => receive.chunks_mut(send.len()).for_each(|from| from.copy_from_slice(send)),
        }
        Ok(())
    }

    fn abort(&mut self) {}
}

/// Makes an average of 8 ranks over `hosts` hosts. Returns what rank 0 has sent.
fn average(hosts: usize, layout: &[usize]) -> Result<[u64; 2]> {
    let sent: Vec<_> = (0..RANKS).map(|_| Arc::new(Sent::default())).collect();
    Communicator::run(&[Device::cpu(); RANKS], |communicator| {
        let rank = communicator.rank();
        let sent = sent[rank].clone();
        let link = Counting { hosts, sent: sent.clone(), piece: None };
        let mut model: Vec<Vec<f32>> = layout.iter().map(|&len| vec![0.0; len]).collect();
        let builder = ParamAverager::builder(communicator).allow_unnamed();
        let mut averager = builder.hosts(link, Hierarchy::Every).build(&mut model)?;
        model.iter_mut().for_each(|values| values.fill(rank as f32));
        for count in [&sent.bytes, &sent.messages] {
            count.store(0, Ordering::Relaxed); // those of the build
        }
        averager.average(&mut model)?;
        assert!(model.iter().flatten().all(|&value| value == 3.5), "the mean of 0 to 7");
        Ok(())
    })?;
    Ok([&sent[0].bytes, &sent[0].messages].map(|count| count.load(Ordering::Relaxed)))
}

fn main() -> Result<()> {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let [(_, gpt2), _, (_, small)] = common::layouts();
    let layout = if is_test { small } else { gpt2 };
    let bytes = 4.0 * layout.iter().sum::<usize>() as f64;
    println!("{RANKS} ranks a host, {:.1} MB of f32 each; seconds are computed", bytes / 1e6);
    print!("| hosts | method | MB that a host sends | messages in a row |");
    LINKS.iter().for_each(|(name, ..)| print!(" s at {name} |"));
    println!("\n|---|---|---|---|{}", "---|".repeat(LINKS.len()));
    for hosts in [64, 512, 4096] {
        let [sent, messages] = average(hosts, &layout)?.map(|count| count as f64);
        let ranks = (RANKS * hosts) as f64;
        let rows = [
            ("this crate", RANKS as f64 * sent, messages),
            ("flat ring", 2.0 * (1.0 - 1.0 / ranks) * bytes, 2.0 * (ranks - 1.0) / RANKS as f64),
            ("tree", 2.0 * bytes, f64::from(2 * hosts.ilog2())),
        ];
        for (name, sent, messages) in rows {
            print!("| {hosts} | {name} | {:.1} | {messages:.0} |", sent / 1e6);
            for (_, rate, latency) in LINKS {
                print!(" {:.4} |", messages * latency + sent / rate);
            }
            println!();
        }
    }
    Ok(())
}
