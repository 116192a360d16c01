"""Groups and GPU levels: every name of the reference is there, what each group is for works, none opens more."""

from typing import Any

import pytest

from schemas.status import Gpu
from worker.config_model import PolicyConfig
from worker.errors import PolicyDenied
from worker.platform.darwin.groups import BY_NAME, GROUPS, selected
from worker.platform.darwin.groups_base import BASE
from worker.platform.darwin.groups_gpu import FINE_IOKIT_RELEASE, GPU_LEVELS
from worker.platform.darwin.rules import OLDEST_RELEASE, Rule

from .sbpl_help import DATA, ROOT, STATE, TMP, Asked, ask, ask_spec, built, policy_of

# Every name in the GPU blocks of the reference's profile: level → (operation, kind of filter) → names.
METAL: dict[tuple[str, str], str] = {
    ("iokit-open", "iokit-user-client-class"): """
        AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient IOAccelDevice
        IOAccelDevice2 IOAccelContext IOAccelContext2 IOAccelSharedUserClient IOAccelSharedUserClient2
        IOAccelSubmitter2 RootDomainUserClient""",
    ("iokit-open-service", "iokit-registry-entry-class"): "IOSurfaceRoot",  # there as a user client: S16
    ("iokit-open-service", "iokit-registry-entry-class-prefix"): "AGXAcceleratorG",
    ("iokit-open-user-client", "iokit-user-client-class"): """
        AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOSurfaceAcceleratorClient""",
    ("iokit-get-properties", "iokit-property"): """
        AGCInfo AGXCliqueTracingDefaults AGXInternalPerfCounterResourcesPath AGXLimitersDirName
        AGXParameterBufferMaxSize AGXParameterBufferMaxSizeEverMemless AGXParameterBufferMaxSizeNeverMemless
        AGXTraceCodeVersion CFBundleIdentifier CFBundleIdentifierKernel chip-id CommandSubmissionEnabled CompactVRAM
        EnableBlitLib gpu-core-count GPUConfigurationVariable GPUDCCDisplayable GPUDebugNullClientMask GpuDebugPolicy
        GPURawCounterBundleName GPURawCounterPluginClassName IOClass IOClassNameOverride IOGeneralInterest
        IOGLBundleName IOGLESBundleName IOGLESDefaultUseMetal IOGLESMetalBundleName IOMatchCategory IOMatchedAtBoot
        IONameMatch IONameMatched IOPCIMatch IOPersonalityPublisher IOPowerManagement IOProbeScore IOProviderClass
        IORegistryEntryPropertyKeys IOReportLegend IOReportLegendPublic IOSourceVersion KDebugVersion MetalCoalesce
        MetalPluginClassName MetalPluginName MetalStatisticsName MetalStatisticsScriptName model
        PerformanceStatistics Removable SafeEjectRequested SchedulerState SCMBuildTime SCMVersionNumber
        soc-generation SurfaceList vendor-id device-id class-code""",
    ("mach-lookup", "global-name"): """
        com.apple.MTLCompilerService com.apple.CARenderServer com.apple.PowerManagement.control com.apple.gpu.process
        com.apple.gpumemd.source com.apple.cvmsServ""",
    ("mach-lookup", "xpc-service-name"): "com.apple.MTLCompilerService",
    ("mach-lookup", "xpc-service-name-prefix"): "com.apple.AGXCompilerService",
    ("user-preference-read", "preference-domain"): "com.apple.opengl com.apple.Metal com.nvidia.OpenGL",
    ("file-read*", "subpath"): """
        /Library/GPUBundles /System/Library/Frameworks/Metal.framework
        /System/Library/Frameworks/MetalPerformanceShaders.framework
        /System/Library/Frameworks/MetalPerformanceShadersGraph.framework
        /System/Library/PrivateFrameworks/GPUCompiler.framework""",
}
MPS: dict[tuple[str, str], str] = {
    ("iokit-open", "iokit-user-client-class"): """
        AGXDeviceUserClient AGXSharedUserClient IOSurfaceRootUserClient IOAccelDevice2 IOAccelContext2
        IOAccelSharedUserClient2 RootDomainUserClient""",
    ("iokit-open-service", "iokit-registry-entry-class"): "IOSurfaceRoot",
    ("iokit-open-service", "iokit-registry-entry-class-prefix"): "AGXAcceleratorG",
    ("iokit-open-user-client", "iokit-user-client-class"): "AGXDeviceUserClient IOSurfaceRootUserClient",
    ("iokit-get-properties", "iokit-property"): """
        MetalPluginClassName MetalPluginName IOClass IOGLESDefaultUseMetal IORegistryEntryPropertyKeys
        IOSourceVersion GPUConfigurationVariable GPURawCounterBundleName gpu-core-count model vendor-id device-id
        soc-generation""",
    ("mach-lookup", "global-name"): """
        com.apple.MTLCompilerService com.apple.PowerManagement.control com.apple.gpumemd.source""",
    ("mach-lookup", "xpc-service-name"): "com.apple.MTLCompilerService",
    ("user-preference-read", "preference-domain"): "com.apple.Metal",
    ("file-read*", "subpath"): """
        /Library/GPUBundles /System/Library/Frameworks/Metal.framework
        /System/Library/Frameworks/MetalPerformanceShaders.framework
        /System/Library/Frameworks/MetalPerformanceShadersGraph.framework""",
}
REFERENCE = {Gpu.METAL_COMPUTE: METAL, Gpu.MPS_ONLY: MPS}

# Paths, services and devices that the reference's profile names outside of its GPU blocks.
REFERENCE_READS = """
/usr/lib/x /System/Library/Frameworks/x /System/Library/PrivateFrameworks/x /System/Library/Extensions/x
/System/Library/ColorSync/x / /dev/random /dev/urandom /dev/null /dev/ptmx
"""
REFERENCE_MAPS = """
/usr/lib/x /System/Library/Frameworks/x /System/Library/PrivateFrameworks/x /System/Library/Extensions/x
"""

FIELD = {
    "iokit-user-client-class": "class_",
    "iokit-registry-entry-class": "class_",
    "iokit-registry-entry-class-prefix": "class_",
    "subpath": "path",
}
KIND = {"global-name": "global", "xpc-service-name": "xpc", "xpc-service-name-prefix": "xpc"}


def names_of(rules: tuple[Rule, ...]) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for rule in rules:
        for text in rule.filters:
            kind, _, value = text.strip("()").partition(" ")
            for operation in rule.operations.split():
                found.setdefault((operation, kind), set()).add(value.strip('"'))
    return found


class TestReference:
    @pytest.mark.parametrize("level", list(REFERENCE))
    def test_no_name_of_a_gpu_level_is_missing_and_none_is_added(self, level: Gpu) -> None:
        ours = names_of(GPU_LEVELS[level])
        ours.pop(("file-map-executable", "subpath"))
        assert ours == {key: set(names.split()) for key, names in REFERENCE[level].items()}

    @pytest.mark.parametrize("level", list(REFERENCE))
    def test_every_name_of_a_gpu_level_is_allowed(self, level: Gpu) -> None:
        profile, without = ask(gpu=level, release=26), ask(release=26)
        for (operation, kind), names in REFERENCE[level].items():
            for name in names.split():
                argument: dict[str, Any] = {FIELD.get(kind, "name"): name}
                if kind in KIND:
                    argument["kind"] = KIND[kind]
                if kind.endswith("-prefix"):
                    argument = {
                        key: f"{value}X1" if value == name else value for key, value in argument.items()
                    }
                asked = "file-read-data" if operation == "file-read*" else operation
                assert profile.allows(asked, **argument), (operation, name)
                if not name.startswith("/System/Library/"):
                    assert not without.allows(asked, **argument), (operation, name)

    def test_mps_is_the_smaller_one(self) -> None:
        metal, mps = (names_of(GPU_LEVELS[level]) for level in (Gpu.METAL_COMPUTE, Gpu.MPS_ONLY))
        assert all(names <= metal[key] for key, names in mps.items())
        assert not ask(gpu=Gpu.MPS_ONLY).allows(
            "mach-lookup", kind="xpc", name="com.apple.AGXCompilerService-S2A8"
        )
        assert not ask(gpu=Gpu.METAL_COMPUTE).allows("iokit-open", class_="IOHIDLibUserClient")

    def test_no_path_and_service_of_the_base_is_missing(self) -> None:
        profile = ask()
        for path in REFERENCE_READS.split():
            assert profile.allows("file-read-data", path=path, vnode="CHARACTER-DEVICE"), path
        for path in REFERENCE_MAPS.split():
            assert profile.allows("file-map-executable", path=path), path
        for operation in ("file-write-data", "file-ioctl"):
            assert profile.allows(operation, path="/dev/ptmx")
        assert profile.allows("file-write-data", path="/dev/null", vnode="CHARACTER-DEVICE")
        assert profile.allows("mach-lookup", name="com.apple.system.opendirectoryd.libinfo")
        for operation in ("process-fork", "system-info", "pseudo-tty"):
            assert profile.allows(operation)
        for operation in ("file-read-data", "file-write-create", "file-map-executable", "process-exec"):
            assert profile.allows(operation, path=f"{ROOT}/bin/x")


class TestGroups:
    def test_there_are_those_that_are_promised(self) -> None:
        assert set(GROUPS) >= {"shell", "dns", "tls", "homebrew", "xcode", "python", "node", "git", "clang", "jvm",
                               "rosetta", "locale", "pty", "ipc", "preferences"}  # fmt: skip
        assert {group.name for group in BASE} <= set(GROUPS)
        assert all(GROUPS[group.name].harmless for group in BASE)

    @pytest.mark.parametrize("name", sorted(BY_NAME))
    @pytest.mark.parametrize("release", [OLDEST_RELEASE, 15, 26])
    def test_every_group_compiles_without_a_warning(self, name: str, release: int) -> None:
        made = built(groups=(name,), release=release)
        assert f"{name}\n" in made.text
        assert Asked(made, release).compiled.warnings == ()

    def test_all_together(self) -> None:
        profile = ask(groups=tuple(GROUPS), gpu=Gpu.METAL_COMPUTE, release=26)
        assert profile.compiled.warnings == ()
        for path in ("/Users/w/.ssh/id", f"{STATE}/config.json", f"{DATA}/worker.db", "/private/etc/sudoers"):
            for operation in ("file-read-data", "file-write-data", "process-exec"):
                assert not profile.allows(operation, path=path)
        for operation in ("lsopen", "job-creation", "appleevent-send", "mach-priv-task-port", "file-mount"):
            assert not profile.allows(operation, name="x", path="/x", target="others")
        assert not profile.allows("mach-lookup", name="com.apple.coreservices.launchservicesd")

    def test_what_a_group_includes_comes_with_it(self) -> None:
        assert {"git", "clt"} <= {group.name for group in selected(["git"])}
        assert {"simulator", "xcode", "clt"} <= {group.name for group in selected(["simulator"])}
        for group in BY_NAME.values():
            assert set(group.includes) <= set(BY_NAME)
            if GROUPS[group.name].harmless:
                assert all(GROUPS[name].harmless for name in group.includes)

    @pytest.mark.parametrize("name", sorted(name for name, group in GROUPS.items() if not group.harmless))
    def test_what_opens_something_of_somebodys_needs_the_operator(self, name: str) -> None:
        spec = {"sandbox": {"groups": [name]}}
        with pytest.raises(PolicyDenied, match=name):
            policy_of(spec, grants=PolicyConfig())
        assert policy_of(spec, grants=PolicyConfig(groups=(name,))).groups == (name,)

    def test_a_group_of_every_profile_may_be_named_and_adds_nothing(self) -> None:
        assert built(groups=("shell", "locale", "pty")).text == built().text

    def test_rules_tell_their_source_and_first_release(self) -> None:
        rules = [rule for group in BY_NAME.values() for rule in group.rules]
        rules += [rule for level in GPU_LEVELS.values() for rule in level]
        for rule in rules:
            assert len(rule.source) > 3
            assert OLDEST_RELEASE <= rule.since <= FINE_IOKIT_RELEASE
            assert rule.filters or not rule.reach or rule.reach in ("own", "above")


READ, WRITE, RUN, LOOKUP = "file-read-data", "file-write-data", "process-exec", "mach-lookup"


@pytest.mark.parametrize(
    ("groups", "operation", "argument"),
    [
        (("dns",), "network-outbound", {"path": "/private/var/run/mDNSResponder"}),
        (("dns",), LOOKUP, {"name": "com.apple.dnssd.service"}),
        (("dns",), "system-socket", {"domain": "AF_ROUTE"}),
        (("tls",), LOOKUP, {"name": "com.apple.trustd.agent"}),
        (("tls",), READ, {"path": "/System/Library/Keychains/SystemRootCertificates.keychain"}),
        (("keychain",), LOOKUP, {"name": "com.apple.SecurityServer"}),
        (("homebrew",), RUN, {"path": "/opt/homebrew/bin/git"}),
        (("homebrew",), "file-map-executable", {"path": "/usr/local/Cellar/x/1/lib/x.dylib"}),
        (("homebrew",), "file-read-metadata", {"path": "/opt/homebrew"}),
        (("xcode",), RUN, {"path": "/Applications/Xcode-16.1.app/Contents/Developer/usr/bin/xcodebuild"}),
        (("xcode",), READ, {"path": "/Library/Preferences/com.apple.dt.Xcode.plist"}),
        (("xcode",), RUN, {"path": "/Library/Developer/CommandLineTools/usr/bin/clang"}),
        (("clang",), RUN, {"path": "/Library/Developer/CommandLineTools/usr/bin/ld"}),
        (("clang",), READ, {"path": "/private/var/db/xcode_select_link"}),
        (("git",), RUN, {"path": "/Library/Developer/CommandLineTools/usr/bin/git"}),
        (("git",), READ, {"path": "/private/etc/gitconfig"}),
        (("python",), RUN, {"path": "/Library/Frameworks/Python.framework/Versions/3.12/bin/python3"}),
        (("python",), "ipc-posix-sem-open", {"name": "/mp-abcdefgh"}),
        (("node",), "sysctl-write", {"name": "kern.tcsm_enable"}),
        (("jvm",), "sysctl-write", {"name": "kern.grade_cputype"}),
        (("jvm",), RUN, {"path": "/Library/Java/JavaVirtualMachines/x/Contents/Home/bin/java"}),
        (("rosetta",), RUN, {"path": "/Library/Apple/usr/libexec/oah/libRosettaRuntime"}),
        (("syslog",), "network-outbound", {"path": "/private/var/run/syslog"}),
        (("sockets",), "network-bind", {"path": f"{TMP}/s.sock"}),
        (("sockets",), "network-outbound", {"path": f"{ROOT}/run/s.sock"}),
        (("ipc",), "ipc-posix-shm-write-create", {"name": "/mine"}),
        (("ipc",), "ipc-sysv-sem", {}),
        (("preferences",), LOOKUP, {"name": "com.apple.cfprefsd.daemon"}),
        (("preferences",), "user-preference-read", {"name": "com.example.app"}),
        (("fsevents",), LOOKUP, {"name": "com.apple.FSEvents"}),
        (("realpath",), READ, {"path": "/Users", "vnode": "DIRECTORY"}),
        (("simulator",), LOOKUP, {"name": "com.apple.CoreSimulator.CoreSimulatorService"}),
    ],
)
def test_what_a_group_is_for(groups: tuple[str, ...], operation: str, argument: dict[str, Any]) -> None:
    assert not ask().allows(operation, **argument)
    assert ask(groups=groups).allows(operation, **argument)


@pytest.mark.parametrize(
    ("group", "operation", "argument"),
    [
        ("homebrew", READ, {"path": "/opt/homebrew/var/postgresql@17/base/1"}),
        ("homebrew", READ, {"path": "/opt/homebrew/etc/my.cnf"}),
        ("homebrew", WRITE, {"path": "/opt/homebrew/bin/git"}),
        ("xcode", READ, {"path": "/Applications/Mail.app/x"}),
        ("xcode", READ, {"path": "/Applications/Xcode.app-not/x"}),
        ("xcode", LOOKUP, {"name": "com.apple.CoreSimulator.CoreSimulatorService"}),
        ("git", READ, {"path": "/Users/w/.gitconfig"}),
        ("sockets", "network-outbound", {"path": "/private/var/run/docker.sock"}),
        ("sockets", "network-bind", {"path": f"{STATE}/s"}),
        ("node", "sysctl-write", {"name": "kern.maxproc"}),
        ("ipc", "mach-register", {"name": "x"}),
        ("tls", LOOKUP, {"name": "com.apple.SecurityServer"}),
        ("preferences", "user-preference-write", {"name": "x"}),
        ("realpath", READ, {"path": "/Users/w/.zsh_history", "vnode": "REGULAR-FILE"}),
        ("pty", READ, {"path": "/dev/ttys003", "vnode": "TTY"}),
    ],
)
def test_what_a_group_is_not_for(group: str, operation: str, argument: dict[str, Any]) -> None:
    assert not ask(groups=(group,)).allows(operation, **argument)


def test_what_shell_python_node_git_clang_and_xcodebuild_need_together() -> None:
    """Section by section of what is published of their needs, in one container as a build farm has it."""
    profile = ask_spec(
        {
            "sandbox": {"groups": ["python", "node", "git", "clang", "xcode", "preferences"]},
            "network": {"access": "outbound"},
        }
    )
    developer = "/Applications/Xcode.app/Contents/Developer"
    for path in ("/bin/sh", "/usr/bin/git", "/usr/bin/python3", "/usr/bin/clang", "/usr/bin/xcrun",
                 "/usr/bin/xcodebuild",
                 f"{developer}/usr/bin/git", f"{developer}/Toolchains/XcodeDefault.xctoolchain/usr/bin/clang",
                 f"{ROOT}/bin/node"):  # fmt: skip
        for operation in ("process-exec", "file-read-data", "file-map-executable"):
            assert profile.allows(operation, path=path), (operation, path)
    for path in ("/private/var/select/sh", "/private/var/select/developer_dir", "/private/var/db/xcode_select_link",
                 "/usr/lib/libxcrun.dylib", f"{developer}/Platforms/MacOSX.platform/Developer/SDKs/MacOSX.sdk/x.h",
                 "/private/etc/localtime", "/usr/share/icu/x", "/private/etc/ssl/openssl.cnf"):  # fmt: skip
        assert profile.allows("file-read-data", path=path), path
    # The stubs of /usr/bin keep what they find below TMPDIR, which is the container's.
    assert profile.allows("file-write-create", path=f"{TMP}/xcrun_db")
    assert profile.connects("93.184.216.34:443")
