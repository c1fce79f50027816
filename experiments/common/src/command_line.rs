//! The command line of a program that trains, from its words to what it asks for.

use std::ffi::OsString;

use anyhow::Result;
use clap::{ArgMatches, Args, Command, CommandFactory, FromArgMatches};

use crate::arguments::{
    ComputeArguments, DataArguments, ParallelArguments, RunArguments, TrainingArguments,
    TrainingDefaults, describe_defaults, flags_given, refuse_all_but,
};
use crate::data::Dataset;
use crate::experiment::{Action, RunConfig};

/// The arguments of a program that trains.
pub trait CommandLine: CommandFactory + FromArgMatches {
    /// What they say of the network.
    type Request;

    /// Flag and default of each that takes a value, for its help.
    fn defaults() -> Vec<(&'static str, String)>;

    /// What they ask for; `given` are the flags on the command line, as `--lr`.
    ///
    /// # Errors
    /// Flags that make no sense, or not together.
    fn resolve(self, given: &[String]) -> Result<Action<Self::Request>>;
}

/// Reads the command line. Help and malformed arguments end the process here, as clap does it.
///
/// # Errors
/// As [`CommandLine::resolve`].
pub fn parse<A: CommandLine>() -> Result<Action<A::Request>> {
    let matches = command::<A>().get_matches();
    let arguments = A::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    arguments.resolve(&given::<A>(&matches))
}

/// The same of other words, the program's name first; nothing ends the process. For a program's tests.
///
/// # Errors
/// Malformed arguments; as [`CommandLine::resolve`].
pub fn parse_from<A: CommandLine>(
    words: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<Action<A::Request>> {
    let matches = command::<A>().try_get_matches_from(words)?;
    A::from_arg_matches(&matches)?.resolve(&given::<A>(&matches))
}

/// clap's command, with the defaults in its help.
pub fn command<A: CommandLine>() -> Command {
    describe_defaults(A::command(), &A::defaults())
}

fn given<A: CommandLine>(matches: &ArgMatches) -> Vec<String> {
    flags_given(&A::command(), matches)
}

/// What all programs that train take, with the arguments `N` of their network between.
#[derive(Debug, Args)]
pub struct CommonArguments<N: Args> {
    /// Print the network layer by layer and exit
    #[arg(long)]
    pub summary: bool,
    /// The pictures.
    #[command(flatten)]
    pub data: DataArguments,
    /// The steps.
    #[command(flatten)]
    pub training: TrainingArguments,
    /// The network.
    #[command(flatten)]
    pub network: N,
    /// The run's folder.
    #[command(flatten)]
    pub run: RunArguments,
    /// The machine.
    #[command(flatten)]
    pub compute: ComputeArguments,
    /// The processes.
    #[command(flatten)]
    pub parallel: ParallelArguments,
}

/// What else an experiment makes of [`CommonArguments`].
#[derive(Debug, Clone, Copy)]
pub struct Presets<'a> {
    /// What settings that are not given become.
    pub training: &'a TrainingDefaults,
    /// Pictures of `--quick`, (train, test), where it was given.
    pub quick_shapes: Option<(u64, u64)>,
    /// Flags that have a meaning beside `--summary`.
    pub summary_flags: &'a [&'a str],
}

impl<N: Args> CommonArguments<N> {
    /// What they ask for. `given` are the flags on the command line; `request` says what those of the network mean.
    ///
    /// # Errors
    /// Flags that make no sense, or not together.
    pub fn resolve<R>(
        self,
        given: &[String],
        presets: Presets<'_>,
        request: impl FnOnce(N) -> Result<R>,
    ) -> Result<Action<R>> {
        if let Some(action) = self.run.to_resume(given, &self.data)? {
            return Ok(action);
        }
        let request = request(self.network)?;
        if self.summary {
            let reason = "it prints the network and trains nothing";
            refuse_all_but("--summary", presets.summary_flags, given, reason)?;
            return Ok(Action::Summary(request));
        }
        let data = match presets.quick_shapes {
            Some(shapes) => self.data.quick(shapes)?,
            None => self.data,
        };
        let data = data.resolve(Dataset::Cifar10)?;
        let compute = self.compute.resolve_for(&self.parallel)?;
        let training = self
            .training
            .resolve(&self.run, presets.training, &compute)?;
        training.validate()?;
        Ok(Action::Start {
            config: Box::new(RunConfig {
                model: request,
                data,
                training,
                compute,
            }),
            out: self.run.out(),
            profile: self.run.profile,
        })
    }
}

impl<R: std::fmt::Debug> Action<R> {
    /// The settings of a run to start, for a program's tests.
    ///
    /// # Panics
    /// Where it asks for something else.
    #[track_caller]
    pub fn started(self) -> RunConfig<R> {
        match self {
            Self::Start { config, .. } => *config,
            other => panic!("{other:?}"),
        }
    }
}
