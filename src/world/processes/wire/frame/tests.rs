use super::receive::receive_some;
use super::*;
use proptest::prelude::*;
use rustix::net::{sendmsg, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const ALL: [Kind; 3] = [Kind::Hello, Kind::Handshake, Kind::Ready];

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn a_message_arrives_with_its_files_and_in_order() {
    let (one, other) = UnixStream::pair().unwrap();
    let body: Vec<u32> = (0..200_000).collect();
    let sender = std::thread::spawn(move || {
        send(&one, (Kind::Handshake, 3, 7), &body, &[one.as_fd(), one.as_fd()], soon()).unwrap();
        send(&one, (Kind::Ready, 4, 0), &"", &[], soon()).unwrap();
    });
    let frame = receive(&other, &ALL, 2, soon()).unwrap();
    assert_eq!(
        (frame.kind, frame.view, frame.number, frame.files.len()),
        (Kind::Handshake, 3, 7, 2)
    );
    assert_eq!(frame.parse::<Vec<u32>>().unwrap()[199_999], 199_999);
    assert_eq!(receive(&other, &ALL, 2, soon()).unwrap().kind, Kind::Ready);
    sender.join().unwrap();
    drop(frame);
    assert_eq!(receive(&other, &ALL, 2, soon()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

/// A message reaches the peers that read. A peer that does not read is late, and delays no
/// other.
#[test]
fn a_message_to_all_is_not_delayed_by_a_peer_that_does_not_read() {
    let pairs: Vec<_> = (0..3).map(|_| UnixStream::pair().unwrap()).collect();
    let body: Vec<u32> = (0..300_000).collect();
    let readers: Vec<_> = pairs[1..]
        .iter()
        .map(|(_, other)| {
            let other = other.try_clone().unwrap();
            std::thread::spawn(move || receive(&other, &ALL, 2, soon()).unwrap())
        })
        .collect();
    let streams: Vec<&UnixStream> = pairs.iter().map(|(one, _)| one).collect();
    let (mut ended, start) = (vec![], Instant::now());
    let deadline = start + Duration::from_secs(3); // for busy machines
    let files = [pairs[0].0.as_fd()];
    send_to_all(&streams, (Kind::Handshake, 1, 2), &body, &files, deadline, |index, result| {
        ended.push((index, result.is_ok(), start.elapsed()))
    })
    .unwrap();
    ended.sort();
    assert_eq!(
        ended.iter().map(|&(index, good, _)| (index, good)).collect::<Vec<_>>(),
        [(0, false), (1, true), (2, true)]
    );
    assert!(ended[0].2 >= Duration::from_secs(3) && ended[1].2 < ended[0].2, "{ended:?}");
    for reader in readers {
        let frame = reader.join().unwrap();
        assert_eq!((frame.number, frame.files.len()), (2, 1));
        assert_eq!(frame.parse::<Vec<u32>>().unwrap(), body);
    }
    let too_large = vec![0u8; 1 << 20];
    let nothing = |_, _| panic!("nothing is sent");
    let error = send_to_all(&streams, (Kind::Ready, 0, 0), &too_large, &[], deadline, nothing);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_missing_or_incomplete_message_ends_at_the_deadline() {
    let (one, other) = UnixStream::pair().unwrap();
    (&one).write_all(&MAGIC).unwrap();
    let start = Instant::now();
    let error = receive(&other, &ALL, 2, start + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_deadline_concerns_data_that_has_not_arrived() {
    let (one, other) = UnixStream::pair().unwrap();
    send(&one, (Kind::Ready, 0, 0), &vec![7; 1000], &[], soon()).unwrap();
    let past = Instant::now();
    assert_eq!(receive(&other, &ALL, 2, past).unwrap().parse::<Vec<u8>>().unwrap(), [7; 1000]);
    // A sender that is never silent is not received from for longer, either.
    (&one).write_all(&header((Kind::Hello, 0, 0), 4000, 0)).unwrap();
    let write = move || {
        while (&one).write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_micros(500));
        }
    };
    let writer = std::thread::spawn(write);
    let start = Instant::now();
    let error = receive(&other, &ALL, 2, start + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    drop(other);
    writer.join().unwrap();
}

#[test]
fn an_invalid_first_message_is_refused_unread() {
    let refused = |kind: Kind, bytes: u32, files: usize| {
        let (one, other) = UnixStream::pair().unwrap();
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4] = VERSION as u8;
        header[6] = kind as u8;
        header[7] = files as u8;
        header[16..20].copy_from_slice(&bytes.to_le_bytes());
        let fds = vec![other.as_fd(); files];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(files == 0 || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        for _ in 0..2 {
            sendmsg(&one, &[IoSlice::new(&header)], &mut ancillary, SendFlags::empty()).unwrap();
        }
        let error = receive(&other, &[Kind::Hello], 1, soon()).unwrap_err().to_string();
        let mut taken = vec![];
        let _ = receive_some(&other, RecvFlags::empty(), &mut header, &mut taken, 1);
        assert!(taken.len() <= 4, "{}", taken.len()); // alignment leaves space for a few more
        error
    };
    assert!(refused(Kind::Hello, 1 << 20, 0).contains("above the size limit"));
    assert!(refused(Kind::Handshake, 1 << 20, 0).contains("of an unexpected kind"));
    assert!(refused(Kind::Hello, 2, 4).contains("too many files"));
    assert!(refused(Kind::Hello, 2, 253).contains("too many files"));
}

proptest! {
    #[test]
    fn garbage_is_an_error(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200), valid in 0usize..8
    ) {
        // The first `valid` bytes of the header are valid.
        let right = [b'P', b'A', b'V', b'G', VERSION as u8, 0, Kind::Hello as u8, 0];
        for (byte, right) in bytes.iter_mut().zip(&right[..valid]) {
            *byte = *right;
        }
        let (one, other) = UnixStream::pair().unwrap();
        (&one).write_all(&bytes).unwrap();
        drop(one);
        if let Ok(frame) = receive(&other, &ALL, 2, soon()) {
            prop_assert!(bytes.starts_with(&MAGIC));
            let length = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
            prop_assert_eq!(frame.body.len(), length as usize);
        }
    }
}
