//! Names and groups of the 20 joint angles, in the order of the files: five fingers of four.

/// Angles of a hand.
pub const JOINTS: usize = 20;

/// Angles per finger.
pub const PER_FINGER: usize = 4;

/// Fingers in the order of the files.
pub const FINGERS: [&str; 5] = ["thumb", "index", "middle", "ring", "pinky"];

/// Angles of the thumb: carpometacarpal flexion and abduction, then the two hinges.
pub const THUMB: [&str; PER_FINGER] = ["CMC_FE", "CMC_AA", "MCP_FE", "IP_FE"];

/// Angles of every other finger.
pub const FINGER: [&str; PER_FINGER] = ["MCP_AA", "MCP_FE", "PIP_FE", "DIP_FE"];

/// Distance from the palm, by an angle's place in its finger: two at the base, one in the middle, one at the tip.
pub const REGIONS: [(&str, &[usize]); 3] = [("proximal", &[0, 1]), ("mid", &[2]), ("distal", &[3])];

/// Name of angle `index`: `thumb_CMC_FE`, `index_MCP_AA`, ...; none past the last.
pub fn name(index: usize) -> Option<String> {
    let finger = FINGERS.get(index / PER_FINGER)?;
    let angles = if index < PER_FINGER { THUMB } else { FINGER };
    Some(format!("{finger}_{}", angles[index % PER_FINGER]))
}

/// Groups that metrics are given for: name and indices of its angles.
pub fn groups() -> Vec<(&'static str, Vec<usize>)> {
    let fingers = FINGERS.iter().enumerate().map(|(f, name)| (*name, (f * PER_FINGER..(f + 1) * PER_FINGER).collect()));
    let regions = REGIONS
        .iter()
        .map(|(name, places)| (*name, (0..JOINTS).filter(|joint| places.contains(&(joint % PER_FINGER))).collect()));
    fingers.chain(regions).collect()
}
