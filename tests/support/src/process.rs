//! Ranks that are processes: this very program, started again with `PA_TEST_ROLE`, and the lines
//! that they print.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::Random;

/// Variable with the role of a process. `main` of a test program looks at it before anything else.
pub const ROLE: &str = "PA_TEST_ROLE";

/// Time after which a process hangs. Where tests of many processes run at once, a minute is short.
const HANGS: Duration = Duration::from_secs(180);

/// A process, and the lines it prints. Killed when it is dropped.
pub struct RankProcess {
    pub child: Child,
    lines: std::sync::mpsc::Receiver<String>,
    pub output: Vec<String>,
}

/// Ends this process as a rank's: with what `rank` returns, on a thread of its own. The stack of a
/// thread is mapped when it begins; that of the main thread grows, and where memory is limited a
/// signal says that it can't.
pub fn exit_as(rank: impl FnOnce() -> i32 + Send + 'static) -> ! {
    std::process::exit(std::thread::spawn(rank).join().unwrap_or(101))
}

/// A name that no other world has.
pub fn name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Starts one rank.
pub fn start(role: &str, variables: &[(&str, String)]) -> RankProcess {
    spawn(command(&[], role, variables))
}

/// Command that starts one rank; `before` is a program that starts it, with arguments, or empty.
pub fn command(before: &[&str], role: &str, variables: &[(&str, String)]) -> Command {
    let own = std::env::current_exe().unwrap();
    let mut command = match before {
        [] => Command::new(own),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(own);
            command
        }
    };
    command.arg("rank").env(ROLE, role); // the argument shows in a list of processes
    command.env_remove(crate::simulator::SCENARIO); // of the process that starts ranks
    for (name, value) in variables {
        command.env(name, value);
    }
    command
}

/// Starts a rank, or a program that starts some.
pub fn spawn(mut command: Command) -> RankProcess {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (send, lines) = std::sync::mpsc::channel();
    let out = child.stdout.take().unwrap();
    let errors = child.stderr.take().unwrap();
    let send_errors = send.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if let Some(line) = line.strip_prefix('@') {
                let _ = send.send(line.to_owned());
            }
        }
    });
    std::thread::spawn(move || {
        for line in BufReader::new(errors).lines().map_while(Result::ok) {
            let _ = send_errors.send(format!("stderr: {line}"));
        }
    });
    RankProcess { child, lines, output: vec![] }
}

/// Starts n ranks of one world. `variables`: more of them, by rank.
pub fn start_all(
    role: &str,
    n: usize,
    variables: impl Fn(usize) -> Vec<(&'static str, String)>,
) -> Vec<RankProcess> {
    let name = name();
    let rank = |rank: usize| {
        let mut all = vec![
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", n.to_string()),
            ("PA_TEST_NAME", name.clone()),
        ];
        all.extend(variables(rank));
        start(role, &all)
    };
    (0..n).map(rank).collect()
}

/// Starts n ranks of one world, and one more that joins them when all have said "ready".
/// `PA_TEST_ORIGIN` is the index of each.
pub fn start_and_join(
    role: &str,
    n: usize,
    variables: &[(&'static str, String)],
) -> Vec<RankProcess> {
    let name = name();
    let of = |origin: usize| {
        let own = [("PA_TEST_NAME", name.clone()), ("PA_TEST_ORIGIN", origin.to_string())];
        [&own, variables].concat()
    };
    let first = |rank: usize| {
        let own = [("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", n.to_string())];
        start(role, &[&of(rank)[..], &own].concat())
    };
    let mut ranks: Vec<RankProcess> = (0..n).map(first).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.push(start(role, &[&of(n)[..], &[("PA_TEST_JOIN", "1".to_owned())]].concat()));
    ranks
}

impl RankProcess {
    /// Waits for a line that begins with `begin`, and returns the rest.
    pub fn wait_for(&mut self, begin: &str) -> String {
        self.wait_for_within(begin, HANGS)
    }

    /// [`wait_for`](Self::wait_for) with a limit.
    pub fn wait_for_within(&mut self, begin: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let mut next = 0;
        loop {
            while next < self.output.len() {
                if let Some(rest) = self.output[next].strip_prefix(begin) {
                    return rest.trim().to_owned();
                }
                next += 1;
            }
            self.receive(begin, deadline);
        }
    }

    /// Waits for one more line.
    pub fn wait_for_next(&mut self) {
        self.receive("", Instant::now() + HANGS);
    }

    fn receive(&mut self, begin: &str, deadline: Instant) {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => self.output.push(line),
            Err(error) => panic!("no {begin:?} ({error}), only {:#?}", self.output),
        }
    }

    /// Waits for the process to end, and returns its exit code, or none if a signal ended it. All
    /// its lines are in `output` then.
    pub fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + HANGS;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.output.extend(self.lines.iter());
                return status.code();
            }
            assert!(Instant::now() < deadline, "it hangs: {:#?}", self.output);
            self.output.extend(self.lines.try_iter());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes the lines that have arrived.
    pub fn listen(&mut self) {
        self.output.extend(self.lines.try_iter());
    }

    /// Rests of the lines so far that begin with `begin`.
    pub fn said(&self, begin: &str) -> Vec<String> {
        self.output
            .iter()
            .filter_map(|line| line.strip_prefix(begin))
            .map(|rest| rest.trim().to_owned())
            .collect()
    }

    /// Asks the rank to end, by a line on its standard input.
    pub fn ask_to_end(&mut self) {
        self.tell("end");
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) {
        let _ = writeln!(self.child.stdin.as_ref().unwrap(), "{line}"); // it may be dead
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asserts that the survivors are done, agree, and have lost `dead` first.
pub fn check_survivors(ranks: &mut [RankProcess], dead: usize) {
    let mut agreed = vec![];
    for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != dead) {
        assert_eq!(process.end(), Some(0), "rank {rank}: {:#?}", process.output);
        assert_eq!(process.said("done").len(), 1, "{:#?}", process.output);
        assert!(!process.said("failed").is_empty());
        agreed.extend(process.said("agreed"));
    }
    assert_eq!(agreed.len(), ranks.len() - 1);
    assert!(agreed.windows(2).all(|pair| pair[0] == pair[1]), "{agreed:?}");
    let lost = |rank: &RankProcess| {
        rank.said("failed").iter().any(|error| error.contains(&format!("PeerLost {{ rank: {dead}")))
    };
    assert!(ranks.iter().any(lost), "{:#?}", ranks[0].output);
}

/// Starts n ranks and kills, at any time, some of them, but not the last two. `pause`: the
/// longest time before a kill. `variables`: more of them, by rank. Returns the ranks, and which of
/// them are alive; these have their number in `PA_TEST_FINAL`.
pub fn start_and_kill(
    role: &str,
    n: usize,
    chance: &mut Random,
    pause: Duration,
    variables: impl Fn(usize) -> Vec<(&'static str, String)>,
) -> (Vec<RankProcess>, Vec<usize>) {
    let deaths = 1 + chance.below(n as u64 - 2) as usize;
    let mut ranks = start_all(role, n, |rank| {
        let own =
            [("PA_TEST_FINAL", (n - deaths).to_string()), ("PA_TEST_ORIGIN", rank.to_string())];
        [variables(rank), own.to_vec()].concat()
    });
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let mut alive: Vec<usize> = (0..n).collect();
    for _ in 0..deaths {
        std::thread::sleep(Duration::from_micros(chance.below(pause.as_micros() as u64)));
        let dead = alive.remove(chance.below(alive.len() as u64) as usize);
        ranks[dead].signal(rustix::process::Signal::KILL);
    }
    (ranks, alive)
}

/// Asserts that these ranks of the role `outer` are done, with one model, and that no more of the
/// velocity was 0 than was reported as lost. Returns the share that was reported.
pub fn check_velocity(ranks: &mut [RankProcess], alive: &[usize]) -> f64 {
    let (mut done, mut lost_most) = (vec![], 0.0f64);
    for &rank in alive {
        assert_eq!(ranks[rank].end(), Some(0), "rank {rank}: {:#?}", ranks[rank].output);
        done.extend(ranks[rank].said("done"));
        let share = |line: &String| line.parse::<f64>().unwrap();
        let said: f64 = ranks[rank].said("lost").iter().map(share).sum();
        let seen: f64 = ranks[rank].said("checked").iter().map(share).sum();
        lost_most = lost_most.max(said);
        // An element whose velocity was 0 anyway, and those beside a tensor's end.
        assert!(seen <= said + 0.02, "{said} was reported, {seen} seen");
    }
    assert_eq!(done.len(), alive.len());
    assert!(done.windows(2).all(|pair| pair[0] == pair[1]), "{done:#?}");
    lost_most
}
