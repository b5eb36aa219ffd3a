//! Values of this process: a forked child has copies of them, whose threads and locks are not its own.

/// A value that is dropped in the process that made it alone.
pub struct Own<T> {
    /// Taken on drop alone.
    value: Option<T>,
    process: u32,
}

impl<T> Own<T> {
    pub fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    /// `None` in a forked child.
    pub fn get(&self) -> Option<&T> {
        self.value.as_ref().filter(|_| self.process == std::process::id())
    }

    /// Takes the value out; `None` in a forked child, or the second time.
    pub fn take(&mut self) -> Option<T> {
        if self.process == std::process::id() { self.value.take() } else { None }
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}
