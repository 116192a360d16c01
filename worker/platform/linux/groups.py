"""The rule groups that a spec may ask for on Linux."""

from worker.platform.base import RuleGroup

GROUPS = {
    group.name: group
    for group in (
        RuleGroup(name="proc", harmless=False, text="read all of /proc: command lines of every process"),
        RuleGroup(name="shm", harmless=False, text="read and write /dev/shm, shared with all of the host"),
        RuleGroup(name="ipc", harmless=False, text="System V IPC and POSIX queues, shared by the user"),
        RuleGroup(name="pty", harmless=False, text="open terminals: new ones, and those of the same user"),
        RuleGroup(name="cgroup", harmless=True, text="read /sys/fs/cgroup: names and limits of services"),
    )
}
