//! This process' place, from the variables that `torchrun` sets.

use crate::error::{Error, Result};

/// This process' place among the others, and where they meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    /// `RANK`: this process' number, from 0.
    pub rank: usize,
    /// `WORLD_SIZE`: how many processes there are.
    pub world_size: usize,
    /// `LOCAL_RANK`: this process' number on its machine, from 0; the GPU that it takes.
    pub local_rank: usize,
    /// `LOCAL_WORLD_SIZE`: how many processes there are on this machine.
    pub local_world_size: usize,
    /// `MASTER_ADDR`: name or address of rank 0's machine.
    pub master_addr: String,
    /// `MASTER_PORT`: where rank 0 waits for the others. One more under a `torchrun` that keeps that
    /// port for itself, which it tells by `TORCHELASTIC_USE_AGENT_STORE`.
    pub master_port: u16,
}

impl Ranks {
    /// A place on one machine.
    ///
    /// # Errors
    /// [`Error::Environment`] unless `rank` is below `world_size`.
    pub fn new(
        rank: usize,
        world_size: usize,
        master_addr: &str,
        master_port: u16,
    ) -> Result<Self> {
        check_below("RANK", rank, world_size)?;
        Ok(Self {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            master_addr: master_addr.into(),
            master_port,
        })
    }

    /// The place that the environment gives; None where neither `RANK` nor `WORLD_SIZE` is set.
    /// `LOCAL_RANK` and `LOCAL_WORLD_SIZE` may be missing: then all ranks are on this machine.
    ///
    /// # Errors
    /// [`Error::Environment`] with the variable that is missing or out of range.
    pub fn from_environment() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// The variables that give this place to a process.
    pub fn variables(&self) -> [(&'static str, String); 6] {
        [
            ("RANK", self.rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
        ]
    }

    fn from_variables(variable: impl Fn(&'static str) -> Option<String>) -> Result<Option<Self>> {
        if variable("RANK").is_none() && variable("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let number = |name: &'static str, default: Option<usize>| {
            let text = variable(name);
            let parsed = match &text {
                None => default,
                Some(text) => text.parse().ok(),
            };
            parsed.ok_or_else(|| environment(name, text, "a whole number"))
        };
        let world_size = number("WORLD_SIZE", None)?;
        if world_size == 0 {
            return Err(environment("WORLD_SIZE", Some("0".into()), "at least 1"));
        }
        let rank = number("RANK", None)?;
        check_below("RANK", rank, world_size)?;
        let local_world_size = number("LOCAL_WORLD_SIZE", Some(world_size))?;
        if !(1..=world_size).contains(&local_world_size) {
            let found = Some(local_world_size.to_string());
            let expected = format!("from 1 to WORLD_SIZE, which is {world_size}");
            return Err(environment("LOCAL_WORLD_SIZE", found, &expected));
        }
        let local_rank = number("LOCAL_RANK", Some(rank % local_world_size))?;
        check_below("LOCAL_RANK", local_rank, local_world_size)?;
        let alone = world_size == 1;
        let master_addr = match variable("MASTER_ADDR").filter(|text| !text.is_empty()) {
            Some(address) => address,
            None if alone => "127.0.0.1".into(),
            None => {
                let expected = "the name or address of the machine of rank 0";
                return Err(environment("MASTER_ADDR", None, expected));
            }
        };
        let port = number("MASTER_PORT", alone.then_some(1))?;
        let taken = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
        let master_port = u16::try_from(port.saturating_add(taken.into()))
            .ok()
            .filter(|&port| port > 0)
            .ok_or_else(|| {
                environment("MASTER_PORT", Some(port.to_string()), "a port, below 65535")
            })?;
        Ok(Some(Self {
            rank,
            world_size,
            local_rank,
            local_world_size,
            master_addr,
            master_port,
        }))
    }
}

fn check_below(variable: &'static str, found: usize, count: usize) -> Result<()> {
    if found < count {
        return Ok(());
    }
    let expected = format!("below the number of processes, which is {count}");
    Err(environment(variable, Some(found.to_string()), &expected))
}

fn environment(variable: &'static str, found: Option<String>, expected: &str) -> Error {
    Error::Environment {
        variable,
        found,
        expected: expected.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Option<Ranks>> {
        let variables: Vec<(&str, &str)> = line
            .split_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .collect();
        Ranks::from_variables(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn torchruns_variables_are_read_and_written_alike() {
        let line = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node0 \
                    MASTER_PORT=29500";
        let ranks = read(line).unwrap().unwrap();
        assert_eq!((ranks.rank, ranks.world_size), (5, 8));
        assert_eq!((ranks.local_rank, ranks.local_world_size), (1, 4));
        let written: Vec<String> = ranks
            .variables()
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(read(&written.join(" ")).unwrap().unwrap(), ranks);
        assert_eq!(read("HOME=x").unwrap(), None);
    }

    #[test]
    fn a_port_that_torchrun_keeps_for_itself_is_avoided() {
        let line = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500 \
                    TORCHELASTIC_USE_AGENT_STORE=True";
        assert_eq!(read(line).unwrap().unwrap().master_port, 29501);
    }

    #[test]
    fn alone_no_meeting_place_is_needed() {
        assert_eq!(read("RANK=0 WORLD_SIZE=1").unwrap().unwrap().world_size, 1);
    }

    #[test]
    fn each_wrong_variable_is_named_with_its_value() {
        let meet = "MASTER_ADDR=a MASTER_PORT=1";
        let cases = [
            ("RANK=0", "WORLD_SIZE is not set"),
            ("WORLD_SIZE=2", "RANK is not set"),
            (
                "RANK=0 WORLD_SIZE=0",
                "WORLD_SIZE is \"0\"; it must be at least 1",
            ),
            (
                "RANK=2 WORLD_SIZE=2",
                "RANK is \"2\"; it must be below the number of processes, which is 2",
            ),
            ("RANK=-1 WORLD_SIZE=2", "RANK is \"-1\""),
            (
                "RANK=x WORLD_SIZE=2",
                "RANK is \"x\"; it must be a whole number",
            ),
            ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is not set"),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a",
                "MASTER_PORT is not set",
            ),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0",
                "MASTER_PORT is \"0\"",
            ),
            (
                "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000",
                "MASTER_PORT is \"70000\"",
            ),
            (
                &format!("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 {meet}"),
                "LOCAL_RANK is \"2\"",
            ),
            (
                &format!("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3 {meet}"),
                "LOCAL_WORLD_SIZE is \"3\"",
            ),
        ];
        for (line, expected) in cases {
            let error = read(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
