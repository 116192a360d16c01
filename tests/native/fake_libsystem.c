/* Stands in for libSystem of macOS, so that the ctypes code is exercised without a Mac.
 *
 * Declarations are written out from the public headers (<sandbox.h> and WebKit's SandboxSPI.h, <libproc.h>,
 * <sys/proc_info.h>, <sys/resource.h>, <sys/clonefile.h>, <copyfile.h>, <mach/mach_time.h>, <sys/xattr.h>).
 * Each function records what it was given and answers as it was told to.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_TEXTS 512
#define MAX_PROCESSES 512

/* ---- what tests say and ask */

static int fail_errno;         /* the next call fails with it */
static char fail_function[64]; /* … of this function */
static char fail_message[256];
static char *texts[MAX_TEXTS];
static int text_count;
static int outstanding_errors;
static uint64_t last_flags;
static int last_pid, last_filter;
static char last_operation[128];
static char confined_path[1024];
static int confined_pid = -1;
static uint32_t numer = 125, denom = 3;

void fake_fail(const char *function, int number, const char *message) {
    snprintf(fail_function, sizeof fail_function, "%s", function);
    snprintf(fail_message, sizeof fail_message, "%s", message ? message : "");
    fail_errno = number;
}

static int failing(const char *function) {
    if (strcmp(fail_function, function) != 0) return 0;
    fail_function[0] = 0;
    errno = fail_errno;
    return 1;
}

static void keep(const char *text) {
    if (text_count < MAX_TEXTS) texts[text_count++] = strdup(text);
}

void fake_reset(void) {
    while (text_count > 0) free(texts[--text_count]);
    fail_function[0] = 0;
    confined_pid = -1;
    last_flags = ~(uint64_t)0;
}

int fake_text_count(void) { return text_count; }
const char *fake_text(int index) { return texts[index]; }
int fake_outstanding_errors(void) { return outstanding_errors; }
uint64_t fake_last_flags(void) { return last_flags; }
int fake_last_filter(void) { return last_filter; }
int fake_last_pid(void) { return last_pid; }
const char *fake_last_operation(void) { return last_operation; }
void fake_confine(int pid, const char *path) {
    confined_pid = pid;
    snprintf(confined_path, sizeof confined_path, "%s", path);
}
void fake_timebase(uint32_t n, uint32_t d) { numer = n; denom = d; }

/* ---- sandbox */

const int SANDBOX_CHECK_NO_REPORT = 0x40000000;

int sandbox_init_with_parameters(const char *profile, uint64_t flags, const char *const parameters[],
                                 char **errorbuf) {
    *errorbuf = NULL;
    last_flags = flags;
    keep(profile);
    for (int i = 0; parameters && parameters[i]; i++) keep(parameters[i]);
    if (failing("sandbox_init_with_parameters")) {
        if (fail_message[0]) {
            *errorbuf = strdup(fail_message);
            outstanding_errors++;
        }
        return -1;
    }
    return 0;
}

void sandbox_free_error(char *errorbuf) {
    outstanding_errors--;
    free(errorbuf);
}

int sandbox_check(pid_t pid, const char *operation, int type, ...) {
    last_pid = pid;
    last_filter = type;
    snprintf(last_operation, sizeof last_operation, "%s", operation ? operation : "");
    if (failing("sandbox_check")) return -1;
    if (operation == NULL) return pid == confined_pid;
    if ((type & ~SANDBOX_CHECK_NO_REPORT) != 1) return 1;
    va_list arguments;
    va_start(arguments, type);
    const char *path = va_arg(arguments, const char *);
    va_end(arguments);
    keep(path);
    return !(pid == confined_pid && strcmp(path, confined_path) == 0);
}

/* ---- files */

int clonefileat(int src_dirfd, const char *src, int dst_dirfd, const char *dst, uint32_t flags) {
    struct stat found;
    last_flags = flags;
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
    last_flags = flags;
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

/* ---- processes */

struct proc_bsdinfo {
    uint32_t pbi_flags, pbi_status, pbi_xstatus, pbi_pid, pbi_ppid, pbi_uid, pbi_gid, pbi_ruid, pbi_rgid;
    uint32_t pbi_svuid, pbi_svgid, rfu_1;
    char pbi_comm[16];
    char pbi_name[2 * 16];
    uint32_t pbi_nfiles, pbi_pgid, pbi_pjobc, e_tdev, e_tpgid;
    int32_t pbi_nice;
    uint64_t pbi_start_tvsec, pbi_start_tvusec;
};

struct proc_taskinfo {
    uint64_t pti_virtual_size, pti_resident_size, pti_total_user, pti_total_system, pti_threads_user;
    uint64_t pti_threads_system;
    int32_t pti_policy, pti_faults, pti_pageins, pti_cow_faults, pti_messages_sent, pti_messages_received;
    int32_t pti_syscalls_mach, pti_syscalls_unix, pti_csw, pti_threadnum, pti_numrunning, pti_priority;
};

struct proc_fdinfo {
    int32_t proc_fd;
    uint32_t proc_fdtype;
};

struct rusage_info_v4 {
    uint8_t ri_uuid[16];
    uint64_t ri_user_time, ri_system_time, ri_pkg_idle_wkups, ri_interrupt_wkups, ri_pageins, ri_wired_size;
    uint64_t ri_resident_size, ri_phys_footprint, ri_proc_start_abstime, ri_proc_exit_abstime;
    uint64_t ri_child_user_time, ri_child_system_time, ri_child_pkg_idle_wkups, ri_child_interrupt_wkups;
    uint64_t ri_child_pageins, ri_child_elapsed_abstime, ri_diskio_bytesread, ri_diskio_byteswritten;
    uint64_t ri_cpu_time_qos_default, ri_cpu_time_qos_maintenance, ri_cpu_time_qos_background;
    uint64_t ri_cpu_time_qos_utility, ri_cpu_time_qos_legacy, ri_cpu_time_qos_user_initiated;
    uint64_t ri_cpu_time_qos_user_interactive, ri_billed_system_time, ri_serviced_system_time;
    uint64_t ri_logical_writes, ri_lifetime_max_phys_footprint, ri_instructions, ri_cycles, ri_billed_energy;
    uint64_t ri_serviced_energy, ri_interval_max_phys_footprint, ri_runnable_time;
};

struct fake_process {
    int pid, ppid, status, threads, files;
    uint64_t user, system, footprint, bytes_read, bytes_written, start_sec, start_usec;
};

static struct fake_process processes[MAX_PROCESSES];
static int process_count;

void fake_clear_processes(void) { process_count = 0; }
void fake_add_process(const struct fake_process *process) { processes[process_count++] = *process; }

static const struct fake_process *find(int pid) {
    for (int i = 0; i < process_count; i++)
        if (processes[i].pid == pid) return &processes[i];
    errno = ESRCH;
    return NULL;
}

int proc_pid_rusage(int pid, int flavor, void *buffer) {
    const struct fake_process *process = find(pid);
    if (flavor != 4) abort();
    if (process == NULL || failing("proc_pid_rusage")) return -1;
    struct rusage_info_v4 usage;
    memset(&usage, 0xab, sizeof usage);
    usage.ri_user_time = process->user;
    usage.ri_system_time = process->system;
    usage.ri_phys_footprint = process->footprint;
    usage.ri_diskio_bytesread = process->bytes_read;
    usage.ri_diskio_byteswritten = process->bytes_written;
    memcpy(buffer, &usage, sizeof usage);
    return 0;
}

int proc_listchildpids(pid_t ppid, void *buffer, int buffersize) {
    int *pids = buffer, room = buffersize / (int)sizeof(int), count = 0, total = 0;
    if (failing("proc_listchildpids")) return -1;
    for (int i = 0; i < process_count; i++) {
        if (processes[i].ppid != ppid) continue;
        total++;
        if (buffer && count < room) pids[count++] = processes[i].pid;
    }
    return buffer ? count : (total > 3 ? 3 : total); /* an estimate that may be short */
}

int proc_pidinfo(int pid, int flavor, uint64_t arg, void *buffer, int buffersize) {
    const struct fake_process *process = find(pid);
    if (process == NULL || arg != 0 || failing("proc_pidinfo")) return 0;
    if (flavor == 3) {
        struct proc_bsdinfo info;
        memset(&info, 0xab, sizeof info);
        info.pbi_pid = (uint32_t)process->pid;
        info.pbi_ppid = (uint32_t)process->ppid;
        info.pbi_status = (uint32_t)process->status;
        info.pbi_start_tvsec = process->start_sec;
        info.pbi_start_tvusec = process->start_usec;
        if (buffersize < (int)sizeof info) return 0;
        memcpy(buffer, &info, sizeof info);
        return (int)sizeof info;
    }
    if (flavor == 4) {
        struct proc_taskinfo info;
        memset(&info, 0xab, sizeof info);
        info.pti_threadnum = process->threads;
        if (buffersize < (int)sizeof info) return 0;
        memcpy(buffer, &info, sizeof info);
        return (int)sizeof info;
    }
    if (flavor == 1) {
        int size = process->files * (int)sizeof(struct proc_fdinfo);
        if (buffer == NULL) return size > 24 ? 24 : size;
        return size < buffersize ? size : buffersize;
    }
    abort();
}

struct mach_timebase_info {
    uint32_t numer, denom;
};

int mach_timebase_info(struct mach_timebase_info *info) {
    if (failing("mach_timebase_info")) return 5;
    info->numer = numer;
    info->denom = denom;
    return 0;
}

/* ---- layouts, as a C compiler sees them */

#define SIZE(type) \
    if (strcmp(name, #type) == 0) return (int)sizeof(struct type)
#define OFFSET(type, member) \
    if (strcmp(name, #type "." #member) == 0) return (int)offsetof(struct type, member)

int fake_layout(const char *name) {
    SIZE(rusage_info_v4);
    OFFSET(rusage_info_v4, ri_user_time);
    OFFSET(rusage_info_v4, ri_phys_footprint);
    OFFSET(rusage_info_v4, ri_diskio_byteswritten);
    OFFSET(rusage_info_v4, ri_runnable_time);
    SIZE(proc_bsdinfo);
    OFFSET(proc_bsdinfo, pbi_status);
    OFFSET(proc_bsdinfo, pbi_ppid);
    OFFSET(proc_bsdinfo, pbi_start_tvsec);
    OFFSET(proc_bsdinfo, pbi_start_tvusec);
    SIZE(proc_taskinfo);
    OFFSET(proc_taskinfo, pti_threadnum);
    SIZE(proc_fdinfo);
    SIZE(mach_timebase_info);
    return -1;
}
