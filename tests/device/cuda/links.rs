//! Ranks on several devices, and mailboxes in memory of the host.

use super::model::{Model, Shape};
use super::reach::direct;
use super::scenarios::fail;
use super::way::{shapes, Way, WAY};
use param_averager::*;
use test_support::ranks_of;

pub fn ring(ranks: usize, devices: &'static [usize], link: Link) -> Way {
    Way { ranks, devices, link, ..WAY }
}

/// Order in which ranks on these devices follow one another around the ring.
pub fn order_of(devices: &[Device]) -> Vec<usize> {
    let orders = ranks_of(devices, |communicator| {
        let mut model = Model::new(communicator.device(), &shapes()[..1], 0);
        test_support::options(communicator).build(&mut model).unwrap().ring_order().to_vec()
    });
    orders.into_iter().next().unwrap()
}

pub fn compare(way: Way, shapes: &[Shape]) {
    way.compare_in_order(shapes, &order_of(&way.devices()));
}

/// Runs on one device, with mailboxes in memory of the host.
pub fn host_links() {
    let shapes = shapes();
    for ranks in [2, 3, 4, 8] {
        for all_or_nothing in [true, false] {
            Way { all_or_nothing, ..ring(ranks, &[0], Link::Host) }.compare(&shapes);
        }
    }
    for delay_ns in [20_000, 300_000] {
        Way { delay_ns, slots: 2, channels: 3, ..ring(3, &[0], Link::Host) }.compare(&shapes);
    }
    Way { weighted: true, counter: u32::MAX - 3, ..ring(3, &[0], Link::Host) }.compare(&shapes);
    Way { reject: true, slots: 2, chunk: 128, channels: 3, ..ring(4, &[0], Link::Host) }
        .compare(&shapes[10..]);
    Way { narrow_wire: true, channels: 1, ..ring(3, &[0], Link::Host) }.compare(&shapes[5..]);
}

/// Four devices. Simulated ones reach each other.
pub fn every_link() {
    let shapes = shapes();
    let topology = Topology::probe().unwrap();
    let simulated = topology.devices()[0].name.contains("cudasim");
    let mut links = vec![Link::Auto, Link::Host];
    let all = || (0..4).flat_map(|one| (0..4).map(move |other| (one, other)));
    if all().all(|(one, other)| topology.peer_access(one, other) == PeerAccess::Verified) {
        links.extend([Link::Peer, Link::Pull]);
    }
    for (one, other) in all() {
        let access = topology.peer_access(one, other);
        let works = [PeerAccess::Verified, PeerAccess::Pull, PeerAccess::Slow];
        let is_measured = one != other && works.contains(&access);
        let rates = topology.peer_rates(one, other);
        assert_eq!(rates.is_some(), is_measured, "{one}, {other}: {access:?}");
        let all = rates.map(|rates| [rates.push, rates.pull, rates.copy, rates.host]);
        assert!(all.is_none_or(|all| all.iter().all(|rate| *rate > 0.0)), "{rates:?}");
    }
    if simulated {
        assert_eq!((topology.devices().len(), links.len()), (4, 4));
        for (one, other) in all() {
            // Simulated devices have all native atomics where they reach each other.
            let connection = if one == other { Connection::Same } else { Connection::NvLink };
            assert_eq!(topology.connection(one, other), connection);
        }
    }
    for link in links {
        compare(ring(2, &[0, 1], link), &shapes);
        compare(Way { delay_ns: 100_000, slots: 2, ..ring(3, &[0, 1, 2], link) }, &shapes);
        compare(ring(4, &[0, 1, 2, 3], link), &shapes[5..]);
    }
    // More ranks than devices; not from 0 on; weights and counters as before.
    compare(Way { weighted: true, counter: u32::MAX - 3, ..ring(3, &[3, 1], Link::Auto) }, &shapes);
    compare(Way { all_or_nothing: false, ..ring(4, &[0, 1, 2, 3], Link::Auto) }, &shapes[10..]);
    compare(
        Way { all_or_nothing: false, narrow_wire: true, ..ring(3, &[1, 0], Link::Host) },
        &shapes[5..],
    );
    compare(
        Way { reject: true, slots: 2, chunk: 128, channels: 3, ..ring(3, &[0, 1, 2], Link::Host) },
        &shapes[15..],
    );
    // The defaults: the meaning of Auto, the number of blocks, and an average of each kind at the
    // same time.
    ranks_of(&[Device::cuda(2), Device::cuda(0)], |communicator| {
        let mut model = Model::new(communicator.device(), &shapes, communicator.rank() as u64);
        let mut host =
            test_support::options(communicator.clone()).link(Link::Host).build(&mut model).unwrap();
        let mut auto = test_support::options(communicator).build(&mut model).unwrap();
        assert_eq!(host.algorithm(), Algorithm::Ring);
        assert_eq!(auto.ring_order(), [0, 1]);
        auto.average(&mut model).unwrap();
        host.average(&mut model).unwrap();
        drop(auto);
        host.average(&mut model).unwrap();
    });
    // A world has CPUs only or CUDA devices only.
    let error = Communicator::from_devices(&[Device::cuda(0), Device::cpu()]).unwrap_err();
    assert!(error.to_string().contains("rank 1 asks for cpu"), "{error}");
}

/// Four devices, of which 0 and 2 reach each other, and 1 and 3.
pub fn pairs() {
    let shapes = shapes();
    ranks_of(&[0, 1, 2, 3].map(Device::cuda), |communicator| {
        let mut model = Model::new(communicator.device(), &shapes, 0);
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        assert_eq!(averager.ring_order(), [0, 2, 1, 3]);
        assert_eq!(averager.algorithm(), Algorithm::Ring);
    });
    // Two links of each kind, and weights that go with their ranks.
    for all_or_nothing in [true, false] {
        Way { weighted: true, all_or_nothing, ..ring(4, &[0, 1, 2, 3], Link::Auto) }
            .compare_in_order(&shapes, &[0, 2, 1, 3]);
    }
}

/// Two devices that reach each other.
pub fn reached() {
    let topology = Topology::probe().unwrap();
    assert_eq!(topology.peer_access(0, 1), PeerAccess::Verified);
    ring(2, &[0, 1], Link::Peer).compare(&shapes()[5..]);
}

/// Two devices that do not reach each other, although the driver may claim it.
pub fn not_reached(access: PeerAccess) {
    // All try the same pair at once.
    let topology = std::thread::scope(|scope| {
        let threads = [(); 4].map(|()| scope.spawn(|| Topology::probe().unwrap()));
        threads.map(|thread| thread.join().unwrap()).into_iter().last().unwrap()
    });
    assert_eq!((topology.peer_access(0, 1), topology.peer_access(1, 0)), (access, access));
    assert_eq!(topology.peer_rates(0, 1), None);
    // Simulated devices are not in /sys, and say that they have native atomics if they say that
    // they have access.
    let says = match access {
        PeerAccess::Unsupported => Connection::Unknown,
        _ => Connection::NvLink,
    };
    assert_eq!(topology.connection(0, 1), says);
    ring(3, &[0, 1], Link::Auto).compare_in_order(&shapes(), &[0, 2, 1]);
    ring(2, &[1, 0], Link::Host).compare(&shapes()[5..]);
    let refused = |set: fn(Builder) -> Builder| {
        ranks_of(&[Device::cuda(0), Device::cuda(1)], |communicator| {
            let mut model = Model::new(communicator.device(), &shapes(), 0);
            set(test_support::options(communicator)).build(&mut model).map(drop).unwrap_err()
        })
    };
    for error in refused(|builder| builder.algorithm(Algorithm::Direct)) {
        let is_named = matches!(error, Error::InvalidOption { rank: 0, option: "algorithm", .. });
        assert!(is_named && error.to_string().contains("without peer access"), "{error}");
    }
    let pulled = refused(|builder| builder.link(Link::Pull));
    for error in refused(|builder| builder.link(Link::Peer)).into_iter().chain(pulled) {
        let Error::InvalidOption { rank: 0, option: "link", found, .. } = &error else {
            panic!("{error}")
        };
        assert!(found.contains("ranks 0 and 1"), "{error}");
        assert_eq!(found.contains("were lost"), access == PeerAccess::Broken, "{error}");
        let is_forbidden = access == PeerAccess::Disabled;
        assert_eq!(found.contains("PARAM_AVERAGER_P2P=0"), is_forbidden, "{error}");
    }
    // On one device nothing has to be reached.
    ring(2, &[0], Link::Peer).compare(&shapes()[15..]);
}

pub fn races() {
    let shapes = [(Dtype::F32, 600, 0), (Dtype::Bf16, 77, 1)];
    for (ranks, devices, link) in [
        (2, &[0usize, 1][..], Link::Auto),
        (2, &[0, 1], Link::Host),
        (3, &[0, 1], Link::Pull),
        (3, &[0, 1, 0], Link::Host),
        (3, &[0], Link::Host),
    ] {
        for all_or_nothing in [true, false] {
            Way { all_or_nothing, slots: 2, chunk: 256, ..ring(ranks, devices, link) }.run(&shapes);
        }
    }
    for outer in [Outer::mean(), Outer::diloco(), Outer::adam(0.1, 0.9, 0.99, 1e-3)] {
        Way { outer, ..direct(3, &[0, 1]) }.run(&shapes);
    }
}

pub fn failures() {
    let two = [0, 1, 0].map(Device::cuda);
    fail(&two, Link::Auto, Algorithm::Direct, true);
    fail(&two, Link::Auto, Algorithm::Ring, true);
    fail(&two, Link::Pull, Algorithm::Ring, true);
    fail(&two, Link::Host, Algorithm::Ring, false);
}

pub fn host_failures() {
    for all_or_nothing in [true, false] {
        fail(&[Device::cuda(0); 3], Link::Host, Algorithm::Ring, all_or_nothing);
    }
}
