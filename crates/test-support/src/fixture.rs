//! Fixtures: safetensors files written by the scripts in tools/pytorch.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor};

/// The tensors and metadata of one fixture file.
pub struct Fixture {
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

/// One case of a fixture: its settings and its tensors, named `<case>.<tensor>`.
pub struct Case<'a> {
    fixture: &'a Fixture,
    /// The settings, as JSON.
    pub settings: serde_json::Value,
}

impl Fixture {
    /// Reads a fixture.
    ///
    /// # Panics
    /// When the file is absent or damaged: fixtures are committed.
    pub fn load(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self {
            tensors,
            metadata: header.metadata().clone().unwrap_or_default(),
        }
    }

    /// This fixture with its tensors on `device`.
    ///
    /// # Errors
    /// Those of the copy.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = |(name, tensor): (&String, &Tensor)| {
            let tensor = tensor.to_device(device)?;
            Ok((name.clone(), tensor))
        };
        Ok(Self {
            tensors: self.tensors.iter().map(moved).collect::<Result<_>>()?,
            metadata: self.metadata.clone(),
        })
    }

    /// The tensor of that name.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("the fixture has no tensor {name}"))
    }

    /// All names, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A metadata entry.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn text(&self, key: &str) -> &str {
        let text = self.metadata.get(key);
        text.unwrap_or_else(|| panic!("the fixture has no metadata {key}"))
    }

    /// A metadata entry parsed as JSON.
    ///
    /// # Panics
    /// When it is absent or no JSON.
    #[track_caller]
    pub fn json(&self, key: &str) -> serde_json::Value {
        serde_json::from_str(self.text(key)).unwrap_or_else(|e| panic!("metadata {key}: {e}"))
    }

    /// The cases of one operation.
    ///
    /// # Panics
    /// When there is none, so that a renamed operation is not skipped silently.
    #[track_caller]
    pub fn cases(&self, op: &str) -> Vec<Case<'_>> {
        let serde_json::Value::Array(cases) = self.json("cases") else {
            panic!("metadata cases is no list");
        };
        let cases: Vec<_> = cases
            .into_iter()
            .filter(|case| case["op"] == op)
            .map(|settings| Case {
                fixture: self,
                settings,
            })
            .collect();
        assert!(!cases.is_empty(), "the fixture has no case of {op}");
        cases
    }
}

impl Case<'_> {
    /// The case's name.
    pub fn name(&self) -> &str {
        self.settings["name"].as_str().unwrap_or("unnamed case")
    }

    /// The tensor `<case>.<name>`.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.fixture.tensor(&format!("{}.{name}", self.name()))
    }

    /// The tensor `<case>.<name>`, if there is one.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.fixture.tensors.get(&format!("{}.{name}", self.name()))
    }

    /// A pair setting such as `"stride": [2, 1]`.
    ///
    /// # Panics
    /// When it is absent or no pair.
    #[track_caller]
    pub fn pair(&self, key: &str) -> (usize, usize) {
        let at = |i: usize| {
            let value = self.settings[key][i].as_u64();
            value.unwrap_or_else(|| panic!("{}: no pair {key}", self.name())) as usize
        };
        (at(0), at(1))
    }

    /// A yes-or-no setting.
    ///
    /// # Panics
    /// When it is absent.
    #[track_caller]
    pub fn flag(&self, key: &str) -> bool {
        let value = self.settings[key].as_bool();
        value.unwrap_or_else(|| panic!("{}: no flag {key}", self.name()))
    }

    /// A number.
    ///
    /// # Panics
    /// When it is absent.
    #[track_caller]
    pub fn number(&self, key: &str) -> f64 {
        let value = self.settings[key].as_f64();
        value.unwrap_or_else(|| panic!("{}: no number {key}", self.name()))
    }
}
