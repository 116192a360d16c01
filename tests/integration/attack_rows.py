"""The rows of `attack_table`, which says what each field means. Attempts that differ in nothing else stand together."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Row(NamedTuple):
    section: str
    about: str
    stops: str
    proof: str
    open: Mapping[str, str]
    needs: str


SECTIONS = {
    "files": "Files and folders of others",
    "node": "The node's own",
    "metadata": "Files without opening them",
    "system": "The system's files and devices",
    "programs": "Programs and privileges",
    "processes": "Other processes",
    "memory": "Memory and descriptors of other processes",
    "objects": "Keys, objects in memory, terminals",
    "born": "What is handed down",
    "sockets": "Unix sockets",
    "network": "The network",
    "namespaces": "Namespaces and mounts",
    "kernel": "The kernel",
}

_NOTHING: Mapping[str, str] = {}
_PLACES = "landlock namespaces"
_SIGNALS = "fence landlock namespaces"
_TRACING = "fence landlock privileges* namespaces seccomp"
_METADATA = {"process": "file_metadata"}
_PROCESSES = {"process user": "processes"}
_LOOPBACK = {
    "process/outbound": "network.outbound",
    "rootfs/outbound": "network.outbound",
    "process/full": "level",
    "rootfs/full": "level",
}
_UDP = {name: "network.udp" if name.endswith("outbound") else why for name, why in _LOOPBACK.items()}
_FULL = {"process/full": "level", "rootfs/full": "level"}
_SEEN = {"process/localhost": "level", "process/outbound": "level", "rootfs/outbound": "level", **_FULL}


def _alike(
    section: str,
    stops: str,
    proof: str,
    abouts: Mapping[str, str],
    *,
    open: Mapping[str, str] = _NOTHING,
    needs: str = "",
) -> Iterator[tuple[str, Row]]:
    for name, about in abouts.items():
        yield name, Row(section, about, stops, proof, open, needs)


_FILES = [
    *_alike("files", _PLACES, "secret", {
        "read_file": "read a file",
        "read_through_link": "through a link of its own",
        "read_upwards": "by `..`",
        "read_own_root": "by `/proc/self/root`",
        "read_by_hard_link": "hard link a file in and read it",
        "read_after_rename": "rename a file in and read it",
        "read_in_a_race": "while a folder and a link change places",
        "list_folder": "list a folder",
    }),
    *_alike("files", _PLACES, "secret", {"read_others_temporary": "read a temporary file"}, needs="host"),
    *_alike("files", "fence landlock privileges namespaces", "secret", {
        "read_init_root": "by the root of number 1",
        "read_launcher_root": "by the launcher's root",
    }, needs="root"),
    *_alike("files", "fence landlock privileges* namespaces", "secret", {
        "read_worker_folder": "by the worker's working directory",
    }),
    *_alike("files", "landlock privileges seccomp", "secret", {
        "read_by_handle": "by a file handle",
    }, needs="root"),
    *_alike("files", _PLACES, "effect", {
        "write_outside": "overwrite a file",
        "create_outside": "create one",
        "empty_outside": "truncate one",
        "empty_while_opening": "truncate one while opening it",
        "delete_outside": "delete one",
        "delete_folder": "delete a folder",
        "make_folder": "make a folder",
        "make_link": "make a link",
        "make_fifo": "make a named pipe",
        "rename_outside": "rename a file",
        "rename_out": "rename one of its own out",
        "hard_link_out": "hard link one of its own out",
        "write_readable": "overwrite one that it may read",
        "empty_readable": "truncate one that it may read",
        "delete_readable": "delete one that it may read",
    }),
    *_alike("files", _PLACES, "call", {"lock_file": "lock a file"}),
    *_alike("files", "", "call", {"lock_readable": "lock a file that it may read"},
            open={"process": "granted", "rootfs": "granted"}),
    *_alike("files", "seccomp", "call", {"lease_readable": "take a lease on a file that it may read"}),
    *_alike("files", "", "secret", {
        "read_by_group": "read what is granted, and by its mode open to a group of the worker's",
    }, open={"process user": "user", "rootfs user": "user"}, needs="user host"),
    *_alike("node", _PLACES, "shown", {"read_key": "read `launcher.key`"}),
    *_alike("node", _PLACES, "secret", {
        "read_journal": "read the journal",
        "read_secret": "read a secret's file",
        "read_neighbours_file": "read a file of another container",
        "read_neighbours_log": "read another container's log",
    }),
    *_alike("node", "fence+ landlock privileges* namespaces", "secret", {
        "read_neighbours_environment": "read another container's environment",
    }),
    *_alike("node", _PLACES, "effect", {
        "write_neighbours_file": "write to another container's root",
        "write_own_record": "write to its own `state`",
        "move_own_root": "move its own root away",
    }),
    *_alike("node", _PLACES, "effect", {"rewrite_launcher": "rewrite the launcher's program"}, needs="root"),
    *_alike("node", "launcher", "obeyed", {
        "command_launcher": "command the launcher, with its key",
    }),
    *_alike("metadata", "namespaces", "shown", {"see_file": "see that a file exists, and its size"}, open=_METADATA),
    *_alike("metadata", "namespaces", "effect", {
        "change_mode": "change a mode",
        "change_times": "change times",
        "change_attribute": "set an extended attribute",
        "change_mode_of_readable": "change the mode of a file that it may read",
    }, open=_METADATA),
    *_alike("metadata", "namespaces", "secret", {"read_attribute": "read an extended attribute"},
            open=_METADATA),
    *_alike("metadata", "namespaces", "call", {"watch_folder": "watch a folder (inotify)"}, open=_METADATA),
    *_alike("metadata", "privileges namespaces", "effect", {"change_owner": "change an owner"}, needs="root"),
    *_alike("metadata", "privileges seccomp", "call", {"watch_everything": "watch a file system (fanotify)"},
            needs="root"),
]  # fmt: skip

_SYSTEM = [
    *_alike("system", _PLACES, "secret", {"read_passwords": "read `/etc/shadow`"}, needs="root"),
    *_alike("system", _PLACES, "effect", {
        "plant_preload": "write `/etc/ld.so.preload`",
        "plant_program": "plant a program in the path",
        "set_domain_by_file": "rename the domain by `/proc/sys`",
        "join_group": "move a process to another control group",
        "make_group": "make a control group",
    }, needs="root"),
    *_alike("system", "landlock privileges namespaces", "effect", {
        "set_forwarding": "turn on forwarding by `/proc/sys`",
    }, needs="root"),
    *_alike("system", _PLACES, "call", {
        "set_core_pattern": "write the core pattern",
        "press_sysrq": "write to `sysrq-trigger`",
    }, needs="root kernel"),
    *_alike("system", "landlock privileges namespaces", "call", {
        "read_kernel_messages": "read `/dev/kmsg`",
        "make_device": "make a device node and read it",
    }, needs="root"),
    *_alike("programs", _PLACES, "it ran", {
        "run_outside": "run a program of others",
        "run_readable": "run one that it may only read",
        "run_by_loader": "run one by the loader",
        "run_as_interpreter": "run one as an interpreter",
    }),
    *_alike("programs", _PLACES, "secret", {"run_from_memory": "run one from memory, free of the sandbox"}),
    *_alike("programs", "fence landlock privileges namespaces seccomp", "euid 0", {
        "run_set_user_id": "run a set-user-ID program",
    }, needs="user host"),
    *_alike("programs", "privileges", "capable", {"gain_by_exec": "gain capabilities by exec"}, needs="root"),
    *_alike("programs", "privileges", "call", {
        "take_capabilities": "take a capability",
        "take_groups": "take a group",
        "become_another_user": "become another user",
    }, needs="root"),
    *_alike("programs", "seccomp", "call", {"make_set_user_id": "make a set-user-ID file"}),
    *_alike("born", "launcher", "secret", {
        "inherit_descriptor": "an open descriptor",
        "inherit_environment": "the worker's environment",
        "read_inherited_key": "its session keyring",
    }),
    *_alike("born", "launcher", "call", {
        "inherit_signals": "ignored and blocked signals",
        "inherit_mask": "the file mode mask",
        "inherit_terminal": "a controlling terminal",
    }),
    *_alike("born", "privileges", "call", {"dump_core": "leave to dump core"}),
]  # fmt: skip

_PROCESS = [
    *_alike("processes", _PLACES, "call", {"see_processes": "see it in `/proc`"}),
    *_alike("processes", _PLACES, "secret", {"read_arguments": "read its arguments"}),
    *_alike("processes", "fence+ landlock privileges* namespaces", "secret", {
        "read_environment": "read its environment",
    }),
    *_alike("processes", _SIGNALS, "effect", {
        "signal_by_kill": "signal it: `kill`",
        "signal_a_thread": "`tgkill`",
        "signal_by_queue": "`rt_sigqueueinfo`",
        "signal_by_descriptor": "a pidfd",
        "signal_a_group": "its group",
        "signal_everybody": "everybody",
        "signal_as_owner": "as the owner of a socket (`F_SETOWN`)",
    }),
    *_alike("processes", _SIGNALS, "call", {
        "signal_launcher": "signal the launcher",
        "signal_worker": "the worker",
        "signal_neighbour": "another container",
    }),
    *_alike("processes", _PLACES, "call", {"signal_parent": "signal its shim"}),
    *_alike("processes", "namespaces seccomp", "effect", {"set_limits": "set its limits"}),
    *_alike("processes", "privileges* namespaces seccomp", "effect", {
        "slow_down_everybody": "lower the priority of all of the user's",
    }),
    *_alike("processes", "privileges* namespaces", "call", {
        "slow_down": "lower its priority",
        "set_disk_priority": "lower its disk priority",
    }, open=_PROCESSES),
    *_alike("processes", "privileges* namespaces", "effect", {
        "set_scheduler": "set its scheduler",
        "set_affinity": "tie it to a processor",
    }, open=_PROCESSES),
    *_alike("processes", "privileges* namespaces", "effect", {
        "set_disk_priority_of_user": "lower the disk priority of all of the user's",
    }, open=_PROCESSES, needs="host"),
    *_alike("processes", _PLACES, "effect", {"offer_to_oom": "have it killed first when memory runs out"}),
    *_alike("memory", "fence landlock privileges* namespaces", "secret", {
        "read_memory_file": "read its memory by `/proc`",
        "read_descriptor_file": "open a descriptor of it by `/proc`",
    }),
    *_alike("memory", "fence landlock privileges namespaces", "call", {
        "read_launcher_memory": "the launcher's memory by `/proc`",
    }, needs="root"),
    *_alike("memory", _TRACING, "secret", {
        "read_memory": "`process_vm_readv`",
        "trace": "`ptrace`",
        "take_descriptor": "`pidfd_getfd`",
    }),
    *_alike("memory", _TRACING, "effect", {"write_memory": "`process_vm_writev`"}),
    *_alike("memory", _TRACING, "call", {"compare_descriptors": "`kcmp`"}),
    *_alike("memory", "fence landlock privileges* namespaces", "call", {
        "find_pages": "`move_pages`",
        "read_robust_list": "`get_robust_list`",
    }),
    *_alike("memory", "fence+ landlock+ privileges* namespaces seccomp", "call", {
        "measure_victim": "`perf_event_open`",
    }),
    *_alike("memory", "privileges namespaces seccomp", "call", {"page_out": "`process_madvise`"}, needs="root"),
    *_alike("memory", "seccomp", "call", {"trace_a_child": "trace a child of its own"}),
]  # fmt: skip

_OBJECTS = [
    *_alike("objects", "namespaces seccomp", "secret", {
        "read_shared_memory": "System V shared memory",
        "take_message": "a System V message",
    }),
    *_alike("objects", "namespaces seccomp", "effect", {"move_semaphore": "a System V semaphore"}),
    *_alike("objects", "landlock namespaces seccomp", "secret", {"take_posix_message": "a POSIX message"}),
    *_alike("objects", _PLACES, "secret", {"read_posix_memory": "POSIX shared memory"}),
    *_alike("objects", "seccomp", "secret", {"read_key_by_number": "another process's key"}),
    *_alike("objects", "seccomp", "call", {"make_keyring": "make a keyring", "add_key": "add a key"}),
    *_alike("objects", "launcher", "effect", {
        "type_into_terminal": "type into the terminal (`TIOCSTI`)",
    }, needs="kernel"),
    *_alike("objects", "landlock privileges namespaces seccomp", "effect", {
        "type_into_others_terminal": "type into another's terminal",
    }, needs="root kernel"),
    *_alike("objects", _PLACES, "effect", {"write_to_others_terminal": "write to another's terminal"}),
    *_alike("objects", "landlock privileges namespaces seccomp", "call", {
        "use_console": "use the console (`TIOCLINUX`)",
    }, needs="root kernel"),
    *_alike("sockets", "namespaces seccomp", "effect", {
        "unix_stream": "connect to a stream socket",
        "unix_datagram": "a datagram socket",
        "unix_packets": "a packet socket",
        "unix_pair_turned": "one end of a pair, turned to a path",
    }),
    *_alike("sockets", "landlock namespaces seccomp", "effect", {
        "abstract_stream": "an abstract stream socket",
        "abstract_datagram": "an abstract datagram socket",
        "make_socket": "make a socket in a folder of others",
    }),
    *_alike("network", "landlock namespaces seccomp", "effect", {
        "tcp": "connect to a TCP port on loopback",
        "tcp_nats": "to the NATS server's",
        "tcp_by_ipv6": "by an IPv6 address",
        "tcp_while_writing": "with `TCP_FASTOPEN_CONNECT`",
    }, open=_LOOPBACK),
    *_alike("network", "namespaces seccomp", "effect", {
        "tcp_while_sending": "with `MSG_FASTOPEN`",
        "tcp_while_sending_many": "the same by `sendmmsg`",
    }, open=_LOOPBACK),
    *_alike("network", "namespaces seccomp", "effect", {"mptcp": "by MPTCP"}, open=_FULL),
    *_alike("network", "namespaces seccomp", "effect", {
        "smc": "by SMC, a protocol that opens TCP connections of its own",
        "smc_over_tcp": "by a TCP socket that was turned into one (`TCP_ULP`)",
    }, open=_FULL, needs="kernel"),
    *_alike("network", "namespaces seccomp", "effect", {"smc_by_family": "by a socket of SMC's family"},
            needs="kernel"),
    *_alike("network", "namespaces seccomp", "effect", {"udp": "send by UDP", "udp_by_ipv6": "by an IPv6 address"},
            open=_UDP),
    *_alike("network", "landlock namespaces seccomp", "call", {"serve": "serve a port that was not given"}, open=_FULL),
    *_alike("network", "namespaces seccomp", "call", {"serve_unbound": "serve without `bind`"},
            open={"process/localhost": "network.localhost", **_LOOPBACK}),
    *_alike("network", "namespaces seccomp", "call", {"see_addresses": "see the host's addresses (netlink)"},
            open=_SEEN),
    *_alike("network", "namespaces", "call", {"see_sockets": "see the host's connections (`/proc/net/tcp`)"},
            open={"process": "processes", "rootfs/outbound": "level", "rootfs/full": "level"}),
    *_alike("network", "privileges namespaces seccomp", "call", {"add_address": "add an address"}, needs="root"),
    *_alike("network", "privileges seccomp", "call", {
        "open_raw": "a raw socket",
        "open_packet": "a packet socket",
    }, needs="root"),
    *_alike("network", "seccomp", "call", {
        "open_uevents": "netlink: the kernel's events",
        "open_diagnosis": "netlink: diagnosis of sockets",
        "open_other_families": "any other family of sockets",
    }),
    *_alike("network", "seccomp", "call", {
        "open_vsock": "a socket to the machine's host (vsock)",
        "use_kernel_ciphers": "the kernel's ciphers (AF_ALG)",
    }, needs="kernel"),
]  # fmt: skip

_KERNEL = [
    *_alike("namespaces", "seccomp", "call", {
        "new_user_namespace": "a new user namespace",
        "new_namespace_by_clone": "by `clone`",
        "new_namespace_by_clone3": "by `clone3`",
        "list_mounts": "`listmount`",
    }, needs="kernel"),
    *_alike("namespaces", "privileges seccomp", "call", {
        "new_mount_namespace": "a new mount namespace",
        "new_pid_namespace": "process namespace",
        "new_network_namespace": "network namespace",
        "new_ipc_namespace": "IPC namespace",
        "new_host_namespace": "UTS namespace",
        "new_group_namespace": "cgroup namespace",
        "new_time_namespace": "time namespace",
        "make_file_system": "`fsopen`, `fsmount`",
        "pick_file_system": "`fspick`",
        "copy_tree": "`open_tree`",
        "move_tree": "`move_mount`",
        "set_writable": "`mount_setattr`: make a read-only mount writable",
        "change_root": "`chroot`, and out of it",
        "swap_root": "`pivot_root`",
    }, needs="root"),
    *_alike("namespaces", "fence landlock privileges seccomp", "call", {
        "mount_new": "`mount` a new file system",
        "mount_same": "bind the root elsewhere",
        "mount_processes": "mount `/proc` anew",
        "remount_writable": "make a read-only mount writable",
        "unmount": "take a mount away",
    }, needs="root"),
    *_alike("namespaces", "fence landlock seccomp", "call", {
        "mount_in_user_namespace": "mount in a new user namespace",
    }),
    *_alike("namespaces", "fence landlock privileges namespaces seccomp", "secret", {
        "join_namespace": "join another's mount namespace",
        "join_namespace_by_descriptor": "by a pidfd",
    }, needs="root"),
    *_alike("kernel", "seccomp", "call", {
        "measure_itself": "`perf_event_open`",
        "catch_faults": "`userfaultfd`",
        "use_io_uring": "`io_uring`",
        "use_quota": "`quotactl`",
        "make_code_predictable": "no address randomisation",
        "call_by_32_bits": "a 32-bit system call",
    }, needs="kernel"),
    *_alike("kernel", "privileges seccomp", "call", {
        "load_bpf": "`bpf`",
        "load_module": "`init_module`",
        "load_module_file": "`finit_module`",
        "remove_module": "`delete_module`",
        "load_kernel": "`kexec_load`",
        "load_kernel_file": "`kexec_file_load`",
        "open_ports": "`ioperm`",
        "restart_machine": "`reboot`",
        "swap_on": "`swapon`",
        "swap_off": "`swapoff`",
        "set_clock": "`settimeofday`",
        "shift_clock": "`clock_adjtime`",
        "tune_clock": "`adjtimex`",
        "read_messages": "`syslog`",
        "hang_up": "`vhangup`",
    }, needs="root kernel"),
    *_alike("kernel", "landlock privileges seccomp", "call", {"keep_accounts": "`acct`"},
            needs="root kernel"),
    *_alike("kernel", "privileges namespaces seccomp", "effect", {"rename_host": "`sethostname`"}, needs="root"),
    *_alike("kernel", "seccomp", "call", {"call_by_x32": "an x32 system call"}, needs="kernel"),
]  # fmt: skip

ROWS: Mapping[str, Row] = dict([*_FILES, *_SYSTEM, *_PROCESS, *_OBJECTS, *_KERNEL])
