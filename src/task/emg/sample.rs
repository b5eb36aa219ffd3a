//! Sample recordings in the true format: what EMG is (amplitude-modulated noise with a delay), learnable by design.
//!
//! Four latent synergies, sums of slow sinusoids, drive 20 angles by a fixed matrix; 60 ms earlier the same synergies set
//! the amplitude of each EMG channel's high-passed noise. So the angles follow from the EMG's envelope, not from its values.

use crate::data::DataError;
use crate::data::source::hdf5::Attribute;
use crate::data::source::hdf5::write::{Row, Storage, write_session};
use crate::data::source::in_threads;
use crate::task::sample::{Random, new_folder};
use std::f64::consts::TAU;
use std::path::Path;

const RATE: f64 = 2000.0;
const SYNERGIES: usize = 4;
const SINUSOIDS: usize = 3;
/// EMG precedes the movement by this much: electromechanical delay.
const DELAY_S: f64 = 0.06;
/// Corner of the high-pass filter that recorded EMG has been through.
const HIGH_PASS_HZ: f64 = 40.0;
/// Mapping from synergies to angles and channels: one hand, whatever the seed.
const HAND_SEED: u64 = 0x0045_4D47;
/// 2024-01-01 12:00 UTC.
const FIRST_START_S: f64 = 1_704_110_400.0;

/// Request for sample data.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    pub sessions: usize,
    pub seconds: f64,
    pub storage: Storage,
    pub seed: u64,
    /// Samples of the block in each session whose angles are zero, as where inverse kinematics failed; 0: none.
    pub ik_failure_rows: usize,
}

impl Default for SampleSpec {
    /// 12 sessions of 20 s, stored as the public recordings are.
    fn default() -> Self {
        Self { sessions: 12, seconds: 20.0, storage: Storage::default(), seed: 42, ik_failure_rows: 600 }
    }
}

/// Writes the sessions into the new folder `out`, which is never half there.
///
/// # Errors
/// `out` exists and is not an empty folder, or there is no room or permission.
pub fn write_sample_data(out: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    new_folder(out, |folder| write_all(folder, spec))
}

/// Signals are made in threads; libhdf5 writes one file at a time.
fn write_all(folder: &Path, spec: &SampleSpec) -> Result<(), DataError> {
    let sessions: Vec<usize> = (0..spec.sessions).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(4);
    in_threads(threads, &sessions, |session| write_one(folder, spec, *session)).into_iter().collect()
}

fn write_one(folder: &Path, spec: &SampleSpec, session: usize) -> Result<(), DataError> {
    let name = format!("s{session:02}.hdf5");
    let start = FIRST_START_S + session as f64 * 3600.0;
    let text = |value: String| Attribute::Text(value);
    let attributes = [
        ("filename", text(name.trim_end_matches(".hdf5").into())),
        ("session", text(format!("sample-session-{session:02}"))),
        ("stage", text("FreeStyle".into())),
        ("user", text(format!("sample-user-{}", session / 3))),
        ("side", text(if session.is_multiple_of(2) { "left" } else { "right" }.into())),
        ("sample_rate", Attribute::Float(RATE)),
        ("start", Attribute::Float(start)),
        ("end", Attribute::Float(start + spec.seconds)),
        ("num_channels", Attribute::Integer(16)),
    ];
    write_session(&folder.join(name), &spec.storage, &attributes, &session_rows(spec, session, start))
}

/// The samples of one session.
fn session_rows(spec: &SampleSpec, session: usize, start: f64) -> Vec<Row> {
    let rows = (spec.seconds * RATE).round().max(0.0) as usize;
    let hand = Hand::new();
    let mut random = Random(spec.seed ^ (session as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let latent = Latent::new(&mut random);
    let decay = 1.0 / (1.0 + TAU * HIGH_PASS_HZ / RATE);
    let (mut white, mut passed) = ([0.0; 16], [0.0; 16]);
    let failure = failure_block(rows, spec.ik_failure_rows, &mut random);
    let mut drive = [0.0; 16];
    (0..rows)
        .map(|row| {
            let t = row as f64 / RATE;
            let failed = failure.contains(&row);
            let joint_angles = if failed { [0.0; 20] } else { hand.angles(&latent.at(t)) };
            // The envelope moves far slower than 2 kHz: every fourth sample will do.
            if row.is_multiple_of(4) {
                drive = hand.envelopes(&latent.at(t + DELAY_S));
            }
            let emg = std::array::from_fn(|channel| {
                let fresh = random.normal();
                passed[channel] = decay * (passed[channel] + fresh - white[channel]);
                white[channel] = fresh;
                (drive[channel] * passed[channel] + 0.05 * random.normal()) as f32
            });
            Row { time: start + t, joint_angles, emg }
        })
        .collect()
}

fn failure_block(rows: usize, length: usize, random: &mut Random) -> std::ops::Range<usize> {
    if length == 0 || length >= rows {
        return 0..0;
    }
    let first = (random.uniform() * (rows - length) as f64) as usize;
    first..first + length
}

/// The fixed part: how synergies move joints and drive muscles.
struct Hand {
    joints: [[f64; SYNERGIES]; 20],
    muscles: [[f64; SYNERGIES]; 16],
}

impl Hand {
    fn new() -> Self {
        let mut random = Random(HAND_SEED);
        let mut weights = |scale: f64| std::array::from_fn(|_| scale * random.normal());
        Self { joints: std::array::from_fn(|_| weights(0.2)), muscles: std::array::from_fn(|_| weights(1.2)) }
    }

    /// Radians, about -0.2 to 1.4, never all zero; f32 precision, finer than any motion capture, so that they compress.
    fn angles(&self, synergies: &[f64; SYNERGIES]) -> [f64; 20] {
        self.joints.map(|weights| f64::from((0.4 + dot(&weights, synergies)).clamp(-0.6, 1.6) as f32))
    }

    fn envelopes(&self, synergies: &[f64; SYNERGIES]) -> [f64; 16] {
        self.muscles.map(|weights| 0.2 + dot(&weights, synergies).exp().ln_1p())
    }
}

fn dot(a: &[f64; SYNERGIES], b: &[f64; SYNERGIES]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Slow movement of one session: per synergy a sum of sinusoids of 0.2 to 1 Hz with random phases.
struct Latent([[(f64, f64); SINUSOIDS]; SYNERGIES]);

impl Latent {
    fn new(random: &mut Random) -> Self {
        Self(std::array::from_fn(|_| std::array::from_fn(|_| (0.2 + 0.8 * random.uniform(), TAU * random.uniform()))))
    }

    fn at(&self, t: f64) -> [f64; SYNERGIES] {
        self.0.map(|waves| waves.iter().map(|(hertz, phase)| (TAU * hertz * t + phase).sin()).sum::<f64>() * 0.7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::hdf5::{SessionData, Wanted};

    fn wanted() -> Wanted {
        Wanted {
            group: "emg2pose".into(),
            dataset: "timeseries".into(),
            fields: vec![("emg".into(), 16), ("joint_angles".into(), 20)],
        }
    }

    #[test]
    fn sample_data_is_deterministic_complete_and_in_the_true_format() {
        let dir = tempfile::tempdir().unwrap();
        let spec = SampleSpec { sessions: 2, seconds: 2.0, ik_failure_rows: 300, ..Default::default() };
        write_sample_data(&dir.path().join("a"), &spec).unwrap();
        write_sample_data(&dir.path().join("b"), &spec).unwrap();
        write_sample_data(&dir.path().join("c"), &SampleSpec { seed: 1, ..spec }).unwrap();
        let read = |name: &str| {
            let session = SessionData::open(&dir.path().join(name).join("s01.hdf5"), &wanted()).unwrap();
            assert_eq!(session.attributes().len(), 9);
            assert_eq!(session.attributes()["side"], Attribute::Text("right".into()));
            assert_eq!(session.field_names(), ["time", "joint_angles", "emg"]);
            session.window(0, 4000).unwrap()
        };
        let (a, b, c) = (read("a"), read("b"), read("c"));
        assert!(a == b && a != c);
        let zero = a[1].chunks(20).filter(|pose| pose.iter().all(|x| *x == 0.0)).count();
        assert_eq!(zero, 300);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
        let error = write_sample_data(&dir.path().join("a"), &SampleSpec::default()).unwrap_err().to_string();
        assert!(error.contains("already holds files"), "{error}");
    }

    #[test]
    fn angles_are_plausible_and_the_emg_is_noise_of_zero_mean() {
        let rows = session_rows(&SampleSpec { seconds: 10.0, ..Default::default() }, 3, 0.0);
        let mean = rows.iter().map(|row| f64::from(row.emg[5])).sum::<f64>() / rows.len() as f64;
        let power = rows.iter().map(|row| f64::from(row.emg[5]).powi(2)).sum::<f64>() / rows.len() as f64;
        assert!(mean.abs() < 0.05 * power.sqrt(), "mean {mean}, rms {}", power.sqrt());
        let inside = rows.iter().flat_map(|row| row.joint_angles).filter(|x| (-0.61..=1.61).contains(x)).count();
        assert_eq!(inside, rows.len() * 20);
        // Envelope 60 ms ahead of the pose: the synergies at t + delay set the amplitude at t.
        let mut random = Random(7);
        let normal: Vec<f64> = (0..20_000).map(|_| random.normal()).collect();
        let variance = normal.iter().map(|x| x * x).sum::<f64>() / 20_000.0;
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
    }
}
