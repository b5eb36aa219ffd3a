//! Records, progress, plots, memory lines.
