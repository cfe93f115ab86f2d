//! Children that a process of a world forks, without exec: they hold none of the world's resources.

use std::time::{Duration, Instant};

use test_support::process::{name, start, RankProcess};

/// The sockets of a process that have a name or a peer.
fn sockets(pid: i32) -> Vec<String> {
    let known = std::fs::read_to_string("/proc/net/unix").unwrap();
    let links =
        std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|entry| entry.ok());
    let inode = |entry: std::fs::DirEntry| {
        let link = std::fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
        link.strip_prefix("socket:[")?.strip_suffix(']').map(str::to_owned)
    };
    let inodes: Vec<String> = links.filter_map(inode).collect();
    // Num RefCount Protocol Flags Type St Inode Path; St 01 is unconnected.
    let is_held = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.len() >= 7
            && inodes.iter().any(|inode| inode == fields[6])
            && (fields.len() > 7 || fields[5] != "01")
    };
    known.lines().filter(is_held).map(str::to_owned).collect()
}

pub fn a_forked_child_holds_neither_the_name_nor_a_socket() {
    let name = name();
    let rank = |role: &str, rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_FINAL", "3".to_owned()),
        ];
        start(role, &variables)
    };
    let mut ranks = [rank("fork", 0), rank("fork", 1)];
    let children: Vec<i32> =
        ranks.iter_mut().map(|rank| rank.wait_for("child").parse().unwrap()).collect();
    for (rank, child) in ranks.iter().zip(&children) {
        let own = sockets(rank.child.id() as i32);
        assert!(
            own.len() >= 2 && own.iter().any(|line| line.contains("param-averager")),
            "{own:#?}"
        );
        // The parent may go on before the child has run at all.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !sockets(*child).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(sockets(*child), Vec::<String>::new());
    }
    for rank in &mut ranks {
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    // The next world of that name begins at once, and admits a joiner.
    let mut next = [rank("survive", 0), rank("survive", 1)];
    next.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let late = [
        ("PA_TEST_JOIN", "1"),
        ("PA_TEST_ORIGIN", "2"),
        ("PA_TEST_NAME", name.as_str()),
        ("PA_TEST_FINAL", "3"),
    ];
    let mut late = start("survive", &late.map(|(name, value)| (name, value.to_owned())));
    for rank in next.iter_mut().chain([&mut late]) {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done"), ["[0, 1, 2]"]);
    }
    let is_alive = |child: &i32| {
        std::fs::read_to_string(format!("/proc/{child}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z"))
    };
    assert!(children.iter().all(is_alive), "the children were there all the time");
    for child in children {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(child).unwrap(),
            rustix::process::Signal::KILL,
        );
    }
    let _: [RankProcess; 2] = ranks;
}
