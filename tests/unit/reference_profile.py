"""The profile of the reference runtime, rendered from its rules: what it grants is compared with ours.

The rules are data of this file, with the reference's order, and paths are written into the text as it does,
without escapes (its defect S1). Sizes and limits that it does not write into a profile are left out.
"""

from collections.abc import Iterator, Sequence

import msgspec

Clause = tuple[str, tuple[str, ...]]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One container of the reference: its folders, its GPU level (`none`, `metal`, `mps`) and its network.

    `network` is `full`, `localhost` or `none`; the ports are those of `localhost`.
    """

    state: str = "/private/var/w/c1"
    gpu: str = "none"
    network: str = "localhost"
    bind: tuple[int, ...] = (8080,)
    connect: tuple[int, ...] = (53, 80, 443, 8080)
    writable: tuple[str, ...] = ()
    readonly: tuple[str, ...] = ()

    @property
    def rootfs(self) -> str:
        return f"{self.state}/rootfs"


_LIBRARIES = (
    "/usr/lib",
    "/System/Library/Frameworks",
    "/System/Library/PrivateFrameworks",
    "/System/Library/Extensions",
)

_CLIENTS = {
    "metal": "AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient"
    " IOAccelDevice IOAccelDevice2 IOAccelContext IOAccelContext2 IOAccelSharedUserClient"
    " IOAccelSharedUserClient2 IOAccelSubmitter2 RootDomainUserClient",
    "mps": "AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOAccelDevice2 IOAccelContext2"
    " IOAccelSharedUserClient2 RootDomainUserClient",
}
_FINE_CLIENTS = {
    "metal": "AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient",
    "mps": "AGXDeviceUserClient IOSurfaceRootUserClient",
}
_MPS_PROPERTIES = (
    "MetalPluginClassName MetalPluginName IOClass IOGLESDefaultUseMetal IORegistryEntryPropertyKeys"
    " IOSourceVersion GPUConfigurationVariable GPURawCounterBundleName gpu-core-count model vendor-id"
    " device-id soc-generation"
)
_PROPERTIES = {
    "metal": "AGCInfo AGXCliqueTracingDefaults AGXInternalPerfCounterResourcesPath AGXLimitersDirName"
    " AGXParameterBufferMaxSize AGXParameterBufferMaxSizeEverMemless AGXParameterBufferMaxSizeNeverMemless"
    " AGXTraceCodeVersion CFBundleIdentifier CFBundleIdentifierKernel chip-id CommandSubmissionEnabled"
    " CompactVRAM EnableBlitLib GPUDCCDisplayable GPUDebugNullClientMask GpuDebugPolicy"
    " GPURawCounterPluginClassName IOClassNameOverride IOGeneralInterest IOGLBundleName IOGLESBundleName"
    " IOGLESMetalBundleName IOMatchCategory IOMatchedAtBoot IONameMatch IONameMatched IOPCIMatch"
    " IOPersonalityPublisher IOPowerManagement IOProbeScore IOProviderClass IOReportLegend"
    " IOReportLegendPublic KDebugVersion MetalCoalesce MetalStatisticsName MetalStatisticsScriptName"
    " PerformanceStatistics Removable SafeEjectRequested SchedulerState SCMBuildTime SCMVersionNumber"
    f" SurfaceList class-code {_MPS_PROPERTIES}",
    "mps": _MPS_PROPERTIES,
}
_SERVICES = {
    "metal": "com.apple.MTLCompilerService com.apple.CARenderServer com.apple.PowerManagement.control"
    " com.apple.gpu.process com.apple.gpumemd.source com.apple.cvmsServ",
    "mps": "com.apple.MTLCompilerService com.apple.PowerManagement.control com.apple.gpumemd.source",
}
_DOMAINS = {"metal": "com.apple.opengl com.apple.Metal com.nvidia.OpenGL", "mps": "com.apple.Metal"}
_GPU_FOLDERS = (
    "/Library/GPUBundles",
    "/System/Library/Frameworks/Metal.framework",
    "/System/Library/Frameworks/MetalPerformanceShaders.framework",
    "/System/Library/Frameworks/MetalPerformanceShadersGraph.framework",
)
_COMPILER = "/System/Library/PrivateFrameworks/GPUCompiler.framework"


def render(machine: Machine) -> str:
    """The text of the profile; every rule of the reference in its order."""
    rules = (*_processes(), *_system(), *_folders(machine), *_gpu(machine.gpu), *_network(machine), *_io())
    return "(version 1)\n(deny default)\n" + "".join(
        f"(allow {operations}{''.join(f' {one}' for one in filters)})\n" for operations, filters in rules
    )


def _named(kind: str, values: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(f'({kind} "{value}")' for value in (values.split() if isinstance(values, str) else values))


def _processes() -> Iterator[Clause]:
    yield "process-exec", ()
    yield "process-fork", ()
    yield "signal", ("(target same-sandbox)",)
    yield "process-info*", ("(target self)",)
    yield "process-info-pidinfo", ()
    yield "process-info-rusage", ()


def _system() -> Iterator[Clause]:
    readable = _named("subpath", (*_LIBRARIES, "/System/Library/ColorSync"))
    yield "file-read*", (*readable, *_named("literal", "/ /dev/random /dev/urandom"))
    yield "file-map-executable", _named("subpath", _LIBRARIES)
    yield "sysctl-read", ()
    yield "system-info", ()
    yield "mach-lookup", _named("global-name", "com.apple.system.opendirectoryd.libinfo")


def _folders(machine: Machine) -> Iterator[Clause]:
    for number, folder in enumerate((machine.rootfs, machine.state, *machine.writable)):
        yield "file-read* file-write*", (f'(subpath "{folder}")',)
        if number == 0:
            yield "file-map-executable", (f'(subpath "{folder}")',)
    for folder in machine.readonly:
        yield "file-read*", (f'(subpath "{folder}")',)


def _gpu(level: str) -> Iterator[Clause]:
    if level == "none":
        return
    yield "iokit-open", _named("iokit-user-client-class", _CLIENTS[level])
    yield (
        "iokit-open-service",
        (
            *_named("iokit-user-client-class", "IOSurfaceRoot"),
            *_named("iokit-registry-entry-class-prefix", "AGXAcceleratorG"),
        ),
    )
    yield "iokit-open-user-client", _named("iokit-user-client-class", _FINE_CLIENTS[level])
    yield "iokit-get-properties", _named("iokit-property", _PROPERTIES[level])
    yield "mach-lookup", _named("global-name", _SERVICES[level])
    xpc = _named("xpc-service-name", "com.apple.MTLCompilerService")
    if level == "metal":
        xpc += _named("xpc-service-name-prefix", "com.apple.AGXCompilerService")
    yield "mach-lookup", xpc
    yield "user-preference-read", _named("preference-domain", _DOMAINS[level])
    yield "file-read*", _named("subpath", (*_GPU_FOLDERS, *([_COMPILER] if level == "metal" else [])))


def _network(machine: Machine) -> Iterator[Clause]:
    if machine.network == "localhost":
        for port in machine.bind:
            yield "network-bind", (f'(local ip "localhost:{port}")',)
        for port in machine.connect:
            yield "network-outbound", (f'(remote ip "localhost:{port}")',)
        if machine.bind:
            yield "network-inbound", ('(local ip "localhost:*")',)
    elif machine.network == "full":
        yield from (
            (name, ()) for name in ("network-outbound", "network-inbound", "network-bind", "system-socket")
        )


def _io() -> Iterator[Clause]:
    null = '(require-all (literal "/dev/null") (vnode-type CHARACTER-DEVICE))'
    yield "file-write-data", (null,)
    yield "file-read-data", (null,)
    yield "pseudo-tty", ()
    yield "file-read* file-write* file-ioctl", ('(literal "/dev/ptmx")',)
    yield "ipc-posix-sem", ()
    yield "ipc-posix-shm", ()
