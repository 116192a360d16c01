/* clonefileat, fcopyfile and extended attributes, done with Linux's means. Sources: clonefile(2), copyfile(3),
 * <sys/xattr.h>. */
#define _GNU_SOURCE
#include "fake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int clonefileat(int src_dirfd, const char *src, int dst_dirfd, const char *dst, uint32_t flags) {
    struct stat found;
    record("clonefileat %#x", flags);
    keep(src);
    keep(dst);
    if (failing("clonefileat")) return -1;
    if (fstatat(dst_dirfd, dst, &found, AT_SYMLINK_NOFOLLOW) == 0) {
        errno = EEXIST;
        return -1;
    }
    char from[4200], to[4200];
    snprintf(from, sizeof from, "/proc/%d/fd/%d/%s", (int)getpid(), src_dirfd, src);
    snprintf(to, sizeof to, "/proc/%d/fd/%d/%s", (int)getpid(), dst_dirfd, dst);
    pid_t child = fork();
    if (child == 0) {
        execlp("cp", "cp", "-a", from, to, (char *)NULL);
        _exit(127);
    }
    int status = 0;
    if (waitpid(child, &status, 0) < 0 || status != 0) {
        errno = EIO;
        return -1;
    }
    return 0;
}

int fcopyfile(int from, int to, void *state, uint32_t flags) {
    char buffer[65536];
    ssize_t size;
    record("fcopyfile %#x", flags);
    if (state != NULL) abort();
    if (failing("fcopyfile")) return -1;
    while ((size = read(from, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, (size_t)size) != size) return -1;
    return size < 0 ? -1 : 0;
}

/* macOS: the last argument is options, and there is a position. */
ssize_t flistxattr(int fd, char *names, size_t size, int options) {
    if (options != 0) abort();
    if (failing("flistxattr")) return -1;
    return syscall(SYS_flistxattr, fd, names, size);
}

ssize_t fgetxattr(int fd, const char *name, void *value, size_t size, uint32_t position, int options) {
    if (options != 0 || position != 0) abort();
    if (failing("fgetxattr")) return -1;
    return syscall(SYS_fgetxattr, fd, name, value, size);
}

int fsetxattr(int fd, const char *name, const void *value, size_t size, uint32_t position, int options) {
    if (options != 0 || position != 0) abort();
    if (failing("fsetxattr")) return -1;
    return (int)syscall(SYS_fsetxattr, fd, name, value, size, 0);
}
