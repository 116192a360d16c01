/* Processes and sandboxes of this Linux system, in the shape that macOS gives them.
 *
 * A sandbox must be inherited over fork and exec and be visible from outside, and nothing may shed it: the two limits
 * of a resource that nobody uses (RLIMIT_MSGQUEUE), which an ordinary process can only lower, hold a tag of the folder
 * and the sandbox's number. The launcher carries the tag too, and so does all that it starts: nothing without the tag
 * is ever listed, so that no fault of the code under test can reach another process of this machine.
 *
 * A unique id is made of the start time and the pid. The first parent is remembered from when a process is first
 * looked at, in memory that all forks share.
 */
#define _GNU_SOURCE
#include "fake.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#define FIRST 400000
#define UNCONFINED (2 * FIRST)
#define MAX_FILE (256 * 1024)
#define SLOTS 65536

static rlim_t tag;
static int reaper = 1;
static struct slot {
    uint64_t unique, parent;
} *parents;

/* To be called once, before anything forks: `number` tells what belongs to one folder from all else. */
void fake_live_tag(int number) {
    tag = (rlim_t)(number % FIRST);
    parents = mmap(NULL, SLOTS * sizeof *parents, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (parents == MAP_FAILED) abort();
}

/* This process and all that it will start carry the tag. */
void fake_live_join(void) {
    struct rlimit limits = {.rlim_cur = tag, .rlim_max = UNCONFINED};
    if (syscall(SYS_prlimit64, 0, RLIMIT_MSGQUEUE, &limits, NULL) != 0) abort();
}

/* The tagged process's second limit; 0 for one without the tag, -1 and errno for none. */
static long tagged(int pid) {
    struct rlimit found;
    if (syscall(SYS_prlimit64, pid, RLIMIT_MSGQUEUE, NULL, &found) != 0) return -1;
    return found.rlim_cur == tag && found.rlim_max >= FIRST && found.rlim_max <= UNCONFINED ? (long)found.rlim_max : 0;
}

/* Who adopts orphans here; it is shown as launchd. */
void fake_live_reaper(int pid) { reaper = pid; }

static int load(const char *path, char *into, size_t room) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    size_t size = 0;
    ssize_t more;
    while (size + 1 < room && (more = read(fd, into + size, room - size - 1)) > 0) size += (size_t)more;
    close(fd);
    into[size] = 0;
    return (int)size;
}

/* ---- processes */

static int read_stat(int pid, struct fake_process *found) {
    char path[64], text[1024], state;
    unsigned long user, system, pages;
    unsigned long long start;
    int ppid, threads;
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    if (load(path, text, sizeof text) <= 0) {
        errno = ESRCH;
        return -1;
    }
    const char *rest = strrchr(text, ')');
    if (rest == NULL ||
        sscanf(rest + 2, "%c %d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu %*d %*d %*d %*d %d %*d %llu %*u %lu",
               &state, &ppid, &user, &system, &threads, &start, &pages) != 7)
        abort();
    memset(found, 0, sizeof *found);
    found->pid = pid;
    found->ppid = ppid;
    found->status = state == 'Z' || state == 'X' ? 5 : state == 'T' || state == 't' ? 4 : 2;
    found->threads = threads;
    found->unique = ((uint64_t)start << 22) | (uint64_t)pid;
    /* 10 ms each, told in ticks of 125/3 ns */
    found->user = user * 10000000ull * 3 / 125;
    found->system = system * 10000000ull * 3 / 125;
    found->footprint = pages * (uint64_t)sysconf(_SC_PAGE_SIZE);
    found->start_sec = start / 100;
    return 0;
}

static uint64_t parent_now(const struct fake_process *process) {
    struct fake_process parent;
    return process->ppid > 0 && read_stat(process->ppid, &parent) == 0 ? parent.unique : 1;
}

/* Whoever takes a slot writes its parent; the others wait for that, but not for one who was killed meanwhile. */
static uint64_t first_parent(const struct fake_process *process) {
    uint64_t now = parent_now(process);
    for (size_t step = 0; step < SLOTS; step++) {
        struct slot *slot = &parents[(process->unique * 2654435761u + step) % SLOTS];
        uint64_t there = 0;
        if (__atomic_compare_exchange_n(&slot->unique, &there, process->unique, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            __atomic_store_n(&slot->parent, now, __ATOMIC_SEQ_CST);
            return now;
        }
        if (there != process->unique) continue;
        for (int patience = 0; patience < 100000; patience++) {
            uint64_t parent = __atomic_load_n(&slot->parent, __ATOMIC_SEQ_CST);
            if (parent != 0) return parent;
        }
        return now;
    }
    abort();
}

int live_find(int pid, struct fake_process *found) {
    if (read_stat(pid, found) != 0) return -1;
    found->parent_unique = first_parent(found);
    if (found->ppid == reaper) found->ppid = 1;
    return 0;
}

int live_files(int pid) {
    char path[64];
    struct dirent *entry;
    int count = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", pid);
    DIR *folder = opendir(path);
    while (folder != NULL && (entry = readdir(folder)) != NULL) count += entry->d_name[0] != '.';
    if (folder != NULL) closedir(folder);
    return count;
}

int live_pids(int uid, int *pids, int room) {
    int count = 0;
    struct dirent *entry;
    struct stat found;
    char path[300];
    DIR *folder = opendir("/proc");
    if (folder == NULL) abort();
    while ((entry = readdir(folder)) != NULL) {
        if (!isdigit((unsigned char)entry->d_name[0])) continue;
        snprintf(path, sizeof path, "/proc/%s", entry->d_name);
        if (tagged(atoi(entry->d_name)) <= 0) continue;
        if (stat(path, &found) != 0 || (uid >= 0 && (int)found.st_uid != uid)) continue;
        if (pids != NULL && count == room) break;
        if (pids != NULL) pids[count] = atoi(entry->d_name);
        count++;
    }
    closedir(folder);
    return count;
}

/* The test says of a process that the kernel ended it for its memory, by a file. */
int live_outgrew(int pid) {
    char path[4200];
    if (live_folder == NULL) return 1;
    snprintf(path, sizeof path, "%s/outgrew-%d", live_folder, pid);
    return access(path, F_OK) == 0;
}

/* ---- sandboxes */

static void place(char *path, size_t room, long sandbox) {
    snprintf(path, room, "%s/sandbox-%ld", live_folder, sandbox);
}

long live_sandbox(int pid) {
    long limit = tagged(pid);
    return limit <= 0 || limit == UNCONFINED ? (limit < 0 ? -1 : 0) : limit - FIRST;
}

/* 0, or -1 with errno; `fake_script_message` says why a profile was refused. */
int live_enter(const char *profile, const char *const parameters[]) {
    char path[4200];
    snprintf(path, sizeof path, "%s/refuse", live_folder);
    if (load(path, fake_script_message, 512) > 0) {
        errno = EINVAL;
        return -1;
    }
    if (live_sandbox(getpid()) != 0) {
        errno = EPERM;
        return -1;
    }
    for (long sandbox = 1; sandbox < FIRST; sandbox++) {
        place(path, sizeof path, sandbox);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (fd < 0) continue;
        if (write(fd, profile, strlen(profile) + 1) < 0) abort();
        for (int i = 0; parameters[i]; i++)
            if (write(fd, parameters[i], strlen(parameters[i]) + 1) < 0) abort();
        close(fd);
        struct rlimit limits = {.rlim_cur = tag, .rlim_max = FIRST + (rlim_t)sandbox};
        return (int)syscall(SYS_prlimit64, 0, RLIMIT_MSGQUEUE, &limits, NULL);
    }
    errno = ENOMEM;
    return -1;
}

int live_marker_is(long sandbox, const char *path) {
    static char text[MAX_FILE];
    char file[4200];
    place(file, sizeof file, sandbox);
    int size = load(file, text, sizeof text);
    for (const char *at = text; size > 0 && at < text + size; at += strlen(at) + 1) {
        if (strncmp(at, "MARKER", 6) != 0) continue;
        at += strlen(at) + 1;
        if (strcmp(at, path) == 0) return 1;
    }
    return 0;
}
