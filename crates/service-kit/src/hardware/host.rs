//! The processor's memory: the machine's, or less where a container has a limit.

use std::{fs, path::Path};

/// Memory of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All that this process may have.
    pub total_bytes: u64,
    /// What of it nobody uses now, caches of files counted as free.
    pub free_bytes: u64,
    /// The container's limit, where it is below the machine's memory.
    pub limit_bytes: Option<u64>,
}

/// Asks the system. Where it does not say, nothing is limited.
#[must_use]
pub fn host_memory() -> HostMemory {
    read(&|path| fs::read_to_string(path).ok())
}

fn read(file: &dyn Fn(&Path) -> Option<String>) -> HostMemory {
    let info = file(Path::new("/proc/meminfo")).unwrap_or_default();
    let machine = field(&info, "MemTotal:").unwrap_or(u64::MAX);
    let mut memory = HostMemory {
        total_bytes: machine,
        free_bytes: field(&info, "MemAvailable:").unwrap_or(machine).min(machine),
        limit_bytes: None,
    };
    // A group's limit binds those below it.
    let groups = file(Path::new("/proc/self/cgroup")).unwrap_or_default();
    for Version { mount, own, limit, held } in groups.lines().filter_map(Version::of) {
        for group in Path::new(own).ancestors() {
            let at = |name: &str| Path::new(mount).join(group).join(name);
            let number = |name: &str| -> Option<u64> { file(&at(name))?.trim().parse().ok() };
            let Some(limit) = number(limit) else { continue }; // `max`, or the root, which has no limit.
            if limit < memory.total_bytes {
                memory.total_bytes = limit;
                memory.limit_bytes = Some(limit);
            }
            // A group's use counts pages of files that the system drops when memory is needed, mapped weights among them.
            let stat = file(&at("memory.stat")).unwrap_or_default();
            let pages = |name: &str| -> u64 {
                stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
            };
            let cached = pages("inactive_file ").saturating_add(pages("active_file "));
            let held = number(held).unwrap_or(0).saturating_sub(cached);
            memory.free_bytes = memory.free_bytes.min(limit.saturating_sub(held));
        }
    }
    memory
}

/// Where a version of control groups says what a group may have, and what it has.
struct Version<'a> {
    mount: &'static str,
    /// This process's group, below the mount.
    own: &'a str,
    limit: &'static str,
    held: &'static str,
}

impl<'a> Version<'a> {
    /// Of a line of `/proc/self/cgroup`: only version 2 has one without a controller, version 1 one for memory. Nothing for
    /// others.
    fn of(line: &'a str) -> Option<Self> {
        let (_, rest) = line.split_once(':')?;
        let (controllers, own) = rest.split_once(":/")?;
        if controllers.is_empty() {
            return Some(Self { mount: "/sys/fs/cgroup", own, limit: "memory.max", held: "memory.current" });
        }
        controllers.split(',').any(|controller| controller == "memory").then_some(Self {
            mount: "/sys/fs/cgroup/memory",
            own,
            limit: "memory.limit_in_bytes",
            held: "memory.usage_in_bytes",
        })
    }
}

/// A field of `/proc/meminfo`, which counts in KiB.
fn field(info: &str, name: &str) -> Option<u64> {
    let line = info.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: &str = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n";

    fn with(files: &[(&str, &str)]) -> HostMemory {
        read(&|path| files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned()))
    }

    #[test]
    fn without_a_container_the_machine_counts() {
        let memory = with(&[("/proc/meminfo", MACHINE), ("/proc/self/cgroup", "0::/\n")]);
        assert_eq!(memory, HostMemory { total_bytes: 16 << 20, free_bytes: 8 << 20, limit_bytes: None });
        assert_eq!(with(&[]).total_bytes, u64::MAX);
    }

    #[test]
    fn pages_of_files_in_a_group_are_free() {
        let memory = with(&[
            ("/proc/meminfo", MACHINE),
            ("/proc/self/cgroup", "0::/one\n"),
            ("/sys/fs/cgroup/one/memory.max", "4194304\n"),
            ("/sys/fs/cgroup/one/memory.current", "4194304\n"),
            ("/sys/fs/cgroup/one/memory.stat", "anon 1048576\ninactive_file 2097152\nactive_file 1048576\n"),
        ]);
        assert_eq!(memory.free_bytes, 3 << 20);
    }

    /// In a container its own group is the mount's root, whatever the host calls it.
    #[test]
    fn the_older_version_of_groups_limits_too() {
        let memory = with(&[
            ("/proc/meminfo", MACHINE),
            ("/proc/self/cgroup", "7:cpu,cpuacct:/docker/one\n4:memory:/docker/one\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "4194304\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "3145728\n"),
            ("/sys/fs/cgroup/memory/memory.stat", "cache 1\ninactive_file 1048576\nactive_file 0\n"),
        ]);
        assert_eq!(memory, HostMemory { total_bytes: 4 << 20, free_bytes: 2 << 20, limit_bytes: Some(4 << 20) });
        let unbound = "9223372036854771712\n";
        let none = with(&[
            ("/proc/meminfo", MACHINE),
            ("/proc/self/cgroup", "4:memory:/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", unbound),
        ]);
        assert_eq!((none.total_bytes, none.limit_bytes), (16 << 20, None));
    }

    #[test]
    fn the_least_limit_of_the_group_and_those_above_it_counts() {
        let memory = with(&[
            ("/proc/meminfo", MACHINE),
            ("/proc/self/cgroup", "1:cpu:/x\n0::/pods/one\n"),
            ("/sys/fs/cgroup/pods/one/memory.max", "max\n"),
            ("/sys/fs/cgroup/pods/memory.max", "4194304\n"),
            ("/sys/fs/cgroup/pods/memory.current", "1048576\n"),
            ("/sys/fs/cgroup/memory.max", "9999999999\n"),
        ]);
        assert_eq!(memory, HostMemory { total_bytes: 4 << 20, free_bytes: 3 << 20, limit_bytes: Some(4 << 20) });
    }
}
