/* Other processes: seeing, signalling and steering them, and reading their memory. */
#include "attack.h"

#include <dirent.h>
#include <linux/kcmp.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#define IOPRIO_IDLE (3 << 13)

static pid_t victim(void) { return number("victim"); }

static int open_victim(void) { return syscall(SYS_pidfd_open, victim(), 0); }

static int of_victim(const char *file) { return show_file(text("/proc/%s/%s", param("victim"), file)); }

static int see_processes(void)
{
    DIR *folder = opendir("/proc");
    if (!folder)
        return errno;
    int result = ESRCH;
    for (struct dirent *one; (one = readdir(folder));)
        if (!strcmp(one->d_name, param("victim")))
            result = of_victim("comm");
    closedir(folder);
    return result;
}

static int read_arguments(void) { return of_victim("cmdline"); }
static int read_environment(void) { return of_victim("environ"); }
static int read_neighbours_environment(void) { return show_file(text("/proc/%s/environ", param("neighbour"))); }

static int signal_by_kill(void) { return kill(victim(), SIGRTMIN + BY_KILL) < 0 ? errno : 0; }

static int signal_a_thread(void)
{
    return syscall(SYS_tgkill, victim(), victim(), SIGRTMIN + BY_TGKILL) < 0 ? errno : 0;
}

static int signal_by_queue(void)
{
    union sigval value = {0};
    return sigqueue(victim(), SIGRTMIN + BY_QUEUE, value) < 0 ? errno : 0;
}

static int signal_by_descriptor(void)
{
    int fd = open_victim();
    return fd < 0 || syscall(SYS_pidfd_send_signal, fd, SIGRTMIN + BY_PIDFD, NULL, 0) < 0 ? errno : 0;
}

static int signal_a_group(void) { return kill(-victim(), SIGRTMIN + BY_GROUP) < 0 ? errno : 0; }

/* Nobody dies of this one who does not ask to. */
static int signal_everybody(void) { return kill(-1, SIGURG) < 0 ? errno : 0; }

/* The kernel signals whoever was named the owner of a socket. */
static int signal_as_owner(void)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0 || fcntl(ends[0], F_SETOWN, victim()) < 0 ||
        fcntl(ends[0], F_SETSIG, SIGRTMIN + BY_OWNER) < 0 || fcntl(ends[0], F_SETFL, O_ASYNC) < 0)
        return errno;
    return write(ends[1], "x", 1) < 0 ? errno : 0;
}

static int signal_launcher(void) { return kill(number("launcher"), 0) < 0 ? errno : 0; }
static int signal_worker(void) { return kill(number("worker"), 0) < 0 ? errno : 0; }
static int signal_neighbour(void) { return kill(number("neighbour"), 0) < 0 ? errno : 0; }

/* The shim, or whoever else is outside and the first process's parent. */
static int signal_parent(void)
{
    pid_t parent = getppid();
    return parent == 0 ? ESRCH : kill(parent, 0) < 0 ? errno : 0;
}

static int set_limits(void)
{
    struct rlimit limit = {77, 77};
    return prlimit(victim(), RLIMIT_MSGQUEUE, &limit, NULL) < 0 ? errno : 0;
}

static int slow_down(void)
{
    int slower = getpriority(PRIO_PROCESS, 0) + 1;
    return setpriority(PRIO_PROCESS, victim(), slower) < 0 ? errno : 0;
}

static int slow_down_everybody(void)
{
    int slower = getpriority(PRIO_PROCESS, 0) + 2;
    return setpriority(PRIO_USER, geteuid(), slower) < 0 ? errno : 0;
}

static int set_scheduler(void)
{
    struct sched_param none = {0};
    return sched_setscheduler(victim(), SCHED_BATCH, &none) < 0 ? errno : 0;
}

static int set_affinity(void)
{
    cpu_set_t all, one;
    if (sched_getaffinity(victim(), sizeof all, &all) < 0)
        return errno;
    CPU_ZERO(&one);
    for (int cpu = CPU_SETSIZE - 1; cpu >= 0 && CPU_COUNT(&one) == 0; cpu--)
        if (CPU_ISSET(cpu, &all))
            CPU_SET(cpu, &one);
    return sched_setaffinity(victim(), sizeof one, &one) < 0 ? errno : 0;
}

static int set_disk_priority(void) { return syscall(SYS_ioprio_set, 1, victim(), IOPRIO_IDLE) < 0 ? errno : 0; }

/* Of all processes of a user, the victim among them. */
static int set_disk_priority_of_user(void)
{
    return syscall(SYS_ioprio_set, 3, geteuid(), IOPRIO_IDLE | 5) < 0 ? errno : 0;
}

static int offer_to_oom(void) { return write_file(text("/proc/%s/oom_score_adj", param("victim")), O_WRONLY, "901"); }

const struct attempt process_attempts[] = {
    {"see_processes", see_processes, 0},
    {"read_arguments", read_arguments, 0},
    {"read_environment", read_environment, 0},
    {"read_neighbours_environment", read_neighbours_environment, 0},
    {"signal_by_kill", signal_by_kill, 0},
    {"signal_a_thread", signal_a_thread, 0},
    {"signal_by_queue", signal_by_queue, 0},
    {"signal_by_descriptor", signal_by_descriptor, 0},
    {"signal_a_group", signal_a_group, 0},
    {"signal_everybody", signal_everybody, 0},
    {"signal_as_owner", signal_as_owner, 0},
    {"signal_launcher", signal_launcher, 0},
    {"signal_worker", signal_worker, 0},
    {"signal_neighbour", signal_neighbour, 0},
    {"signal_parent", signal_parent, 1},
    {"set_limits", set_limits, 0},
    {"slow_down", slow_down, 0},
    {"slow_down_everybody", slow_down_everybody, 0},
    {"set_scheduler", set_scheduler, 0},
    {"set_affinity", set_affinity, 0},
    {"set_disk_priority", set_disk_priority, 0},
    {"set_disk_priority_of_user", set_disk_priority_of_user, 0},
    {"offer_to_oom", offer_to_oom, 0},
    {0},
};

static int read_memory_file(void)
{
    char bytes[256];
    int fd = open(text("/proc/%s/mem", param("victim")), O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    ssize_t length = pread(fd, bytes, sizeof bytes, number("secret_at"));
    if (length < 0)
        return errno;
    say_bytes(bytes, length);
    return 0;
}

static int read_launcher_memory(void)
{
    int fd = open(text("/proc/%s/mem", param("launcher")), O_RDONLY | O_CLOEXEC);
    return fd < 0 ? errno : 0;
}

static int read_memory(void)
{
    char bytes[256];
    struct iovec here = {bytes, sizeof bytes}, there = {(void *)number("secret_at"), sizeof bytes};
    ssize_t length = process_vm_readv(victim(), &here, 1, &there, 1, 0);
    if (length < 0)
        return errno;
    say_bytes(bytes, length);
    return 0;
}

static int write_memory(void)
{
    int value = 4711;
    struct iovec here = {&value, sizeof value}, there = {(void *)number("value_at"), sizeof value};
    return process_vm_writev(victim(), &here, 1, &there, 1, 0) < 0 ? errno : 0;
}

static int trace(void)
{
    if (ptrace(PTRACE_SEIZE, victim(), NULL, NULL) < 0 || ptrace(PTRACE_INTERRUPT, victim(), NULL, NULL) < 0)
        return errno;
    if (waitpid(victim(), NULL, __WALL) < 0)
        return errno;
    for (size_t at = 0; at < 64; at += sizeof(long)) {
        long word = ptrace(PTRACE_PEEKDATA, victim(), (void *)(number("secret_at") + at), NULL);
        say_bytes(&word, sizeof word);
    }
    return ptrace(PTRACE_DETACH, victim(), NULL, NULL) < 0 ? errno : 0;
}

/* Its own: an older kernel's filter could be passed by under a tracer, and a traced tree is hard to end. */
static int trace_a_child(void)
{
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    int result = ptrace(PTRACE_SEIZE, child, NULL, NULL) < 0 ? errno : 0;
    kill(child, SIGKILL);
    waitpid(child, NULL, __WALL);
    return result;
}

static int read_descriptor_file(void) { return of_victim(text("fd/%s", param("secret_fd"))); }

static int take_descriptor(void)
{
    int fd = open_victim();
    int taken = fd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, fd, number("secret_fd"), 0);
    if (taken < 0)
        return errno;
    lseek(taken, 0, SEEK_SET);
    return show_descriptor(taken);
}

static int compare_descriptors(void)
{
    return syscall(SYS_kcmp, getpid(), victim(), KCMP_FILES, 0, 0) < 0 ? errno : 0;
}

static int page_out(void)
{
    int fd = open_victim();
    struct iovec there = {(void *)(number("secret_at") & ~4095L), 4096};
    return fd < 0 || syscall(SYS_process_madvise, fd, &there, 1, MADV_COLD, 0) < 0 ? errno : 0;
}

static int find_pages(void)
{
    void *page = (void *)(number("secret_at") & ~4095L);
    int where = -1;
    return syscall(SYS_move_pages, victim(), 1L, &page, NULL, &where, 0) < 0 ? errno : 0;
}

static int read_robust_list(void)
{
    void *head;
    size_t length;
    return syscall(SYS_get_robust_list, victim(), &head, &length) < 0 ? errno : 0;
}

static int measure_victim(void)
{
    struct perf_event_attr attr = {0};
    attr.size = sizeof attr;
    attr.type = PERF_TYPE_SOFTWARE;
    attr.config = PERF_COUNT_SW_TASK_CLOCK;
    attr.exclude_kernel = 1;
    return syscall(SYS_perf_event_open, &attr, victim(), -1, -1, 0) < 0 ? errno : 0;
}

const struct attempt memory_attempts[] = {
    {"read_memory_file", read_memory_file, 0},
    {"read_launcher_memory", read_launcher_memory, 0},
    {"read_memory", read_memory, 0},
    {"write_memory", write_memory, 0},
    {"trace", trace, 0},
    {"trace_a_child", trace_a_child, 0},
    {"read_descriptor_file", read_descriptor_file, 0},
    {"take_descriptor", take_descriptor, 0},
    {"compare_descriptors", compare_descriptors, 0},
    {"page_out", page_out, 0},
    {"find_pages", find_pages, 0},
    {"read_robust_list", read_robust_list, 0},
    {"measure_victim", measure_victim, 0},
    {0},
};
