/* The view of the file system: mounts, old calls and new, and roots. */
#include "attack.h"

#include <linux/mount.h>
#include <sched.h>

#define OLD_BIND 4096
#define OLD_REMOUNT 32
#define DETACH 2
#define LISTMOUNT 458
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif

int mount(const char *source, const char *target, const char *kind, unsigned long flags, const void *data);
int umount2(const char *target, int flags);

static char *place(void)
{
    char *made = own("mounted");
    mkdir(made, 0755);
    return made;
}

/* Each mount that works is taken away again. */
static int mounted(int result, const char *target)
{
    if (result < 0)
        return errno;
    umount2(target, DETACH);
    return 0;
}

static int mount_new(void) { return mounted(mount("none", place(), "tmpfs", 0, NULL), place()); }
static int mount_same(void) { return mounted(mount("/", place(), NULL, OLD_BIND, NULL), place()); }
static int mount_processes(void) { return mounted(mount("proc", place(), "proc", 0, NULL), place()); }

static int mount_in_user_namespace(void)
{
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        return errno;
    return mounted(mount("none", place(), "tmpfs", 0, NULL), place());
}

/* A place where something is mounted read-only, and the same in the mount's own words. */
static int remount_writable(void)
{
    return mount(NULL, param("fixed"), NULL, OLD_REMOUNT | OLD_BIND, NULL) < 0 ? errno : 0;
}

static int set_writable(void)
{
    struct mount_attr attr = {.attr_clr = MOUNT_ATTR_RDONLY};
    return syscall(SYS_mount_setattr, AT_FDCWD, param("fixed"), 0, &attr, sizeof attr) < 0 ? errno : 0;
}

static int unmount(void) { return umount2(param("fixed"), DETACH) < 0 ? errno : 0; }

static int make_file_system(void)
{
    int fd = syscall(SYS_fsopen, "tmpfs", 0);
    if (fd < 0 || syscall(SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return errno;
    return syscall(SYS_fsmount, fd, 0, 0) < 0 ? errno : 0;
}

static int pick_file_system(void) { return syscall(SYS_fspick, AT_FDCWD, param("fixed"), 0) < 0 ? errno : 0; }

static int copy_tree(void)
{
    return syscall(SYS_open_tree, AT_FDCWD, "/", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE) < 0 ? errno : 0;
}

static int move_tree(void) { return let_in(syscall(SYS_move_mount, -1, "no", -1, "no", 0), EBADF); }

static int list_mounts(void)
{
    uint64_t request[4] = {32, UINT64_MAX, 0, 0}, found[64];
    ((uint32_t *)request)[0] = 32;
    ((uint32_t *)request)[1] = 0;
    long count = syscall(LISTMOUNT, request, found, 64L, 0);
    return count < 0 ? errno : 0;
}

static int change_root(void)
{
    char *folder = own("root");
    mkdir(folder, 0755);
    int before = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (chroot(folder) < 0)
        return errno;
    if (before >= 0 && fchdir(before) == 0)
        for (int i = 0; i < 64 && chdir("..") == 0; i++)
            ;
    say("out again: %d", chroot("."));
    return 0;
}

static int swap_root(void) { return let_in(syscall(SYS_pivot_root, "/no/such/place", "/no/such/place"), ENOENT); }

const struct attempt mount_attempts[] = {
    {"mount_new", mount_new, 0},
    {"mount_same", mount_same, 0},
    {"mount_processes", mount_processes, 0},
    {"mount_in_user_namespace", mount_in_user_namespace, 0},
    {"make_file_system", make_file_system, 0},
    {"pick_file_system", pick_file_system, 0},
    {"copy_tree", copy_tree, 0},
    {"move_tree", move_tree, 0},
    {"list_mounts", list_mounts, 0},
    {"change_root", change_root, 0},
    {"swap_root", swap_root, 0},
    {"remount_writable", remount_writable, 0},
    {"set_writable", set_writable, 0},
    {"unmount", unmount, 0},
    {0},
};
