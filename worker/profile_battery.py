"""What any two sandboxes are asked when they are compared: places, ports and names that profiles differ in. Data."""

# Places that profiles tend to be asked about, on either platform.
PATHS = """
    / /Applications /Library/Keychains/System.keychain /Library/Preferences/.GlobalPreferences.plist
    /System/Library/CoreServices/SystemVersion.plist /System/Library/Frameworks/Metal.framework/Metal
    /Users/someone/.ssh/id_ed25519 /Users/someone/Documents/letter.txt /bin/sh /dev/null /dev/ptmx
    /dev/random /dev/shm/segment /dev/tty /etc/hosts /etc/passwd /etc/resolv.conf /etc/shadow
    /etc/ssl/cert.pem /home/someone/.ssh/id_ed25519 /opt/homebrew/bin/brew /private/etc/hosts
    /private/etc/passwd /private/etc/ssl/cert.pem /private/tmp/file /private/var/db/timezone/zoneinfo
    /private/var/select/sh /proc/1/environ /proc/cpuinfo /proc/self/status /root/.bashrc /run/docker.sock
    /sys/fs/cgroup/cgroup.procs /tmp/file /usr/bin/env /usr/lib/libSystem.B.dylib /usr/local/bin/tool
    /usr/share/zoneinfo/UTC /var/lib/file
    /Library/Developer/CommandLineTools/usr/bin/git /Library/Apple/usr/libexec/oah/libRosettaRuntime
"""
SOCKETS = """
    /private/var/run/mDNSResponder /private/var/run/syslog /private/tmp/ssh-agent.sock /run/docker.sock
    /var/run/docker.sock
"""
SERVICES = """
    com.apple.CoreServices.coreservicesd com.apple.FSEvents com.apple.MTLCompilerService
    com.apple.PowerManagement.control com.apple.SecurityServer com.apple.SystemConfiguration.DNSConfiguration
    com.apple.SystemConfiguration.configd com.apple.cfprefsd.agent com.apple.cfprefsd.daemon
    com.apple.coreservices.launchservicesd com.apple.dnssd.service com.apple.gpumemd.source com.apple.logd
    com.apple.networkd com.apple.ocspd com.apple.system.notification_center
    com.apple.system.opendirectoryd.libinfo com.apple.tccd com.apple.trustd com.apple.trustd.agent
    com.apple.windowserver.active
"""
PORTS = (22, 53, 80, 443, 4222, 8080)
RAW_DARWIN = (
    ("process-fork", None),
    ("pseudo-tty", None),
    ("signal", "others"),
    ("signal", "same-sandbox"),
    ("process-info-pidinfo", "others"),
    ("process-info-pidinfo", "same-sandbox"),
    ("sysctl-read", "hw.ncpu"),
    ("sysctl-read", "kern.procargs2"),
    ("sysctl-write", "kern.grade_cputype"),
    ("sysctl-write", "kern.tcsm_enable"),
    ("ipc-posix-sem-open", "/some-semaphore"),
    ("ipc-posix-shm-read-data", "/some-segment"),
    ("ipc-posix-shm-read-data", "apple.cfprefs.501v1"),
    ("user-preference-read", "com.apple.Metal"),
    ("user-preference-read", "kCFPreferencesAnyApplication"),
    ("file-write-setugid", "/private/tmp/file"),
    ("mach-register", "com.example.service"),
    ("system-socket", "AF_SYSTEM"),
    ("system-socket", "AF_ROUTE"),
    ("lsopen", None),
    ("job-creation", None),
    ("appleevent-send", None),
    ("iokit-open-user-client", "IOSurfaceRootUserClient"),
    ("iokit-open-user-client", "IOUSBDeviceUserClient"),
    ("iokit-get-properties", "gpu-core-count"),
    ("nvram-get", None),
)
RAW_LINUX = (
    ("socket", "unix/stream"),
    ("socket", "inet/stream"),
    ("socket", "inet/dgram"),
    ("socket", "inet/raw"),
    ("socket", "netlink/raw"),
    ("syscall", "ptrace"),
    ("syscall", "mount"),
    ("syscall", "shmget"),
    ("syscall", "mq_open"),
    ("syscall", "truncate"),
    ("signal", None),
    ("abstract_unix", None),
)
