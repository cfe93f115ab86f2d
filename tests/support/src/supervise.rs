//! Processes with a time limit.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Exit code and output of a process.
pub struct Ended {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output, then standard error.
    pub said: String,
}

/// Runs a process to its end, or kills it after `limit`.
pub fn output_within(mut command: Command, limit: Duration) -> Ended {
    fn read(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let (start, mut child) = (Instant::now(), command.spawn().unwrap());
    let said = [read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap())];
    let (mut code, mut killed) = (None, String::new());
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            if killed.is_empty() {
                code = status.code();
            }
            break;
        }
        if start.elapsed() >= limit && killed.is_empty() {
            killed = format!("\nkilled: it took longer than {limit:?}");
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = said.map(|thread| thread.join().unwrap()).concat();
    Ended { code, said: said + &killed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_hangs_is_ended() {
        let mut command = Command::new("sleep");
        command.arg("600");
        let start = Instant::now();
        let ended = output_within(command, Duration::from_millis(300));
        assert!(ended.code.is_none() && ended.said.contains("killed"), "{}", ended.said);
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
