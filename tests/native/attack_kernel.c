/* Calls that administer the machine, open much of the kernel, or change what is seen of it.
 *
 * What would harm a machine is asked for in a way that does nothing even where it is let in: a module that is none,
 * the rate that the clock has, a file that is no swap space.
 */
#include "attack.h"

#include <linux/bpf.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/quota.h>
#include <sys/reboot.h>
#include <sys/swap.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <time.h>
#ifdef __x86_64__
#include <sys/io.h>
#endif

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
#define NEW_USER 0x10000000
#define NEW_MOUNT 0x00020000

int unshare(int flags);
int setns(int fd, int kind);
#define MESSAGES_READ 3

static int leave(int flags) { return unshare(flags) < 0 ? errno : 0; }

static int new_user_namespace(void) { return leave(NEW_USER); }
static int new_mount_namespace(void) { return leave(NEW_MOUNT); }
static int new_pid_namespace(void) { return leave(0x20000000); }
static int new_network_namespace(void) { return leave(0x40000000); }
static int new_ipc_namespace(void) { return leave(0x08000000); }
static int new_host_namespace(void) { return leave(0x04000000); }
static int new_group_namespace(void) { return leave(0x02000000); }
static int new_time_namespace(void) { return leave(CLONE_NEWTIME); }

static int new_namespace_by_clone(void)
{
    long child = syscall(SYS_clone, NEW_USER | SIGCHLD, 0, 0, 0, 0);
    if (child == 0)
        _exit(0);
    return child < 0 ? errno : 0;
}

static int new_namespace_by_clone3(void)
{
    struct clone_args arguments = {.flags = NEW_USER, .exit_signal = SIGCHLD};
    long child = syscall(SYS_clone3, &arguments, sizeof arguments);
    if (child == 0)
        _exit(0);
    return child < 0 ? errno : 0;
}

static int join_namespace(void)
{
    int fd = open(text("/proc/%s/ns/mnt", param("victim")), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, NEW_MOUNT) < 0)
        return errno;
    return show_file(outside("read_file"));
}

static int join_namespace_by_descriptor(void)
{
    int fd = syscall(SYS_pidfd_open, number("victim"), 0);
    if (fd < 0 || setns(fd, NEW_MOUNT) < 0)
        return errno;
    return show_file(outside("read_file"));
}

static int load_bpf(void)
{
    union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
    return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr) < 0 ? errno : 0;
}

static int measure_itself(void)
{
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .exclude_kernel = 1};
    attr.config = PERF_COUNT_SW_TASK_CLOCK;
    return syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0) < 0 ? errno : 0;
}

static int catch_faults(void) { return syscall(SYS_userfaultfd, O_CLOEXEC | 1) < 0 ? errno : 0; }

/* A ring that does nothing, to its end. */
static int use_io_uring(void)
{
    struct io_uring_params params = {0};
    int ring = syscall(SYS_io_uring_setup, 2, &params);
    if (ring < 0)
        return errno;
    char *queue = mmap(NULL, params.sq_off.array + 2 * sizeof(unsigned), PROT_READ | PROT_WRITE, MAP_SHARED, ring, 0);
    struct io_uring_sqe *entries =
        mmap(NULL, 2 * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    if (queue == MAP_FAILED || entries == MAP_FAILED)
        return errno;
    entries[0] = (struct io_uring_sqe){.opcode = IORING_OP_NOP};
    ((unsigned *)(queue + params.sq_off.array))[0] = 0;
    __atomic_store_n((unsigned *)(queue + params.sq_off.tail), 1, __ATOMIC_RELEASE);
    return syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0 ? errno : 0;
}

static int load_module(void) { return let_in(syscall(SYS_init_module, "none", 4L, ""), ENOEXEC); }

static int load_module_file(void)
{
    int fd = memfd_create("module", 0);
    if (fd < 0 || write(fd, "none", 4) < 0)
        return errno;
    return let_in(syscall(SYS_finit_module, fd, "", 0), ENOEXEC);
}

static int remove_module(void) { return let_in(syscall(SYS_delete_module, "no_such_module", O_NONBLOCK), ENOENT); }
static int load_kernel(void) { return let_in(syscall(SYS_kexec_load, 0L, 1000L, NULL, 0L), EINVAL); }

static int load_kernel_file(void)
{
#ifdef SYS_kexec_file_load
    return let_in(syscall(SYS_kexec_file_load, -1, -1, 0L, "", ~0L), EINVAL);
#else
    say("no such call on this kind of machine");
    return UNAVAILABLE;
#endif
}

/* No command that there is. */
static int restart_machine(void) { return let_in(syscall(SYS_reboot, 0xfee1dead, 672274793, 0x5AFE, NULL), EINVAL); }

static int swap_file(char **path)
{
    *path = own("no-swap");
    int result = write_file(*path, O_WRONLY | O_CREAT, "no swap space");
    return result == EEXIST ? 0 : result;
}

static int swap_on(void)
{
    char *path;
    int result = swap_file(&path);
    return result ? result : let_in(swapon(path, 0), EINVAL);
}

static int swap_off(void)
{
    char *path;
    int result = swap_file(&path);
    return result ? result : let_in(swapoff(path), EINVAL);
}

static int set_clock(void) { return syscall(SYS_settimeofday, NULL, NULL) < 0 ? errno : 0; }

static int shift_clock(void)
{
    struct timex by_nothing = {.modes = ADJ_SETOFFSET | ADJ_NANO};
    return syscall(SYS_clock_adjtime, CLOCK_REALTIME, &by_nothing) < 0 ? errno : 0;
}

static int tune_clock(void)
{
    struct timex now = {0};
    if (adjtimex(&now) < 0)
        return errno;
    now.modes = ADJ_TICK;
    return adjtimex(&now) < 0 ? errno : 0;
}

static int rename_host(void) { return sethostname("attack-call", 11) < 0 ? errno : 0; }

/* Of this namespace of processes; and off again. */
static int keep_accounts(void)
{
    char *path = own("accounts");
    int result = write_file(path, O_WRONLY | O_CREAT, "");
    if (result)
        return result;
    result = acct(path) < 0 ? errno : 0;
    if (!result)
        acct(NULL);
    return result;
}

static int use_quota(void) { return syscall(SYS_quotactl, QCMD(Q_SYNC, USRQUOTA), NULL, 0, NULL) < 0 ? errno : 0; }
static int read_messages(void)
{
    char bytes[1024];
    return klogctl(MESSAGES_READ, bytes, sizeof bytes) < 0 ? errno : 0;
}

static int hang_up(void) { return setsid() < 0 || vhangup() < 0 ? errno : 0; }

static int open_ports(void)
{
#ifdef __x86_64__
    return ioperm(0x80, 1, 1) < 0 ? errno : 0;
#else
    say("no such call on this kind of machine");
    return UNAVAILABLE;
#endif
}

static int make_code_predictable(void) { return personality(ADDR_NO_RANDOMIZE) < 0 ? errno : 0; }

/* A 32-bit call has other numbers: under them a filter for 64 bits sees other calls. */
static int call_by_32_bits(void)
{
#ifdef __x86_64__
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
    return result == getpid() ? 0 : (int)-result;
#else
    say("no such entry on this kind of machine");
    return UNAVAILABLE;
#endif
}

static int call_by_x32(void)
{
#ifdef __x86_64__
    return syscall(0x40000000 | SYS_getpid) < 0 ? errno : 0;
#else
    say("no such entry on this kind of machine");
    return UNAVAILABLE;
#endif
}

const struct attempt kernel_attempts[] = {
    {"new_user_namespace", new_user_namespace, 0},
    {"new_mount_namespace", new_mount_namespace, 0},
    {"new_pid_namespace", new_pid_namespace, 0},
    {"new_network_namespace", new_network_namespace, 0},
    {"new_ipc_namespace", new_ipc_namespace, 0},
    {"new_host_namespace", new_host_namespace, 0},
    {"new_group_namespace", new_group_namespace, 0},
    {"new_time_namespace", new_time_namespace, 0},
    {"new_namespace_by_clone", new_namespace_by_clone, 0},
    {"new_namespace_by_clone3", new_namespace_by_clone3, 0},
    {"join_namespace", join_namespace, 0},
    {"join_namespace_by_descriptor", join_namespace_by_descriptor, 0},
    {"load_bpf", load_bpf, 0},
    {"measure_itself", measure_itself, 0},
    {"catch_faults", catch_faults, 0},
    {"use_io_uring", use_io_uring, 0},
    {"load_module", load_module, 0},
    {"load_module_file", load_module_file, 0},
    {"remove_module", remove_module, 0},
    {"load_kernel", load_kernel, 0},
    {"load_kernel_file", load_kernel_file, 0},
    {"restart_machine", restart_machine, 0},
    {"swap_on", swap_on, 0},
    {"swap_off", swap_off, 0},
    {"set_clock", set_clock, 0},
    {"shift_clock", shift_clock, 0},
    {"tune_clock", tune_clock, 0},
    {"rename_host", rename_host, 0},
    {"keep_accounts", keep_accounts, 0},
    {"use_quota", use_quota, 0},
    {"read_messages", read_messages, 0},
    {"hang_up", hang_up, 0},
    {"open_ports", open_ports, 0},
    {"make_code_predictable", make_code_predictable, 0},
    {"call_by_32_bits", call_by_32_bits, 0},
    {"call_by_x32", call_by_x32, 0},
    {0},
};
