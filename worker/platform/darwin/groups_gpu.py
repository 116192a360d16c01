"""What a GPU level opens: every name of the reference system's two levels, each as the filter it really is.

Measured on macOS 26.5 (k3sm, an M1 Ultra): `AGXDeviceUserClient` and `IOSurfaceRootUserClient` are enough
for MLX. The rest serves other releases, processors and frameworks. A GPU is shared whole: no rule bounds it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from schemas.status import Gpu

from .rules import Rule, named, services, subpath

# The first release that surely knows the operations and the prefix filter below; on older ones one unknown
# name would make the whole profile invalid. `iokit-open` alone covers all releases.
FINE_IOKIT_RELEASE = 26

_METAL_CLIENTS = """
AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient
IOAccelDevice IOAccelDevice2 IOAccelContext IOAccelContext2 IOAccelSharedUserClient IOAccelSharedUserClient2
IOAccelSubmitter2 RootDomainUserClient
"""
_MPS_CLIENTS = """
AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOAccelDevice2 IOAccelContext2
IOAccelSharedUserClient2 RootDomainUserClient
"""
_METAL_FINE_CLIENTS = """
AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient
"""
_MPS_FINE_CLIENTS = "AGXDeviceUserClient IOSurfaceRootUserClient"

_METAL_PROPERTIES = """
AGCInfo AGXCliqueTracingDefaults AGXInternalPerfCounterResourcesPath AGXLimitersDirName
AGXParameterBufferMaxSize AGXParameterBufferMaxSizeEverMemless AGXParameterBufferMaxSizeNeverMemless
AGXTraceCodeVersion CFBundleIdentifier CFBundleIdentifierKernel chip-id class-code CommandSubmissionEnabled
CompactVRAM device-id EnableBlitLib gpu-core-count GPUConfigurationVariable GPUDCCDisplayable
GPUDebugNullClientMask GpuDebugPolicy GPURawCounterBundleName GPURawCounterPluginClassName IOClass
IOClassNameOverride IOGeneralInterest IOGLBundleName IOGLESBundleName IOGLESDefaultUseMetal
IOGLESMetalBundleName IOMatchCategory IOMatchedAtBoot IONameMatch IONameMatched IOPCIMatch
IOPersonalityPublisher IOPowerManagement IOProbeScore IOProviderClass IORegistryEntryPropertyKeys
IOReportLegend IOReportLegendPublic IOSourceVersion KDebugVersion MetalCoalesce MetalPluginClassName
MetalPluginName MetalStatisticsName MetalStatisticsScriptName model PerformanceStatistics Removable
SafeEjectRequested SchedulerState SCMBuildTime SCMVersionNumber soc-generation SurfaceList vendor-id
"""
_MPS_PROPERTIES = """
device-id gpu-core-count GPUConfigurationVariable GPURawCounterBundleName IOClass IOGLESDefaultUseMetal
IORegistryEntryPropertyKeys IOSourceVersion MetalPluginClassName MetalPluginName model soc-generation
vendor-id
"""

# Not needed to compute, as far as is known, but of the reference: CARenderServer and gpu.process draw,
# RootDomainUserClient and PowerManagement.control tell of sleep.
_METAL_SERVICES = (
    "com.apple.MTLCompilerService",
    "com.apple.CARenderServer",
    "com.apple.PowerManagement.control",
    "com.apple.cvmsServ",
    "com.apple.gpu.process",
    "com.apple.gpumemd.source",
)
_MPS_SERVICES = (
    "com.apple.MTLCompilerService",
    "com.apple.PowerManagement.control",
    "com.apple.gpumemd.source",
)

_MPS_FRAMEWORKS = (
    "/Library/GPUBundles",
    "/System/Library/Frameworks/Metal.framework",
    "/System/Library/Frameworks/MetalPerformanceShaders.framework",
    "/System/Library/Frameworks/MetalPerformanceShadersGraph.framework",
)
_METAL_FRAMEWORKS = (*_MPS_FRAMEWORKS, "/System/Library/PrivateFrameworks/GPUCompiler.framework")


def _level(
    *,
    clients: str,
    fine_clients: str,
    properties: str,
    mach: tuple[str, ...],
    xpc: tuple[str, ...],
    domains: tuple[str, ...],
    frameworks: tuple[str, ...],
) -> tuple[Rule, ...]:
    return (
        Rule(
            operations="iokit-open",
            filters=named("iokit-user-client-class", *clients.split()),
            source="reference; SRT#560; SAFE profiles/55-integrations-optional/gpu.sb",
        ),
        Rule(
            operations="iokit-open-service",
            filters=(
                *named("iokit-registry-entry-class", "IOSurfaceRoot"),
                *named("iokit-registry-entry-class-prefix", "AGXAcceleratorG"),
            ),
            since=FINE_IOKIT_RELEASE,
            source="reference, where IOSurfaceRoot, a service, stands as a user client",
        ),
        Rule(
            operations="iokit-open-user-client",
            filters=named("iokit-user-client-class", *fine_clients.split()),
            since=FINE_IOKIT_RELEASE,
            source="reference; SRT#560",
        ),
        Rule(
            operations="iokit-get-properties",
            filters=named("iokit-property", *properties.split()),
            source="reference",
        ),
        Rule(
            operations="mach-lookup",
            filters=services(*mach),
            source="reference; CHR sandbox/policy/mac/gpu.sb",
        ),
        Rule(
            # The same service under its other name is another lookup.
            operations="mach-lookup",
            filters=xpc,
            source="reference; CHR sandbox/policy/mac/gpu.sb",
        ),
        Rule(
            operations="user-preference-read",
            filters=named("preference-domain", *domains),
            source="reference",
        ),
        Rule(
            operations="file-read* file-map-executable",
            filters=subpath(*frameworks),
            source="reference (to read)",
        ),
    )


_COMPILER = named("xpc-service-name", "com.apple.MTLCompilerService")

# MPSGraph compiles kernels at run time, so the compiler service belongs to both levels; MPS alone has fewer
# IOKit clients and properties, and no driver compiler.
GPU_LEVELS: Mapping[Gpu, tuple[Rule, ...]] = MappingProxyType(
    {
        Gpu.NONE: (),
        Gpu.METAL_COMPUTE: _level(
            clients=_METAL_CLIENTS,
            fine_clients=_METAL_FINE_CLIENTS,
            properties=_METAL_PROPERTIES,
            mach=_METAL_SERVICES,
            xpc=(*_COMPILER, *named("xpc-service-name-prefix", "com.apple.AGXCompilerService")),
            domains=("com.apple.Metal", "com.apple.opengl", "com.nvidia.OpenGL"),
            frameworks=_METAL_FRAMEWORKS,
        ),
        Gpu.MPS_ONLY: _level(
            clients=_MPS_CLIENTS,
            fine_clients=_MPS_FINE_CLIENTS,
            properties=_MPS_PROPERTIES,
            mach=_MPS_SERVICES,
            xpc=_COMPILER,
            domains=("com.apple.Metal",),
            frameworks=_MPS_FRAMEWORKS,
        ),
    }
)
