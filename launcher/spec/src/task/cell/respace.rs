//! Noise steps that `timestep_respacing` keeps.

/// The kept steps of `steps`, ascending. `text`: `cell.diffusion.timestep_respacing`.
///
/// `ddimN` keeps N steps at a constant whole stride from 0. Numbers separated by commas divide the steps into that many
/// sections and keep so many of each, spread evenly: positions are a running sum in f64, rounded half to even.
///
/// # Errors
/// The text is neither, or asks for more steps than there are; the message says what is possible.
pub fn kept_steps(steps: usize, text: &str) -> Result<Vec<usize>, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok((0..steps).collect());
    }
    if let Some(number) = text.strip_prefix("ddim") {
        return strided(steps, number, text);
    }
    let counts: Vec<usize> = text.split(',').map(|part| count(part, text)).collect::<Result<_, _>>()?;
    let mut kept = Vec::new();
    let mut start = 0;
    for (index, &count) in counts.iter().enumerate() {
        let size = steps / counts.len() + usize::from(index < steps % counts.len());
        if count > size {
            return Err(format!(
                "section {} of {text} keeps {count} of {size} steps; it can keep at most {size}",
                index + 1
            ));
        }
        let stride = if count <= 1 { 1.0 } else { (size - 1) as f64 / (count - 1) as f64 };
        let mut place = 0.0f64;
        for _ in 0..count {
            kept.push(start + place.round_ties_even() as usize);
            place += stride;
        }
        start += size;
    }
    kept.dedup();
    if kept.len() < 2 {
        return Err(format!("{text} keeps {} steps; at least 2 are needed", kept.len()));
    }
    Ok(kept)
}

fn count(part: &str, text: &str) -> Result<usize, String> {
    let number = part.trim().parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| format!("{text} is no respacing; use a number (250), numbers (10,15,20) or ddimN (ddim50)"))
}

fn strided(steps: usize, number: &str, text: &str) -> Result<Vec<usize>, String> {
    let wanted = count(number, text)?;
    let kept = |stride: usize| (0..steps).step_by(stride);
    let found = (1..steps).find(|&stride| kept(stride).len() == wanted && wanted > 1);
    found.map(|stride| kept(stride).collect()).ok_or_else(|| {
        let near = (1..steps).map(|stride| kept(stride).len()).min_by_key(|&len| (len.abs_diff(wanted), len));
        format!("no whole stride keeps {wanted} of {steps} steps; the nearest is ddim{}", near.unwrap_or(steps))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_steps_are_kept_where_nothing_is_said() {
        assert_eq!(kept_steps(5, "").unwrap(), [0, 1, 2, 3, 4]);
        assert_eq!(kept_steps(5, "5").unwrap(), [0, 1, 2, 3, 4]);
    }

    /// Values of `space_timesteps` of the public guided diffusion package.
    #[test]
    fn sections_are_spread_evenly_with_ties_to_even() {
        assert_eq!(kept_steps(10, "3").unwrap(), [0, 4, 9]);
        assert_eq!(kept_steps(10, "2,3").unwrap(), [0, 4, 5, 7, 9]);
        assert_eq!(kept_steps(11, "4,4").unwrap(), [0, 2, 3, 5, 6, 7, 9, 10]);
        assert_eq!(kept_steps(1000, "250").unwrap()[..4], [0, 4, 8, 12]);
        assert_eq!(kept_steps(1000, "250").unwrap()[249], 999);
    }

    #[test]
    fn ddim_needs_a_whole_stride() {
        assert_eq!(kept_steps(1000, "ddim50").unwrap(), (0..1000).step_by(20).collect::<Vec<_>>());
        assert_eq!(kept_steps(10, "ddim4").unwrap(), [0, 3, 6, 9]);
        let error = kept_steps(1000, "ddim600").unwrap_err();
        assert!(error.contains("no whole stride keeps 600 of 1000 steps; the nearest is ddim500"), "{error}");
    }

    #[test]
    fn nonsense_is_refused_with_a_way_out() {
        for text in ["x", "0", "-3", "5,", "ddim", "ddim0", "3.5"] {
            let error = kept_steps(100, text).unwrap_err();
            assert!(error.contains("use a number (250)"), "{text}: {error}");
        }
        assert!(kept_steps(100, "60,10").unwrap_err().contains("at most 50"));
        assert!(kept_steps(100, "1").unwrap_err().contains("at least 2"));
    }
}
