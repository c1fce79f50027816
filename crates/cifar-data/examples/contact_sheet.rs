//! Writes the first pictures of a set as one PNG, to look at.
//!
//! ```sh
//! cargo run -p cifar-data --example contact_sheet                     # the built-in shapes
//! cargo run -p cifar-data --example contact_sheet -- --data-dir data  # CIFAR-10
//! ```

use std::path::PathBuf;

use anyhow::{Context, Result};
use cifar_data::{CLASS_NAMES, ImageSet, SIDE, Split, shapes};
use clap::Parser;
use image::RgbImage;

/// Write the first pictures of the training set as one PNG.
#[derive(Parser)]
struct Arguments {
    /// Folder with CIFAR-10; without it, the built-in shapes are drawn
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Seed of the shapes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of pictures
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// Enlargement of a pixel
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=16))]
    zoom: u32,
    /// File to write; one that exists is replaced
    #[arg(long, default_value = "contact-sheet.png")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let (set, names) = match &arguments.data_dir {
        Some(dir) => (cifar_data::load(dir)?.train, CLASS_NAMES),
        None => {
            let set = shapes::generate(arguments.seed, Split::Train, arguments.count);
            (set, shapes::CLASS_NAMES)
        }
    };
    let set = set.take_first(arguments.count);
    contact_sheet(&set, arguments.zoom)
        .save(&arguments.out)
        .with_context(|| format!("cannot write `{}`", arguments.out.display()))?;
    println!("wrote {}; the first row:", arguments.out.display());
    for &label in set.labels().iter().take(COLUMNS) {
        println!("  {}", names[usize::from(label)]);
    }
    Ok(())
}

const COLUMNS: usize = 10;

fn contact_sheet(set: &ImageSet, zoom: u32) -> RgbImage {
    let gap = 2;
    let cell = SIDE as u32 * zoom + gap;
    let rows = set.len().div_ceil(COLUMNS).max(1);
    RgbImage::from_fn(COLUMNS as u32 * cell, rows as u32 * cell, |x, y| {
        let index = (y / cell) as usize * COLUMNS + (x / cell) as usize;
        let (x, y) = ((x % cell / zoom) as usize, (y % cell / zoom) as usize);
        if index >= set.len() || x >= SIDE || y >= SIDE {
            return image::Rgb([128; 3]);
        }
        let image = set.image(index);
        image::Rgb([0, 1, 2].map(|channel| image[(channel * SIDE + y) * SIDE + x]))
    })
}
