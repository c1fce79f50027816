//! Fine-tunes torchvision's GoogLeNet on CIFAR-10, every layer. The README tells what
//! to expect.

mod arguments;

use std::process::ExitCode;

use experiment_common::{parse, run_experiment};
use transfer_common::{FineTune, Stage};

use crate::arguments::Arguments;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    run_experiment::<FineTune<Full>>(parse::<Arguments>)
}

struct Full;

impl Stage for Full {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
}
