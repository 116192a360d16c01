/* The clock's time base, sysctl, priorities, ptrace and posix_spawn. Sources: <mach/mach_time.h>, sysctlbyname(3),
 * setpriority(2), ptrace(2), bsd/sys/spawn.h and spawn_internal.h. */
#include "declarations.h"
#include "fake.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SETEXEC 0x0040
#define JETSAM_SET 0x8000
#define ATTRIBUTE_MAGIC 0x73706177

struct attributes {
    int magic;
    short flags;
    int jetsam_flags, priority, active_mib, inactive_mib;
};

static int attributes_made;

/* Those that were not given back. */
int fake_outstanding_attributes(void) { return attributes_made; }

static uint32_t numer = 125, denom = 3;
static char number_name[64];
static uint64_t number_value[2];
static char second_name[64];

void fake_timebase(uint32_t n, uint32_t d) {
    numer = n;
    denom = d;
}

/* Two numbers that sysctl knows; "" for none. */
void fake_sysctl(const char *first, uint64_t one, const char *second, uint64_t two) {
    strncpy(number_name, first, sizeof number_name - 1);
    strncpy(second_name, second, sizeof second_name - 1);
    number_value[0] = one;
    number_value[1] = two;
}

int mach_timebase_info(struct mach_timebase_info *info) {
    if (failing("mach_timebase_info")) return 5;
    info->numer = numer;
    info->denom = denom;
    return 0;
}

/* The first number is of four bytes, the second of eight. */
int sysctlbyname(const char *name, void *old, size_t *oldlen, void *new, size_t newlen) {
    if (new != NULL || newlen != 0) abort();
    if (failing("sysctlbyname")) return -1;
    int which = strcmp(name, number_name) == 0 ? 0 : strcmp(name, second_name) == 0 ? 1 : -1;
    size_t size = which == 0 ? 4 : 8;
    if (which < 0 || name[0] == 0) {
        errno = ENOENT;
        return -1;
    }
    if (*oldlen < size) {
        errno = ENOMEM;
        return -1;
    }
    memcpy(old, &number_value[which], size);
    *oldlen = size;
    return 0;
}

int setpriority(int which, uint32_t who, int value) {
    record("setpriority %d %u %#x", which, who, (unsigned)value);
    return failing("setpriority") ? -1 : 0;
}

int ptrace(int request, int pid, void *address, int data) {
    record("ptrace %d %d %d %d", request, pid, address == NULL, data);
    return 0;
}

int posix_spawnattr_init(void **attribute) {
    if (failing("posix_spawnattr_init")) return errno;
    struct attributes *made = calloc(1, sizeof *made);
    made->magic = ATTRIBUTE_MAGIC;
    attributes_made++;
    *attribute = made;
    return 0;
}

int posix_spawnattr_setflags(void **attribute, short flags) {
    struct attributes *known = *attribute;
    if (known->magic != ATTRIBUTE_MAGIC) abort();
    known->flags = flags;
    return failing("posix_spawnattr_setflags") ? errno : 0;
}

int posix_spawnattr_setjetsam_ext(void **attribute, short flags, int priority, int active_mib, int inactive_mib) {
    struct attributes *known = *attribute;
    if (known->magic != ATTRIBUTE_MAGIC) abort();
    if (failing("posix_spawnattr_setjetsam_ext")) return errno;
    known->jetsam_flags = flags | JETSAM_SET;
    known->priority = priority;
    known->active_mib = active_mib;
    known->inactive_mib = inactive_mib;
    return 0;
}

/* With real processes it does become the program, as SETEXEC says. Gives an error number, never errno. */
int posix_spawn(pid_t *pid, const char *path, const void *actions, void **attribute, char *const argv[],
                char *const envp[]) {
    struct attributes *known = *attribute;
    if (pid != NULL || actions != NULL || known->magic != ATTRIBUTE_MAGIC) abort();
    keep(path);
    for (int i = 0; argv[i]; i++) keep(argv[i]);
    for (int i = 0; envp[i]; i++) keep(envp[i]);
    record("posix_spawn %#x %#x %d %d %d", known->flags, known->jetsam_flags, known->priority, known->active_mib,
           known->inactive_mib);
    int number = failing("posix_spawn") ? errno : 0;
    if (live_folder != NULL && number == 0) {
        if (known->flags != SETEXEC) abort();
        execve(path, argv, envp);
        number = errno;
    }
    errno = 0;
    return number;
}

int posix_spawnattr_destroy(void **attribute) {
    struct attributes *known = *attribute;
    if (known == NULL || known->magic != ATTRIBUTE_MAGIC) abort();
    free(known);
    *attribute = NULL;
    attributes_made--;
    return 0;
}
