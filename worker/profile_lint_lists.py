"""What `profile lint` knows of places, sockets and services. Data and the lookups in it.

Paths are canonical, of macOS and Linux alike: no name here means something harmless on the other.
"""

import re
from fnmatch import fnmatchcase
from typing import Literal

FIRST_OPEN_PORT = 1024

# As a whole, never because of one thing in it.
_BROAD_TEXT = """
    / /Applications /Library /System /Users /Volumes /dev /etc /home /media /mnt /opt /private /private/etc
    /private/tmp /private/var /private/var/folders /proc /root /run /srv /sys /tmp /usr /var /var/lib /var/tmp
"""
_BROAD = frozenset(_BROAD_TEXT.split())
_HOME = re.compile(r"/(?:Users|home)/[^/]+|/root|/private/var/root")
# Nothing of a container's belongs there.
_SYSTEM_TEXT = """
    /System /Library /bin /sbin /usr /lib /lib32 /lib64 /boot /etc /private/etc /private/var/db /private/var/root
    /proc /sys
"""
_SYSTEM = tuple(_SYSTEM_TEXT.split())
_NOT_SYSTEM = ("/usr/local",)
_WHOLE_DEVICES = re.compile(
    r"/dev(?:/(?:mem|kmem|port|r?disk\d.*|sd[a-z].*|nvme.*|vd[a-z].*|bpf\d*|kmsg)|/disk.*)?"
)
_STARTS = (
    "*/Library/LaunchAgents*",
    "/Library/LaunchDaemons*",
    "/etc/cron*",
    "/private/etc/cron*",
    "/var/spool/cron*",
    "*/.config/autostart*",
    "*/.config/systemd*",
    "/etc/systemd*",
    "*/.bashrc",
    "*/.bash_profile",
    "*/.profile",
    "*/.zshrc",
    "*/.zshenv",
    "*/.zprofile",
)
_SECRETS = (
    ("*/.ssh*", "SSH keys"),
    ("*/.aws*", "cloud credentials"),
    ("*/.azure*", "cloud credentials"),
    ("*/.config/gcloud*", "cloud credentials"),
    ("*/.kube*", "cluster credentials"),
    ("*/.docker*", "registry credentials"),
    ("*/.gnupg*", "keys"),
    ("*/.netrc", "passwords"),
    ("*/.npmrc", "registry credentials"),
    ("*/.pypirc", "registry credentials"),
    ("*/.git-credentials", "passwords"),
    ("*/Library/Keychains*", "keychains"),
    ("*/Library/Cookies*", "browser sessions"),
    ("*/Library/Mail*", "mail"),
    ("*/Library/Messages*", "messages"),
    ("/etc/shadow", "password hashes"),
    ("/etc/ssh*", "host keys"),
    ("/private/etc/ssh*", "host keys"),
    ("/private/etc/master.passwd", "password hashes"),
    ("/private/var/db/dslocal*", "password hashes"),
    ("/var/run/secrets*", "secrets"),
    ("/run/secrets*", "secrets"),
)
_ROOT_OF_HOST = "commands a container engine: whoever reaches it has the whole host"
_SOCKETS = (
    ("*/docker.sock", _ROOT_OF_HOST),
    ("*/docker.raw.sock", _ROOT_OF_HOST),
    ("*/podman.sock", _ROOT_OF_HOST),
    ("*/containerd.sock", _ROOT_OF_HOST),
    ("*/crio.sock", _ROOT_OF_HOST),
    ("*/lxd/unix.socket", _ROOT_OF_HOST),
    ("*/ssh-*/agent.*", "signs with the user's SSH keys"),
    ("*/com.apple.launchd.*/Listeners", "signs with the user's SSH keys"),
    ("*/ssh-agent*", "signs with the user's SSH keys"),
    ("*/S.gpg-agent*", "signs with the user's keys"),
    ("*/system_bus_socket", "speaks to every service of the system"),
    ("/run/user/*/bus", "speaks to every service of the user's session"),
    ("/run/systemd/*", "commands the service manager"),
    ("*/launcher.sock", "is a worker's own"),
    ("*/.X11-unix/*", "sees and types into every window"),
    ("*/wayland-*", "draws on the user's screen"),
)
_STARTS_PROGRAMS = "starts programs outside of the sandbox"
_SERVICES: tuple[tuple[str, tuple[Literal["error", "warning"], str]], ...] = (
    ("com.apple.coreservices.launchservicesd", ("error", _STARTS_PROGRAMS)),
    ("com.apple.coreservices.appleevents", ("error", "steers other programs")),
    ("com.apple.lsd*", ("error", _STARTS_PROGRAMS)),
    ("com.apple.xpc.launchd*", ("error", _STARTS_PROGRAMS)),
    ("com.apple.SecurityServer", ("warning", "opens the user's keychain")),
    ("com.apple.securityd*", ("warning", "opens the user's keychain")),
    ("com.apple.security.agent*", ("warning", "asks the user for passwords")),
    ("com.apple.windowserver*", ("warning", "sees and draws on the screen")),
    ("com.apple.pasteboard*", ("warning", "reads the clipboard")),
    ("com.apple.tccd*", ("warning", "asks for access to private data")),
    ("com.apple.cmio*", ("warning", "opens the camera")),
    ("com.apple.audio*", ("warning", "opens the microphone")),
    ("com.apple.diskarbitrationd", ("warning", "mounts and ejects disks")),
)


def is_broad(path: str) -> bool:
    return path in _BROAD or _HOME.fullmatch(path) is not None


def is_system(path: str) -> bool:
    """Whether writing there changes the system itself."""
    if path == "/" or _WHOLE_DEVICES.fullmatch(path):
        return True
    if any(_below(path, top) for top in _NOT_SYSTEM):
        return False
    return any(_below(path, top) for top in _SYSTEM)


def secret_in(path: str) -> str | None:
    return next((what for pattern, what in _SECRETS if fnmatchcase(path, pattern)), None)


def starts_programs(path: str) -> bool:
    """Whether something else runs what is written there."""
    return any(fnmatchcase(path, pattern) for pattern in _STARTS)


def power_of_socket(path: str) -> str | None:
    return next((what for pattern, what in _SOCKETS if fnmatchcase(path, pattern)), None)


def danger_of_service(name: str) -> tuple[Literal["error", "warning"], str] | None:
    return next((danger for pattern, danger in _SERVICES if fnmatchcase(name, pattern)), None)


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")
