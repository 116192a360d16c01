"""Groups that every profile holds: what a program needs to start, to talk and to find out where it is.

`source` names who ships the same rule: `reference` is the reference system's profile; the short names are
those of docs/seatbelt.md.
"""

from .rules import Group, Rule, literal, named, services, subpath

# Folders of the system from which every container may execute: sealed, the same on every Mac of a release.
EXECUTABLE = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/libexec")

_LIBRARIES = (
    "/usr/lib",
    "/System/Library/Frameworks",
    "/System/Library/PrivateFrameworks",
    "/System/Library/SubFrameworks",
    "/System/Library/Extensions",
    "/System/iOSSupport",
    "/Library/Apple/usr/lib",
    "/Library/Apple/System/Library/Frameworks",
    "/Library/Apple/System/Library/PrivateFrameworks",
)
# Where the system's libraries are since macOS 13. Older releases have no such paths, and may name them.
_CRYPTEXES = (
    "/System/Cryptexes/OS",
    "/System/Cryptexes/App",
    "/System/Volumes/Preboot/Cryptexes/OS",
    "/System/Volumes/Preboot/Cryptexes/App/System",
)

_ETC = (
    "bashrc", "group", "hosts", "localtime", "passwd", "paths", "profile", "protocols", "resolv.conf", "services",
    "shells", "zprofile", "zshrc",
)  # fmt: skip

# By name, as anything else would let another process's arguments and environment be read (kern.procargs2).
_SYSCTLS = """
hw.activecpu hw.busfrequency_compat hw.byteorder hw.cacheconfig hw.cachelinesize hw.cachelinesize_compat
hw.cpu64bit_capable hw.cpufamily hw.cpufrequency hw.cpufrequency_compat hw.cpusubfamily hw.cpusubtype
hw.cputype hw.l1dcachesize_compat hw.l1icachesize_compat hw.l2cachesize_compat hw.l3cachesize_compat
hw.logicalcpu hw.logicalcpu_max hw.machine hw.memsize hw.model hw.ncpu hw.nperflevels hw.packages hw.pagesize
hw.pagesize_compat hw.physicalcpu hw.physicalcpu_max hw.physmem hw.tbfrequency hw.tbfrequency_compat
hw.usermem hw.vectorunit kern.argmax kern.boottime kern.hostname kern.iossupportversion kern.maxfiles
kern.maxfilesperproc kern.maxproc kern.ngroups kern.osproductversion kern.osrelease kern.ostype
kern.osvariant_status kern.osversion kern.secure_kernel kern.usrstack64 kern.version kern.willshutdown
machdep.cpu.brand_string machdep.ptrauth_enabled security.mac.lockdown_mode_state sysctl.proc_cputype vm.loadavg
"""

_SYSTEM = Group(
    name="system",
    purpose="the loader, the system's libraries and frameworks",
    always=True,
    rules=(
        Rule(
            operations="file-read* file-map-executable",
            filters=subpath(*_LIBRARIES),
            source="reference; CDX restricted_read_only_platform_defaults.sbpl",
        ),
        Rule(
            operations="file-read* file-map-executable",
            filters=subpath(*_CRYPTEXES),
            source="CHR sandbox/policy/mac/common.sb, from dyld-support.sb",
        ),
        Rule(
            operations="file-read*",
            filters=literal("/"),
            source="reference; without it dyld aborts on 26: openai/codex#35437, akitaonrails/ai-jail#77",
        ),
        Rule(
            operations="file-read*",
            filters=(
                *subpath(
                    "/System/Library/ColorSync",
                    "/System/Library/CoreServices/CoreTypes.bundle",
                    "/System/Library/CoreServices/SystemVersion.bundle",
                    "/System/Library/Preferences/Logging",
                    "/Library/Preferences/Logging",
                ),
                *literal(
                    "/System/Library/CoreServices/SystemVersion.plist",
                    "/System/Library/CoreServices/SystemVersionCompat.plist",
                    "/System/Library/CoreServices/.SystemVersionPlatform.plist",
                ),
            ),
            source="reference (ColorSync); CHR common.sb; NIX sandbox-defaults.sb",
        ),
        Rule(
            operations="file-read-metadata",
            filters=literal("/tmp", "/var", "/etc", "/dev", "/System/Volumes", "/System/Volumes/Data"),
            source="NIX sandbox-defaults.sb; CDX restricted_read_only_platform_defaults.sbpl",
        ),
    ),
)

_SHELL = Group(
    name="shell",
    purpose="/bin/sh and the system's own programs, with the files of /etc that hold no secret",
    always=True,
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath(*EXECUTABLE),
            source="CDX restricted_read_only_platform_defaults.sbpl; SAFE profiles/10-system-runtime.sb",
        ),
        Rule(
            operations="file-read*",
            filters=subpath("/usr/share"),
            source="CDX restricted_read_only_platform_defaults.sbpl",
        ),
        Rule(
            operations="file-read*",
            filters=literal("/private/var/select/sh"),
            source="NIX sandbox-defaults.sb: read by /bin/sh since 10.15",
        ),
        Rule(
            operations="file-read*",
            filters=(
                *literal(*(f"/private/etc/{name}" for name in _ETC), "/private/var/run/resolv.conf"),
                *subpath("/private/etc/paths.d", "/private/etc/ssl"),
            ),
            source="SAFE profiles/10-system-runtime.sb; NIX sandbox-defaults.sb (resolv.conf is a link)",
        ),
    ),
)

_LOCALE = Group(
    name="locale",
    purpose="time zones; languages are below /usr/share, user settings in `preferences`",
    always=True,
    rules=(
        Rule(
            operations="file-read*",
            filters=subpath("/private/var/db/timezone"),
            source="CHR common.sb; SAFE profiles/10-system-runtime.sb",
        ),
    ),
)

_PROCESS = Group(
    name="process",
    purpose="to fork, and to watch and signal the container's own processes",
    always=True,
    rules=(
        Rule(operations="process-fork", source="reference; NIX sandbox-defaults.sb"),
        Rule(
            operations="process-info* process-info-codesignature",
            filters=("(target same-sandbox)",),
            source="CDX seatbelt_base_policy.sbpl; SRT macos-sandbox-utils.ts",
        ),
        Rule(
            operations="signal",
            filters=("(target same-sandbox)",),
            source="reference; NIX sandbox-defaults.sb",
        ),
    ),
)

_DEVICES = Group(
    name="devices",
    purpose="/dev/null and its like, the standard streams, the controlling terminal",
    always=True,
    rules=(
        Rule(
            operations="file-read* file-write-data",
            filters=(
                *literal("/dev/null", "/dev/zero", "/dev/tty", "/dev/stdin", "/dev/stdout", "/dev/stderr"),
                *subpath("/dev/fd"),
            ),
            source="reference (null); NIX sandbox-defaults.sb; SAFE profiles/10-system-runtime.sb",
        ),
        Rule(
            operations="file-read*",
            filters=literal("/dev/random", "/dev/urandom", "/dev/autofs_nowait"),
            source="reference (random, urandom); CDX restricted_read_only_platform_defaults.sbpl",
        ),
        Rule(
            operations="file-read* file-write-data file-ioctl",
            filters=literal("/dev/dtracehelper"),
            source="CHR common.sb; CDX restricted_read_only_platform_defaults.sbpl",
        ),
        Rule(
            operations="file-ioctl",
            filters=literal("/dev/null", "/dev/tty"),
            source="SAFE profiles/10-system-runtime.sb; SRT macos-sandbox-utils.ts",
        ),
    ),
)

_PTY = Group(
    name="pty",
    purpose="to make terminals of its own; those of others stay shut",
    always=True,
    rules=(
        Rule(operations="pseudo-tty", source="reference; CDX seatbelt_base_policy.sbpl"),
        Rule(
            operations="file-read* file-write* file-ioctl",
            filters=literal("/dev/ptmx"),
            source="reference; CDX seatbelt_base_policy.sbpl",
        ),
        Rule(
            operations="file-read* file-write* file-ioctl",
            filters=('(require-all (regex #"^/dev/ttys[0-9]+$") (extension "com.apple.sandbox.pty"))',),
            source="CDX seatbelt_base_policy.sbpl: the kernel marks a slave for the one who opened its master",
        ),
        Rule(
            operations="file-ioctl",
            filters=('(regex #"^/dev/ttys[0-9]+$")',),
            source="CDX seatbelt_base_policy.sbpl: a terminal that was handed over open",
        ),
    ),
)

_SERVICES = Group(
    name="services",
    purpose="users and groups by name, the log, notify(3), the folders of confstr(3)",
    always=True,
    rules=(
        Rule(
            operations="mach-lookup",
            filters=services(
                "com.apple.system.opendirectoryd.libinfo", "com.apple.system.opendirectoryd.membership"
            ),
            source="reference (libinfo); CHR sandbox/policy/mac/network.sb",
        ),
        Rule(
            operations="mach-lookup",
            filters=services(
                "com.apple.logd", "com.apple.logd.events", "com.apple.system.logger", "com.apple.diagnosticd"
            ),
            source="CHR common.sb; SAFE profiles/10-system-runtime.sb",
        ),
        Rule(
            operations="mach-lookup",
            filters=services("com.apple.system.notification_center", "com.apple.bsd.dirhelper"),
            source="CHR network.sb; SRT macos-sandbox-utils.ts",
        ),
        Rule(
            operations="ipc-posix-shm-read*",
            filters=named("ipc-posix-name", "apple.shm.notification_center"),
            source="CHR network.sb; WK com.apple.WebProcess.sb.in",
        ),
    ),
)

_OPENMP = Group(
    name="openmp",
    purpose="the one shared name by which copies of OpenMP in a process know each other (PyTorch, numpy)",
    always=True,
    rules=(
        Rule(
            operations="ipc-posix-shm-read-data ipc-posix-shm-write-create ipc-posix-shm-write-unlink",
            filters=('(ipc-posix-name-regex #"^/__KMP_REGISTERED_LIB_[0-9]+$")',),
            source="CDX seatbelt_base_policy.sbpl",
        ),
    ),
)

_SYSCTL = Group(
    name="sysctl",
    purpose="what the machine is, by name",
    always=True,
    rules=(
        Rule(
            operations="sysctl-read",
            filters=(
                *named("sysctl-name", *_SYSCTLS.split()),
                *named("sysctl-name-prefix", "hw.optional.arm.", "hw.optional.armv8_", "hw.perflevel"),
            ),
            source="CDX seatbelt_base_policy.sbpl; SRT macos-sandbox-utils.ts",
        ),
        Rule(operations="system-info", source="reference"),
    ),
)

BASE = (_SYSTEM, _SHELL, _LOCALE, _PROCESS, _DEVICES, _PTY, _SERVICES, _OPENMP, _SYSCTL)
