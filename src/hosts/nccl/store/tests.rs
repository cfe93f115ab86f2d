use super::*;

const ID: RawId = [9; 128];
const PATIENT: Duration = Duration::from_secs(60);

fn hello(host: usize, hosts: usize) -> Hello {
    Hello { hosts, host, rank: 1, ranks: 4, run: 5 }
}

/// A listener of host 0, and the place where others find it.
fn place() -> (TcpListener, Place) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, Place { address: "localhost".into(), port })
}

fn connect(place: &Place) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", place.port)).unwrap();
    stream.set_read_timeout(Some(PATIENT)).unwrap();
    stream
}

/// Results of host 0 and of these clients, once `before` has had its connections made.
fn met(
    hosts: usize,
    id: Result<RawId, String>,
    clients: &[Hello],
    patience: Duration,
    before: impl FnOnce(&Place) -> Vec<TcpStream>,
) -> (Result<(), HostsError>, Vec<Result<RawId, HostsError>>) {
    let (listener, place) = place();
    let others = before(&place);
    let limit = || HostsLimit::new(patience, &|| false);
    let results = std::thread::scope(|scope| {
        let serve = scope.spawn(|| serve(listener, &hello(0, hosts), id.as_ref(), &limit()));
        let ask = |client: &Hello| {
            let (place, client) = (&place, *client);
            scope.spawn(move || place.ask(&client, &HostsLimit::new(patience, &|| false)))
        };
        let clients: Vec<_> = clients.iter().map(ask).collect();
        let clients = clients.into_iter().map(|client| client.join().unwrap()).collect();
        (serve.join().unwrap(), clients)
    });
    drop(others);
    results
}

/// Host 2 of 4.
fn waits(place: &Place) -> Vec<TcpStream> {
    let mut stream = connect(place);
    stream.write_all(&hello(2, 4).bytes()).unwrap();
    vec![stream]
}

#[test]
fn clients_get_the_id_whatever_others_do() {
    let others = |place: &Place| {
        let all = ["", "GET / HTTP/1.1\r\n\r\n", &"x".repeat(1000), "pahosts1"].map(|said| {
            let mut stream = connect(place);
            stream.write_all(said.as_bytes()).unwrap();
            stream
        });
        drop(connect(place));
        // A client that dies, in whose place another comes.
        connect(place).write_all(&hello(2, 3).bytes()).unwrap();
        all.into()
    };
    let (served, got) = met(3, Ok(ID), &[hello(1, 3), hello(2, 3)], PATIENT, others);
    assert_eq!((served, got), (Ok(()), vec![Ok(ID), Ok(ID)]));
    let more_than_wait = |place: &Place| (0..2 * SILENT).map(|_| connect(place)).collect();
    let (served, got) = met(2, Ok(ID), &[hello(1, 2)], PATIENT, more_than_wait);
    assert_eq!((served, got), (Ok(()), vec![Ok(ID)]));
}

#[test]
fn a_mistake_is_an_error_of_all() {
    for (client, words) in [
        (Hello { hosts: 5, ..hello(1, 4) }, "host 1 has hosts: 5, and host 0 has 4"),
        (Hello { ranks: 3, ..hello(1, 4) }, "host 1 has ranks: 3, and host 0 has 4"),
        (Hello { rank: 0, ..hello(1, 4) }, "host 1 has a link of rank 0, and host 0 has 1"),
        (hello(4, 4), "host 4 has a number too large"),
        (hello(0, 4), "host 0 has come twice"),
        (hello(2, 4), "host 2 has come twice"),
    ] {
        let (served, got) = met(4, Ok(ID), &[client], PATIENT, waits);
        let (served, got) = (served.unwrap_err(), got[0].clone().unwrap_err());
        assert!(served.reason.contains(words) && got.reason.contains(words), "{served}, {got}");
    }
}

#[test]
fn another_run_is_refused_alone() {
    let clients = [Hello { run: 6, ..hello(1, 2) }, hello(1, 2)];
    let (served, got) = met(2, Ok(ID), &clients, PATIENT, |_| vec![]);
    let refused = got[0].clone().unwrap_err();
    assert!(refused.reason.contains("another run"), "{refused}");
    assert_eq!((served, &got[1]), (Ok(()), &Ok(ID)));
}

#[test]
fn another_version_is_refused_alone() {
    let mut client = None;
    let before = |place: &Place| {
        client = Some(connect(place));
        client.as_ref().unwrap().write_all(&[&b"pahosts0"[..], &[1; 100]].concat()).unwrap();
        vec![]
    };
    let (served, got) = met(2, Ok(ID), &[hello(1, 2)], PATIENT, before);
    assert_eq!((served, got), (Ok(()), vec![Ok(ID)]));
    let mut said = String::new();
    let mut answer = client.unwrap();
    answer.read_exact(&mut [0; HEAD]).unwrap();
    answer.read_to_string(&mut said).unwrap();
    assert!(said.contains("this host is not of this version of param-averager"), "{said}");
}

#[test]
fn a_host_that_has_no_id_says_why() {
    let reason = "no network".to_owned();
    let (served, got) = met(3, Err(reason), &[hello(1, 3), hello(2, 3)], PATIENT, |_| vec![]);
    assert_eq!(served, Ok(()));
    for got in got {
        assert_eq!(got.unwrap_err().reason, "host 0 has no NCCL id: no network");
    }
}

#[test]
fn a_wait_for_hosts_that_do_not_come_has_a_limit() {
    let mut client = None;
    let before = |place: &Place| {
        let waits = waits(place);
        client = Some(waits[0].try_clone().unwrap());
        waits
    };
    let (served, _) = met(4, Ok(ID), &[], Duration::from_millis(300), before);
    let served = served.unwrap_err();
    assert!(served.reason.contains("hosts [1, 3] have not come"), "{served}");
    assert_eq!(served.host, Some(1));
    let mut said = vec![];
    client.unwrap().read_to_end(&mut said).unwrap();
    assert!(said.ends_with(served.reason.as_bytes()), "{said:?}");
    // A server that says nothing.
    let (_listener, place) = place();
    let limit = HostsLimit::new(Duration::from_millis(100), &|| false);
    let error = place.ask(&hello(1, 2), &limit).unwrap_err();
    assert!(error.reason.contains("does not give NCCL's id at localhost:"), "{error}");
}

#[test]
fn another_program_is_named_at_once() {
    let (listener, place) = place();
    listener.set_nonblocking(false).unwrap();
    let answer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        stream
    });
    let error = place.ask(&hello(1, 2), &HostsLimit::new(PATIENT, &|| false)).unwrap_err();
    assert!(error.reason.contains("another program listens at localhost:"), "{error}");
    drop(answer.join().unwrap());
}

#[test]
fn places_are_made_of_variables() {
    let find = |variables: &[(&str, &str)], rank| {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into());
        Place::find(get, rank)
    };
    let (address, master) = ((ADDRESS, "host0"), (MASTER_PORT, "29500"));
    let found = |port| Ok(Place { address: "host0".into(), port });
    assert_eq!(find(&[address, master], 3), found(29504));
    assert_eq!(find(&[address, master, (PORT, "4000")], 3), found(4003));
    assert_eq!(find(&[address, (PORT, "")], 0), find(&[address], 0));
    for (variables, words) in [
        (&[master][..], "MASTER_ADDR is not set"),
        (&[address], "neither PARAM_AVERAGER_HOSTS_PORT nor MASTER_PORT is set"),
        (&[address, (PORT, "0")], "PARAM_AVERAGER_HOSTS_PORT is \"0\""),
        (&[address, (PORT, "65535")], "leaves no port for rank 1"),
        (&[address, (MASTER_PORT, "many")], "MASTER_PORT is \"many\""),
    ] {
        let error = find(variables, 1).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}
