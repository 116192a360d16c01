"""Named rules of Seatbelt profiles: what every program needs, and what groups and GPU levels add.

Text that never holds anything of a user's. The names are those that macOS knows; where each was seen is
said beside it by the project that ships it (Chromium, WebKit, Nix, OpenAI Codex, agent-safehouse).
`harmless` groups open nothing that belongs to anybody; the others need a grant of the node's operator.
"""

from collections.abc import Mapping
from types import MappingProxyType

from schemas.status import Gpu
from worker.platform.base import RuleGroup

# Folders of the system from which every container may execute: sealed, the same on every Mac of a release.
EXECUTABLE = ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/libexec")

# What dyld maps; the Cryptex paths since macOS 13 (Chromium, common.sb).
LIBRARIES = (
    "/usr/lib",
    "/System/Library/Frameworks",
    "/System/Library/PrivateFrameworks",
    "/System/Library/SubFrameworks",
    "/System/Library/Extensions",
    "/System/iOSSupport",
    "/System/Cryptexes/OS",
    "/System/Cryptexes/App",
    "/System/Volumes/Preboot/Cryptexes/OS",
    "/System/Volumes/Preboot/Cryptexes/App/System",
)

READABLE = (
    "/usr/share",
    "/System/Library/ColorSync",
    "/System/Library/CoreServices/SystemVersion.plist",
    "/System/Library/CoreServices/SystemVersionCompat.plist",
    "/private/etc/group",
    "/private/etc/localtime",
    "/private/etc/passwd",
    "/private/etc/paths",
    "/private/etc/paths.d",
    "/private/etc/protocols",
    "/private/etc/services",
    "/private/etc/shells",
    "/private/var/db/timezone",
    "/private/var/select/sh",
)


def rule(action: str, operations: str, *filters: str) -> str:
    if len(filters) <= 1:
        return f"({action} {operations}{''.join(' ' + one for one in filters)})\n"
    return f"({action} {operations}\n" + "\n".join(f"  {one}" for one in filters) + ")\n"


def named(kind: str, *values: str) -> list[str]:
    """Filters of one kind; the values are constants of ours, without quotes or backslashes."""
    return [f'({kind} "{value}")' for value in values]


SYSTEM = (
    rule("allow", "file-read* file-map-executable", *named("subpath", *LIBRARIES))
    + rule("allow", "file-read* file-map-executable process-exec", *named("subpath", *EXECUTABLE))
    + rule("allow", "file-read*", *named("literal", "/"), *named("subpath", *READABLE))
    # The links themselves; without their metadata no path through them can be looked up.
    + rule(
        "allow",
        "file-read-metadata",
        *named("literal", "/tmp", "/var", "/etc", "/dev", "/System/Volumes", "/System/Volumes/Data"),
    )
)

PROCESSES = (
    "(allow process-fork)\n"
    "(allow process-info* (target same-sandbox))\n"
    "(allow signal (target same-sandbox))\n"
    # An own pty may be had; the slaves of others, which are as readable to the user, not (Codex).
    "(allow pseudo-tty)\n"
    '(allow file-read* file-write* file-ioctl (literal "/dev/ptmx"))\n'
    "(allow file-read* file-write* file-ioctl\n"
    '  (require-all (regex #"^/dev/ttys[0-9]+$") (extension "com.apple.sandbox.pty")))\n'
)

DEVICES = (
    rule(
        "allow",
        "file-read* file-write-data",
        *named("literal", "/dev/null", "/dev/zero", "/dev/tty", "/dev/stdin", "/dev/stdout", "/dev/stderr"),
        *named("subpath", "/dev/fd"),
    )
    + rule("allow", "file-read*", *named("literal", "/dev/random", "/dev/urandom"))
    + rule("allow", "file-read* file-write-data file-ioctl", *named("literal", "/dev/dtracehelper"))
    + rule("allow", "file-ioctl", *named("literal", "/dev/tty"))
)

SERVICES = (
    rule(
        "allow",
        "mach-lookup",
        *named(
            "global-name",
            "com.apple.bsd.dirhelper",
            "com.apple.diagnosticd",
            "com.apple.logd",
            "com.apple.logd.events",
            "com.apple.system.logger",
            "com.apple.system.notification_center",
            "com.apple.system.opendirectoryd.libinfo",
            "com.apple.system.opendirectoryd.membership",
        ),
    )
    + rule("allow", "ipc-posix-shm-read*", *named("ipc-posix-name", "apple.shm.notification_center"))
    + "(allow ipc-posix-shm-read-data ipc-posix-shm-write-create ipc-posix-shm-write-unlink\n"
    '  (ipc-posix-name-regex #"^/__KMP_REGISTERED_LIB_[0-9]+$"))\n'
)

# By name, as anything else would let another process's arguments and environment be read (kern.procargs2).
_SYSCTLS = """
hw.activecpu hw.busfrequency_compat hw.byteorder hw.cacheconfig hw.cachelinesize hw.cachelinesize_compat
hw.cpufamily hw.cpufrequency_compat hw.cpusubfamily hw.cputype hw.cpusubtype hw.cpu64bit_capable
hw.l1dcachesize_compat hw.l1icachesize_compat hw.l2cachesize_compat hw.l3cachesize_compat hw.logicalcpu
hw.logicalcpu_max hw.machine hw.memsize hw.model hw.ncpu hw.nperflevels hw.packages hw.pagesize
hw.pagesize_compat hw.physicalcpu hw.physicalcpu_max hw.physmem hw.tbfrequency hw.tbfrequency_compat
hw.usermem hw.vectorunit kern.argmax kern.boottime kern.hostname kern.maxfilesperproc kern.maxproc
kern.osproductversion kern.osrelease kern.ostype kern.osvariant_status kern.osversion kern.secure_kernel
kern.usrstack64 kern.version machdep.cpu.brand_string sysctl.proc_cputype vm.loadavg
"""

SYSCTL = (
    rule(
        "allow",
        "sysctl-read",
        *named("sysctl-name", *_SYSCTLS.split()),
        *named("sysctl-name-prefix", "hw.optional.arm.", "hw.optional.armv8_", "hw.perflevel"),
    )
    + "(allow system-info)\n"
)

_DNS = (
    rule("allow", "network-outbound", *named("literal", "/private/var/run/mDNSResponder"))
    + rule("allow", "file-read*", *named("literal", "/private/etc/hosts", "/private/etc/resolv.conf"))
    + rule("allow", "file-read*", *named("literal", "/private/var/run/resolv.conf"))
    + rule(
        "allow",
        "mach-lookup",
        *named(
            "global-name",
            "com.apple.SystemConfiguration.DNSConfiguration",
            "com.apple.SystemConfiguration.configd",
            "com.apple.dnssd.service",
        ),
    )
    + "(allow system-socket\n"
    "  (require-all (socket-domain AF_SYSTEM) (socket-protocol 2))\n"
    "  (socket-domain AF_ROUTE))\n"
    + rule("allow", "sysctl-read", *named("sysctl-name-prefix", "net.routetable"))
)

# Without SecurityServer, which would open the user's keychain.
_TLS = rule("allow", "file-read*", *named("subpath", "/private/etc/ssl", "/private/var/db/mds")) + rule(
    "allow",
    "mach-lookup",
    *named(
        "global-name", "com.apple.trustd", "com.apple.trustd.agent", "com.apple.ocspd", "com.apple.networkd"
    ),
)

_PREFERENCES = (
    rule(
        "allow",
        "mach-lookup",
        *named("global-name", "com.apple.cfprefsd.agent", "com.apple.cfprefsd.daemon"),
        *named("local-name", "com.apple.cfprefsd.agent"),
    )
    + '(allow ipc-posix-shm-read* (ipc-posix-name-regex #"^apple\\.cfprefs\\."))\n'
    + "(allow user-preference-read)\n"
    + rule("allow", "file-read*", *named("literal", "/Library/Preferences/.GlobalPreferences.plist"))
)

_HOMEBREW = rule(
    "allow", "file-read* file-map-executable process-exec", *named("subpath", "/opt/homebrew", "/usr/local")
)

_XCODE = rule(
    "allow",
    "file-read* file-map-executable process-exec",
    *named("subpath", "/Library/Developer/CommandLineTools", "/Library/Developer/PrivateFrameworks"),
    '(regex #"^/Applications/Xcode[^/]*\\.app(/|$)")',
) + rule(
    "allow",
    "file-read*",
    *named(
        "literal",
        "/private/var/select/developer_dir",
        "/private/var/db/xcode_select_link",
        "/Library/Preferences/com.apple.dt.Xcode.plist",
    ),
)

_ROSETTA = rule(
    "allow",
    "file-read* file-map-executable process-exec",
    *named("subpath", "/Library/Apple/usr/libexec/oah", "/System/Library/Apple/usr/libexec/oah"),
)

_IPC = "(allow ipc-posix-sem)\n(allow ipc-posix-shm)\n"

_JVM = rule("allow", "sysctl-write", *named("sysctl-name", "kern.grade_cputype"))

_NODE = rule("allow", "sysctl-write", *named("sysctl-name", "kern.tcsm_enable"))

GROUPS: Mapping[str, RuleGroup] = MappingProxyType(
    {
        name: RuleGroup(name=name, harmless=harmless, text=text)
        for name, harmless, text in (
            ("dns", False, _DNS),
            ("homebrew", True, _HOMEBREW),
            ("ipc", False, _IPC),
            ("jvm", True, _JVM),
            ("node", True, _NODE),
            ("preferences", False, _PREFERENCES),
            ("rosetta", True, _ROSETTA),
            ("tls", True, _TLS),
            ("xcode", True, _XCODE),
        )
    }
)
"""What `sandbox.groups` may name here. `dns` lets names be looked up at any network level, `ipc` shares the
POSIX semaphores and memory of the whole machine, `preferences` shows the user's settings."""


class GpuNames:
    """IOKit and Mach names of one GPU level."""

    def __init__(
        self,
        *,
        clients: str,
        fine_clients: str,
        properties: str,
        services: str,
        xpc: str,
        xpc_prefixes: str,
        preferences: str,
        frameworks: str,
    ) -> None:
        self.clients = clients.split()
        self.fine_clients = fine_clients.split()
        self.properties = properties.split()
        self.services = services.split()
        self.xpc = xpc.split()
        self.xpc_prefixes = xpc_prefixes.split()
        self.preferences = preferences.split()
        self.frameworks = frameworks.split()


# MPSGraph compiles kernels at run time, so the compiler service belongs to both levels; MPS alone has fewer
# IOKit clients and properties, and no driver compiler.
GPU_LEVELS: Mapping[Gpu, GpuNames] = MappingProxyType(
    {
        Gpu.METAL_COMPUTE: GpuNames(
            clients="""
                AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient
                IOSurfaceAcceleratorClient IOAccelDevice IOAccelDevice2 IOAccelContext IOAccelContext2
                IOAccelSharedUserClient IOAccelSharedUserClient2 IOAccelSubmitter2 RootDomainUserClient
            """,
            fine_clients="""
                AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient
                IOSurfaceAcceleratorClient
            """,
            properties="""
                AGCInfo AGXCliqueTracingDefaults AGXInternalPerfCounterResourcesPath AGXLimitersDirName
                AGXParameterBufferMaxSize AGXParameterBufferMaxSizeEverMemless
                AGXParameterBufferMaxSizeNeverMemless AGXTraceCodeVersion CFBundleIdentifier
                CFBundleIdentifierKernel chip-id class-code CommandSubmissionEnabled CompactVRAM
                device-id EnableBlitLib gpu-core-count GPUConfigurationVariable GPUDCCDisplayable
                GPUDebugNullClientMask GpuDebugPolicy GPURawCounterBundleName
                GPURawCounterPluginClassName IOClass IOClassNameOverride IOGeneralInterest
                IOGLBundleName IOGLESBundleName IOGLESDefaultUseMetal IOGLESMetalBundleName
                IOMatchCategory IOMatchedAtBoot IONameMatch IONameMatched IOPCIMatch
                IOPersonalityPublisher IOPowerManagement IOProbeScore IOProviderClass
                IORegistryEntryPropertyKeys IOReportLegend IOReportLegendPublic IOSourceVersion
                KDebugVersion MetalCoalesce MetalPluginClassName MetalPluginName MetalStatisticsName
                MetalStatisticsScriptName model PerformanceStatistics Removable SafeEjectRequested
                SchedulerState SCMBuildTime SCMVersionNumber soc-generation SurfaceList vendor-id
            """,
            services="""
                com.apple.CARenderServer com.apple.MTLCompilerService com.apple.PowerManagement.control
                com.apple.cvmsServ com.apple.gpu.process com.apple.gpumemd.source
            """,
            xpc="com.apple.MTLCompilerService",
            xpc_prefixes="com.apple.AGXCompilerService",
            preferences="com.apple.Metal com.apple.opengl com.nvidia.OpenGL",
            frameworks="""
                /Library/GPUBundles /System/Library/Frameworks/Metal.framework
                /System/Library/Frameworks/MetalPerformanceShaders.framework
                /System/Library/Frameworks/MetalPerformanceShadersGraph.framework
                /System/Library/PrivateFrameworks/GPUCompiler.framework
            """,
        ),
        Gpu.MPS_ONLY: GpuNames(
            clients="""
                AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOAccelDevice2
                IOAccelContext2 IOAccelSharedUserClient2 RootDomainUserClient
            """,
            fine_clients="AGXDeviceUserClient IOSurfaceRootUserClient",
            properties="""
                device-id gpu-core-count GPUConfigurationVariable GPURawCounterBundleName IOClass
                IOGLESDefaultUseMetal IORegistryEntryPropertyKeys IOSourceVersion MetalPluginClassName
                MetalPluginName model soc-generation vendor-id
            """,
            services="""
                com.apple.MTLCompilerService com.apple.PowerManagement.control com.apple.gpumemd.source
            """,
            xpc="com.apple.MTLCompilerService",
            xpc_prefixes="",
            preferences="com.apple.Metal",
            frameworks="""
                /Library/GPUBundles /System/Library/Frameworks/Metal.framework
                /System/Library/Frameworks/MetalPerformanceShaders.framework
                /System/Library/Frameworks/MetalPerformanceShadersGraph.framework
            """,
        ),
    }
)

# The first release that knows iokit-open-service and iokit-open-user-client; on older ones either name would
# make the whole profile invalid.
FINE_IOKIT_RELEASE = 26


def gpu_text(level: Gpu, release: int) -> str:
    """The rules of a GPU level; empty for `none`."""
    names = GPU_LEVELS.get(level)
    if names is None:
        return ""
    text = rule("allow", "iokit-open", *named("iokit-user-client-class", *names.clients))
    if release >= FINE_IOKIT_RELEASE:
        text += rule(
            "allow",
            "iokit-open-service",
            *named("iokit-registry-entry-class", "IOSurfaceRoot"),
            *named("iokit-registry-entry-class-prefix", "AGXAcceleratorG"),
        )
        text += rule(
            "allow", "iokit-open-user-client", *named("iokit-user-client-class", *names.fine_clients)
        )
    text += rule("allow", "iokit-get-properties", *named("iokit-property", *names.properties))
    text += rule("allow", "mach-lookup", *named("global-name", *names.services))
    # The same service under its other name is another lookup.
    text += rule(
        "allow",
        "mach-lookup",
        *named("xpc-service-name", *names.xpc),
        *named("xpc-service-name-prefix", *names.xpc_prefixes),
    )
    text += rule("allow", "user-preference-read", *named("preference-domain", *names.preferences))
    text += rule("allow", "file-read* file-map-executable", *named("subpath", *names.frameworks))
    return text
