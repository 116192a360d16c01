/* What is to be had of files without opening them, and the system's own files. */
#include "attack.h"

#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

static int see_file(void)
{
    struct stat status;
    if (stat(outside("see_file"), &status) < 0)
        return errno;
    say("size %lld", (long long)status.st_size);
    return 0;
}

static int change_mode(void) { return chmod(outside("change_mode"), 0777) < 0 ? errno : 0; }
static int change_owner(void) { return lchown(outside("change_owner"), 4242, 4242) < 0 ? errno : 0; }

static int change_times(void)
{
    struct timespec times[2] = {{1000, 0}, {1000, 0}};
    return utimensat(AT_FDCWD, outside("change_times"), times, 0) < 0 ? errno : 0;
}

static int change_attribute(void)
{
    return setxattr(outside("change_attribute"), "user.attack", "x", 1, 0) < 0 ? errno : 0;
}

static int read_attribute(void)
{
    char value[256];
    ssize_t length = getxattr(outside("read_attribute"), "user.secret", value, sizeof value);
    if (length < 0)
        return errno;
    say_bytes(value, length);
    return 0;
}

static int change_mode_of_readable(void)
{
    return chmod(text("%s/mode", param("readable")), 0777) < 0 ? errno : 0;
}

static int watch_folder(void)
{
    int fd = inotify_init1(IN_CLOEXEC);
    return fd < 0 || inotify_add_watch(fd, param("outside"), IN_ALL_EVENTS) < 0 ? errno : 0;
}

static int watch_everything(void)
{
    int fd = fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC, O_RDONLY);
    if (fd < 0)
        return errno;
    return fanotify_mark(fd, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, AT_FDCWD, param("own")) < 0 ? errno : 0;
}

static int lock_file(void)
{
    int fd = open(outside("lock_file"), O_RDONLY | O_CLOEXEC);
    return fd < 0 || flock(fd, LOCK_EX | LOCK_NB) < 0 ? errno : 0;
}

static int lock_readable(void)
{
    int fd = open(text("%s/lease", param("readable")), O_RDONLY | O_CLOEXEC);
    return fd < 0 || flock(fd, LOCK_EX | LOCK_NB) < 0 ? errno : 0;
}

/* Of a file that it may read: whoever opens that for writing waits for the lease to be given back, or 45 s. */
static int lease_readable(void)
{
    int fd = open(text("%s/lease", param("readable")), O_RDONLY | O_CLOEXEC);
    return fd < 0 || fcntl(fd, F_SETLEASE, F_RDLCK) < 0 ? errno : 0;
}

const struct attempt metadata_attempts[] = {
    {"see_file", see_file, 0},
    {"change_mode", change_mode, 0},
    {"change_owner", change_owner, 0},
    {"change_times", change_times, 0},
    {"change_attribute", change_attribute, 0},
    {"read_attribute", read_attribute, 0},
    {"change_mode_of_readable", change_mode_of_readable, 0},
    {"watch_folder", watch_folder, 0},
    {"watch_everything", watch_everything, 0},
    {"lock_file", lock_file, 0},
    {"lock_readable", lock_readable, 0},
    {"lease_readable", lease_readable, 0},
    {0},
};

static int read_passwords(void) { return show_file("/etc/shadow"); }

/* Granted to read, but by its mode for the members of a group only. */
static int read_by_group(void)
{
    if (!*param("of_group")) {
        say("it is root, or nobody here could make such a file");
        return UNAVAILABLE;
    }
    return show_file(text("%s/file", param("of_group")));
}

static int plant_preload(void) { return write_file("/etc/ld.so.preload", O_WRONLY | O_CREAT, "/none.so\n"); }

static int plant_program(void)
{
    return write_file("/usr/local/bin/sandfleet-attack-planted", O_WRONLY | O_CREAT, "#!/bin/sh\n");
}

static int rewrite_launcher(void) { return write_file(param("launcher_file"), O_WRONLY | O_APPEND, "# attack\n"); }

/* What it holds already, so that nothing changes where it works. */
static int set_core_pattern(void)
{
    char bytes[256];
    int fd = open("/proc/sys/kernel/core_pattern", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return errno;
    ssize_t length = read(fd, bytes, sizeof bytes);
    return length < 0 || pwrite(fd, bytes, length, 0) < 0 ? errno : 0;
}

static int set_domain_by_file(void) { return write_file("/proc/sys/kernel/domainname", O_WRONLY, "attack-file"); }
static int set_forwarding(void) { return write_file("/proc/sys/net/ipv4/ip_forward", O_WRONLY, "1"); }

/* `h` prints a help text into the kernel's log. */
static int press_sysrq(void) { return write_file("/proc/sysrq-trigger", O_WRONLY, "h"); }

static int read_kernel_messages(void) { return show_file("/dev/kmsg"); }

static int join_group(void)
{
    if (!*param("cgroup")) {
        say("no control groups of version 2 for this user");
        return UNAVAILABLE;
    }
    return write_file(text("%s/cgroup.procs", param("cgroup")), O_WRONLY, param("victim"));
}

static int make_group(void)
{
    if (!*param("cgroup")) {
        say("no control groups of version 2 for this user");
        return UNAVAILABLE;
    }
    return mkdir(text("%s/attack", param("cgroup")), 0755) < 0 ? errno : 0;
}

static int make_device(void)
{
    char *path = own("zero");
    if (mknod(path, S_IFCHR | 0600, makedev(1, 5)) < 0)
        return errno;
    return show_file(path);
}

const struct attempt system_attempts[] = {
    {"read_passwords", read_passwords, 0},
    {"read_by_group", read_by_group, 0},
    {"plant_preload", plant_preload, 0},
    {"plant_program", plant_program, 0},
    {"rewrite_launcher", rewrite_launcher, 0},
    {"set_core_pattern", set_core_pattern, 0},
    {"set_domain_by_file", set_domain_by_file, 0},
    {"set_forwarding", set_forwarding, 0},
    {"press_sysrq", press_sysrq, 0},
    {"read_kernel_messages", read_kernel_messages, 0},
    {"join_group", join_group, 0},
    {"make_group", make_group, 0},
    {"make_device", make_device, 0},
    {0},
};
