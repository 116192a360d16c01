"""Groups that a spec asks for in `sandbox.groups`.

One that opens nothing of anybody's is free; the others need `grant`, a line of the node's operator. `source`
as in `groups_base`.
"""

from .rules import Group, Rule, literal, named, services, subpath

# Programs and what belongs to them. Not `etc` and `var` as a whole: databases and settings live there.
_PREFIX_FOLDERS = (
    "bin", "sbin", "lib", "libexec", "opt", "share", "include", "Cellar", "Frameworks", "etc/openssl@3",
    "etc/ca-certificates",
)  # fmt: skip

_DNS = Group(
    name="dns",
    purpose="names of hosts; part of the network levels `outbound` and `full`",
    grant=True,
    rules=(
        Rule(
            operations="network-outbound file-read-metadata",
            filters=literal("/private/var/run/mDNSResponder"),
            source="NIX sandbox-network.sb; CHR sandbox/policy/mac/network.sb",
        ),
        Rule(
            operations="mach-lookup",
            filters=services(
                "com.apple.SystemConfiguration.DNSConfiguration",
                "com.apple.SystemConfiguration.configd",
                "com.apple.dnssd.service",
            ),
            source="CHR network.sb; SAFE profiles/10-system-runtime.sb",
        ),
        Rule(
            operations="system-socket",
            filters=(
                "(require-all (socket-domain AF_SYSTEM) (socket-protocol 2))",
                "(socket-domain AF_ROUTE)",
            ),
            source="CHR network.sb",
        ),
        Rule(
            operations="sysctl-read",
            filters=named("sysctl-name-prefix", "net.routetable"),
            source="CHR network.sb",
        ),
    ),
)

_TLS = Group(
    name="tls",
    purpose="certificates judged by the system; part of the network levels `outbound` and `full`",
    rules=(
        Rule(
            operations="mach-lookup",
            filters=services(
                "com.apple.trustd", "com.apple.trustd.agent", "com.apple.ocspd", "com.apple.networkd"
            ),
            source="CHR network.sb; NIX sandbox-network.sb (trustd)",
        ),
        Rule(
            operations="file-read*",
            filters=(
                *subpath("/System/Library/Keychains", "/System/Library/Security", "/private/var/db/mds"),
                *literal("/Library/Preferences/com.apple.security.plist"),
            ),
            source="CHR network.sb: the roots that Apple ships",
        ),
    ),
)

_KEYCHAIN = Group(
    name="keychain",
    purpose="the user's keychain, through its server",
    grant=True,
    includes=("tls",),
    rules=(
        Rule(
            operations="mach-lookup",
            filters=services("com.apple.SecurityServer", "com.apple.securityd.xpc"),
            source="CHR network.sb; SAFE profiles/55-integrations-optional/keychain.sb",
        ),
        Rule(
            operations="file-read*",
            filters=subpath("/Library/Keychains"),
            source="CHR network.sb; SAFE keychain.sb",
        ),
        Rule(
            operations="ipc-posix-shm-read-data ipc-posix-shm-write-create ipc-posix-shm-write-data",
            filters=named("ipc-posix-name", "com.apple.AppleDatabaseChanged"),
            source="SAFE keychain.sb",
        ),
    ),
)

_HOMEBREW = Group(
    name="homebrew",
    purpose="what Homebrew has installed",
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath(
                *(f"/opt/homebrew/{name}" for name in _PREFIX_FOLDERS),
                *(f"/usr/local/{name}" for name in _PREFIX_FOLDERS),
            ),
            source="SAFE profiles/10-system-runtime.sb (/opt, /usr); CDX (lib)",
        ),
    ),
)

_CLT = Group(
    name="clt",
    purpose="the Command Line Tools: what the stubs in /usr/bin lead to",
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath("/Library/Developer/CommandLineTools"),
            source="SAFE profiles/30-toolchains/apple-toolchain-core.sb",
        ),
        Rule(
            operations="file-read*",
            filters=literal("/private/var/select/developer_dir", "/private/var/db/xcode_select_link"),
            source="SAFE profiles/10-system-runtime.sb",
        ),
    ),
)

_XCODE = Group(
    name="xcode",
    purpose="Xcode's tools; xcodebuild needs `preferences` beside it",
    includes=("clt",),
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=(
                *subpath("/Library/Developer/PrivateFrameworks"),
                '(regex #"^/Applications/Xcode[^/]*[.]app(/|$)")',
            ),
            source="SAFE profiles/55-integrations-optional/xcode.sb",
        ),
        Rule(
            operations="file-read*",
            filters=literal("/Library/Preferences/com.apple.dt.Xcode.plist"),
            source="SAFE xcode.sb: whether the licence was accepted",
        ),
        Rule(
            operations="file-read-metadata",
            filters=literal("/Applications"),
            source="SAFE xcode.sb",
        ),
        Rule(
            operations="user-preference-read",
            filters=named("preference-domain", "com.apple.dt.Xcode"),
            source="SAFE xcode.sb",
        ),
    ),
)

_SIMULATOR = Group(
    name="simulator",
    purpose="iOS simulators, which a server outside of the sandbox starts",
    grant=True,
    includes=("xcode",),
    rules=(
        Rule(
            operations="mach-lookup",
            filters=services("com.apple.CoreSimulator.CoreSimulatorService"),
            source="SAFE xcode.sb",
        ),
        Rule(
            operations="file-read*",
            filters=subpath("/Library/Developer/CoreSimulator"),
            source="SAFE xcode.sb",
        ),
    ),
)

_GIT = Group(
    name="git",
    purpose="Apple's git; user settings only as far as HOME leads to them",
    includes=("clt",),
    rules=(
        Rule(
            operations="file-read*",
            filters=literal(
                "/private/etc/gitconfig",
                "/private/etc/gitattributes",
                "/opt/homebrew/etc/gitconfig",
                "/usr/local/etc/gitconfig",
            ),
            source="git-config(1): the system's settings; git ends when it may not look for them",
        ),
    ),
)

_CLANG = Group(
    name="clang",
    purpose="Apple's compiler, linker and SDKs: the Command Line Tools",
    includes=("clt",),
    rules=(),
)

_PYTHON = Group(
    name="python",
    purpose="Apple's and python.org's Python; multiprocessing's locks",
    includes=("clt",),
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath("/Library/Frameworks/Python.framework"),
            source="SAFE profiles/10-system-runtime.sb (/Library/Frameworks)",
        ),
        Rule(
            operations="ipc-posix-sem",
            filters=named("ipc-posix-name-prefix", "/mp-"),
            source="CDX seatbelt_base_policy.sbpl (all names); CPython multiprocessing/synchronize.py (this one)",
        ),
    ),
)

_NODE = Group(
    name="node",
    purpose="what V8 sets when it starts",
    rules=(
        Rule(
            operations="sysctl-read",
            filters=named("sysctl-name", "kern.tcsm_available", "kern.tcsm_enable"),
            source="SRT macos-sandbox-utils.ts; WK com.apple.WebProcess.sb.in",
        ),
        Rule(
            operations="sysctl-write",
            filters=named("sysctl-name", "kern.tcsm_enable"),
            source="SRT macos-sandbox-utils.ts; WK com.apple.WebProcess.sb.in",
        ),
    ),
)

_JVM = Group(
    name="jvm",
    purpose="installed Java runtimes",
    rules=(
        Rule(
            operations="sysctl-write",
            filters=named("sysctl-name", "kern.grade_cputype"),
            source="CDX seatbelt_base_policy.sbpl: a read that looks like a write",
        ),
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath("/Library/Java"),
            source="SAFE profiles/30-toolchains/java.sb",
        ),
        Rule(
            operations="file-read-metadata",
            filters=literal("/Library/Internet Plug-Ins"),
            source="SAFE java.sb",
        ),
    ),
)

_ROSETTA = Group(
    name="rosetta",
    purpose="programs for Intel on Apple's processors",
    rules=(
        Rule(
            operations="file-read* file-map-executable process-exec*",
            filters=subpath("/Library/Apple/usr/libexec/oah", "/System/Library/Apple/usr/libexec/oah"),
            source="NIX sandbox-defaults.sb",
        ),
        Rule(
            operations="file-read*",
            filters=literal(
                "/System/Library/LaunchDaemons/com.apple.oahd.plist",
                "/Library/Apple/System/Library/LaunchDaemons/com.apple.oahd.plist",
            ),
            source="NIX sandbox-defaults.sb",
        ),
    ),
)

_SYSLOG = Group(
    name="syslog",
    purpose="the sockets of syslog(3), for programs that know no other log",
    rules=(
        Rule(
            operations="network-outbound file-read-metadata",
            filters=literal("/private/var/run/syslog", "/private/var/run/asl_input"),
            source="CHR common.sb",
        ),
    ),
)

_SOCKETS = Group(
    name="sockets",
    purpose="unix sockets of the container's own, in its rootfs and tmp",
    rules=(
        Rule(
            operations="network-bind network-inbound network-outbound",
            reach="own",
            source="NIX sandbox-defaults.sb (for its build folder)",
        ),
    ),
)

_IPC = Group(
    name="ipc",
    purpose="POSIX and System V semaphores and shared memory, which all programs of the user share",
    grant=True,
    rules=(
        Rule(operations="ipc-posix-sem ipc-posix-shm", source="reference; NIX sandbox-defaults.sb"),
        Rule(
            operations="ipc-sysv*", source="NIX sandbox-defaults.sb; SAFE profiles/40-shared/ipc-sysv-sem.sb"
        ),
    ),
)

_PREFERENCES = Group(
    name="preferences",
    purpose="the user's settings, to read",
    grant=True,
    rules=(
        Rule(
            operations="mach-lookup",
            filters=(
                *services("com.apple.cfprefsd.agent", "com.apple.cfprefsd.daemon"),
                *named("local-name", "com.apple.cfprefsd.agent"),
            ),
            source="CDX seatbelt_base_policy.sbpl",
        ),
        Rule(
            operations="ipc-posix-shm-read*",
            filters=named("ipc-posix-name-prefix", "apple.cfprefs."),
            source="CDX seatbelt_base_policy.sbpl; WK com.apple.WebProcess.sb.in",
        ),
        Rule(operations="user-preference-read", source="CDX seatbelt_base_policy.sbpl"),
        Rule(
            operations="file-read*",
            filters=literal("/Library/Preferences/.GlobalPreferences.plist"),
            source="CHR common.sb; SAFE profiles/10-system-runtime.sb",
        ),
    ),
)

_FSEVENTS = Group(
    name="fsevents",
    purpose="news of changed files, by a server that knows all folders",
    grant=True,
    rules=(
        Rule(
            operations="mach-lookup",
            filters=services("com.apple.FSEvents"),
            source="SAFE profiles/10-system-runtime.sb",
        ),
    ),
)

_REALPATH = Group(
    name="realpath",
    purpose="realpath(3) of C, as Bun uses it: it opens every folder above, so their lists of names show",
    grant=True,
    rules=(
        Rule(
            operations="file-read-data",
            reach="above",
            source="measured: simion/termic#36, apache/maka#4236",
        ),
    ),
)

_SHADER_CACHE = Group(
    name="shader-cache",
    purpose="the user's cache of compiled GPU programs, which other programs load",
    grant=True,
    rules=(
        Rule(
            operations="file-read* file-write*",
            filters=(
                '(regex #"^/private/var/folders/[^/]+/[^/]+/C/([^/]+/)?com[.]apple[.]metal(fe)?(/|$)")',
            ),
            source="CHR sandbox/policy/mac/gpu.sb (the whole cache folder)",
        ),
    ),
)

ASKED = (
    _CLANG, _CLT, _DNS, _FSEVENTS, _GIT, _HOMEBREW, _IPC, _JVM, _KEYCHAIN, _NODE, _PREFERENCES, _PYTHON, _REALPATH,
    _ROSETTA, _SHADER_CACHE, _SIMULATOR, _SOCKETS, _SYSLOG, _TLS, _XCODE,
)  # fmt: skip
