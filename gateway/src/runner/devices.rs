//! Seconds of devices that a generation took.

use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::v1::DeviceUse;

/// What the answered calls of a generation took, by device.
#[derive(Debug, Default)]
pub(crate) struct Devices(Mutex<Vec<DeviceUse>>);

impl Devices {
    /// Goes on with what earlier processes counted.
    pub(crate) fn new(before: Vec<DeviceUse>) -> Self {
        Self(Mutex::new(before))
    }

    /// Adds what one call took.
    pub(crate) fn add(&self, used: Option<DeviceUse>) {
        let Some(used) = used.filter(|used| used.seconds.is_finite() && used.seconds >= 0.0) else { return };
        let mut all = self.lock();
        match all.iter_mut().find(|one| one.device_id == used.device_id) {
            Some(one) => one.seconds += used.seconds,
            None => all.push(used),
        }
    }

    /// What was taken so far.
    pub(crate) fn list(&self) -> Vec<DeviceUse> {
        self.lock().clone()
    }

    /// Only whole values are written under the lock, so it is sound even after a panic of a holder.
    fn lock(&self) -> MutexGuard<'_, Vec<DeviceUse>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_of_a_device_are_added_up_and_what_is_no_time_is_left_out() {
        let of = |id: &str, seconds| Some(DeviceUse { device: "cpu".into(), device_id: id.into(), seconds });
        let devices = Devices::new(of("a", 1.0).into_iter().collect());
        for used in [of("b", 2.0), of("a", 0.5), None, of("a", f64::NAN), of("b", -1.0), of("b", f64::INFINITY)] {
            devices.add(used);
        }
        let seconds: Vec<f64> = devices.list().iter().map(|one| one.seconds).collect();
        assert_eq!(seconds, [1.5, 2.0]);
    }
}
