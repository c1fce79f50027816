//! One process for each rank, on this machine.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use data_parallel::Ranks;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::raise;

use crate::progress::say;
use crate::signals::{SIGHUP, Signal, StopSignals};

/// Tells a process that its standard input comes from a launcher: a byte is the number of a signal,
/// and its end that the launcher is gone.
const LAUNCHED: &str = "DATA_PARALLEL_LAUNCHED";

const MASTER_ADDR: &str = "127.0.0.1";

/// When one rank has failed, the others notice by themselves and say so. What still runs after this
/// time is ended.
const GRACE: Duration = Duration::from_secs(15);

/// Runs this program once more for each of `processes` ranks, with the same arguments, and waits for
/// all. When one fails the rest are ended. Signals are passed on: the ranks finish their step and
/// save.
///
/// Returns 0 if all ranks do; else, where a signal was passed on, 128 and its number, and without
/// one the code of the first that failed.
///
/// # Errors
/// A process that cannot be started.
pub(crate) fn launch(processes: usize) -> Result<ExitCode> {
    let signals = StopSignals::install()?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let port = free_port().context("cannot find a free port")?;
    let mut ranks = Launched(Vec::new());
    for rank in 0..processes {
        let place = Ranks::new(rank, processes, MASTER_ADDR, port)?;
        let mut command = Command::new(&program);
        command
            .args(std::env::args_os().skip(1))
            .envs(place.variables())
            .env(LAUNCHED, "1")
            .env_remove("TORCHELASTIC_USE_AGENT_STORE")
            .stdin(Stdio::piped());
        // The memory that a recorded step reduces is the graph's own, which NCCL cannot register.
        if std::env::var_os("NCCL_GRAPH_REGISTER").is_none() {
            command.env("NCCL_GRAPH_REGISTER", "0");
        }
        // Ctrl-C reaches the launcher alone, which passes it on once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn();
        let child = child.with_context(|| format!("cannot start the process of rank {rank}"))?;
        ranks.0.push(child);
    }
    ranks.wait(GRACE, || signals.received())
}

/// In a process that [`launch`] has started: passes on the launcher's signals, and stops when it is
/// gone. Does nothing in others.
pub(crate) fn watch_launcher() {
    if std::env::var_os(LAUNCHED).is_none() {
        return;
    }
    std::thread::spawn(|| {
        let mut number = [0];
        while let Ok(1) = std::io::stdin().read(&mut number) {
            let signal = i32::from(number[0]);
            if [SIGINT, SIGTERM, SIGHUP].contains(&signal) {
                // The handlers note it; that there are none yet ends the process, which is right too.
                let _ = raise(signal);
            }
        }
        let _ = raise(SIGTERM);
    });
}

/// The processes by rank. Those that still run when this is dropped are ended.
struct Launched(Vec<Child>);

impl Launched {
    /// Waits for all. Once one has failed, or has ended for the signal that `received` tells of, the others have this `grace`: when a stop
    /// goes well, nobody leaves before rank 0 has saved.
    fn wait(&mut self, grace: Duration, received: impl Fn() -> Option<Signal>) -> Result<ExitCode> {
        let mut ended: Vec<Option<ExitStatus>> = vec![None; self.0.len()];
        let mut failed: Option<(ExitStatus, Instant)> = None;
        let mut passed_on: Option<Signal> = None;
        while ended.contains(&None) {
            for (rank, child) in self.0.iter_mut().enumerate() {
                if ended[rank].is_some() {
                    continue;
                }
                ended[rank] = child.try_wait().context("cannot wait for a process")?;
                let Some(status) = ended[rank].filter(|status| !status.success()) else {
                    continue;
                };
                if status.code().is_none() {
                    say(&format!(
                        "error: the process of rank {rank} was ended by {status}"
                    ));
                }
                failed.get_or_insert((status, Instant::now()));
            }
            if let (Some(signal), None) = (received(), passed_on) {
                for child in &mut self.0 {
                    if let Some(input) = &mut child.stdin {
                        // One that is gone needs no signal.
                        let _ = input
                            .write_all(&[signal.number])
                            .and_then(|()| input.flush());
                    }
                }
                passed_on = Some(signal);
            }
            if failed.is_some_and(|(_, at)| at.elapsed() > grace) {
                self.end();
            }
            sleep(Duration::from_millis(20));
        }
        Ok(match (failed, passed_on) {
            (None, _) => ExitCode::SUCCESS,
            (Some(_), Some(signal)) => ExitCode::from(signal.exit_code()),
            (Some((status, _)), None) => {
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                ExitCode::from(code.unwrap_or(1))
            }
        })
    }

    fn end(&mut self) {
        for child in &mut self.0 {
            // An error says that it has ended already.
            let _ = child.kill();
        }
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.end();
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}

/// A port that was free a moment ago. Should another program take it before rank 0 does, rank 0 says
/// so and the launch fails.
fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind((MASTER_ADDR, 0))?;
    Ok(listener.local_addr()?.port())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn who_hangs_is_ended_after_the_grace_also_when_a_stop_was_asked_for() {
        let stop = Signal {
            name: "SIGTERM",
            number: SIGTERM as u8,
        };
        for signal in [None, Some(stop)] {
            let started = ["exit 3", "exec sleep 60"].map(|line| {
                let mut command = Command::new("sh");
                command.args(["-c", line]).stdin(Stdio::piped());
                command.spawn().unwrap()
            });
            let begin = Instant::now();
            let mut launched = Launched(started.into());
            let code = launched
                .wait(Duration::from_millis(100), || signal)
                .unwrap();
            let expected = signal.map_or(3, Signal::exit_code);
            assert_eq!(
                format!("{code:?}"),
                format!("{:?}", ExitCode::from(expected))
            );
            assert!(begin.elapsed() < Duration::from_secs(30));
        }
    }
}
