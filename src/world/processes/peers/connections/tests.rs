//! Messages and departures of peers, seen through sockets of this process.

use std::io::Read;

use super::*;
use crate::backend::{Memory, MemorySpace};
use crate::device::Device;
use crate::world::control::Control;

/// A message without a body is sent after one that another thread is sending.
#[test]
fn a_brief_message_waits_for_another() {
    let info = || HostInfo::unknown(Device::cpu());
    let connections = Arc::new(Connections::new(ViewBoard::new(2).unwrap(), 0, info()));
    let (own, mut other) = UnixStream::pair().unwrap();
    let met = Connection { stream: Private::new(own), process: None };
    assert!(connections.add(1, info(), met).is_ok());
    let peer = connections.peer(1).unwrap();
    let sends = lock(&peer.sending);
    std::thread::scope(|scope| {
        let brief = scope.spawn(|| connections.send_briefly(1, (Kind::Abort, 0, 0)));
        std::thread::sleep(Duration::from_millis(5));
        drop(sends);
        brief.join().unwrap();
    });
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.read(&mut [0]).map_err(|error| error.kind()), Ok(1));
}

/// A process that leaves while its averager lives on for a moment tells its peers nothing about
/// one another; one that stays tells them who has departed.
#[test]
fn a_process_that_leaves_marks_no_peer_as_departed() {
    let info = || HostInfo::unknown(Device::cpu());
    let memory = Memory::new(&MemorySpace::Host, Control::BYTES).unwrap();
    let control = Arc::new(Control::new(memory, None, 0).unwrap());
    let agreement = Arc::new(Agreement::of_none(control));
    let departed = |peer| agreement.control.has_left(peer);
    let connections = Arc::new(Connections::new(ViewBoard::new(3).unwrap(), 0, info()));
    let mut others = vec![];
    for peer in [1, 2] {
        let (own, other) = UnixStream::pair().unwrap();
        let met = Connection { stream: Private::new(own), process: None };
        assert!(connections.add(peer, info(), met).is_ok());
        others.push(other);
    }
    connections.watch(&agreement, Ring { view: 0, peers: [0, 1, 2].into() });
    drop(others.pop());
    let gone = |state: &mut State| state.departed.contains(&2).then_some(());
    connections.wait(Instant::now() + WHOLE_MESSAGE, gone).unwrap();
    assert!(departed(2) && !departed(1));
    connections.leave();
    connections.join(); // its threads have seen their connections end
    assert!(connections.lock().departed.contains(&1) && !departed(1));
}
