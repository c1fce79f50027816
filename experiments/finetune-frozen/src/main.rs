//! Trains the head of torchvision's GoogLeNet on CIFAR-10, over a frozen backbone. The README tells what
//! to expect.

mod arguments;

use std::process::ExitCode;

use experiment_common::{parse, run_experiment};
use transfer_common::{FineTune, Stage};

use crate::arguments::Arguments;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    run_experiment::<FineTune<Frozen>>(parse::<Arguments>)
}

struct Frozen;

impl Stage for Frozen {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
}
