/* libproc, of processes that the test tells of or of the real ones. Sources: <libproc.h>, bsd/kern/proc_info.c. */
#include "declarations.h"
#include "fake.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PROCESSES 512
#define SZOMB 5
#define ALL_PIDS 1
#define UID_ONLY 4
#define SPARE_PIDS 20 /* the kernel's estimate allows for some more */

static struct fake_process processes[MAX_PROCESSES];
static int process_count;

void fake_clear_processes(void) { process_count = 0; }
void fake_add_process(const struct fake_process *process) { processes[process_count++] = *process; }

void fake_remove_process(int pid) {
    for (int i = 0; i < process_count; i++)
        if (processes[i].pid == pid) processes[i] = processes[--process_count];
}

static int find(int pid, struct fake_process *found) {
    if (live_folder != NULL) return live_find(pid, found);
    for (int i = 0; i < process_count; i++) {
        if (processes[i].pid == pid) {
            *found = processes[i];
            return 0;
        }
    }
    errno = ESRCH;
    return -1;
}

static int answer(void *buffer, int room, const void *value, size_t size) {
    if (room < (int)size) {
        errno = ENOMEM;
        return 0;
    }
    memcpy(buffer, value, size);
    return (int)size;
}

static void fill(struct proc_bsdinfo *info, const struct fake_process *process) {
    memset(info, 0xab, sizeof *info);
    info->pbi_pid = (uint32_t)process->pid;
    info->pbi_ppid = (uint32_t)process->ppid;
    info->pbi_status = (uint32_t)process->status;
    info->pbi_start_tvsec = process->start_sec;
    info->pbi_start_tvusec = process->start_usec;
}

int proc_pidinfo(int pid, int flavor, uint64_t arg, void *buffer, int buffersize) {
    struct fake_process process;
    if (failing("proc_pidinfo") || find(pid, &process) != 0) return 0;
    int sees_zombies = flavor == 25 || (flavor == 18 && arg != 0);
    if (process.status == SZOMB && !sees_zombies) {
        errno = ESRCH;
        return 0;
    }
    if (flavor == 18) { /* PROC_PIDT_BSDINFOWITHUNIQID */
        struct proc_bsdinfowithuniqid info;
        memset(&info, 0xab, sizeof info);
        fill(&info.pbsd, &process);
        info.p_uniqidentifier.p_uniqueid = process.unique;
        info.p_uniqidentifier.p_puniqueid = process.parent_unique;
        return answer(buffer, buffersize, &info, sizeof info);
    }
    if (flavor == 4) { /* PROC_PIDTASKINFO */
        struct proc_taskinfo info;
        memset(&info, 0xab, sizeof info);
        info.pti_threadnum = process.threads;
        return answer(buffer, buffersize, &info, sizeof info);
    }
    if (flavor == 1) { /* PROC_PIDLISTFDS: without a buffer an estimate, which may be short */
        int files = live_folder != NULL ? live_files(pid) : process.files;
        int size = files * (int)sizeof(struct proc_fdinfo);
        if (buffer == NULL) return size > 24 ? 24 : size;
        return size < buffersize ? size : buffersize;
    }
    if (flavor == 25) { /* PROC_PIDEXITREASONBASICINFO */
        struct proc_exitreasonbasicinfo info = {.beri_namespace = 1, .beri_code = 7};
        if (process.status != SZOMB || !live_outgrew(pid)) {
            errno = ENOENT;
            return 0;
        }
        return answer(buffer, buffersize, &info, sizeof info);
    }
    errno = EINVAL;
    return 0;
}

int proc_pid_rusage(int pid, int flavor, void *buffer) {
    struct fake_process process;
    if (flavor != 4) abort();
    if (failing("proc_pid_rusage") || find(pid, &process) != 0) return -1;
    struct rusage_info_v4 usage;
    memset(&usage, 0xab, sizeof usage);
    usage.ri_user_time = process.user;
    usage.ri_system_time = process.system;
    usage.ri_phys_footprint = process.footprint;
    usage.ri_diskio_bytesread = process.bytes_read;
    usage.ri_diskio_byteswritten = process.bytes_written;
    memcpy(buffer, &usage, sizeof usage);
    return 0;
}

/* Gives a number of bytes. */
int proc_listpids(uint32_t type, uint32_t typeinfo, void *buffer, int buffersize) {
    int *pids = buffer, room = buffersize / (int)sizeof(int), count = 0;
    record("proc_listpids %u %u", type, typeinfo);
    if ((type != ALL_PIDS && type != UID_ONLY) || failing("proc_listpids")) return 0;
    int uid = type == UID_ONLY ? (int)typeinfo : -1;
    if (live_folder != NULL) {
        count = live_pids(uid, buffer ? pids : NULL, room);
    } else {
        for (int i = 0; i < process_count; i++) {
            if (uid >= 0 && processes[i].uid != uid) continue;
            if (buffer && count < room) pids[count] = processes[i].pid;
            if (!buffer || count < room) count++;
        }
    }
    return (buffer ? count : count + SPARE_PIDS) * (int)sizeof(int);
}
