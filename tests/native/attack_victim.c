/* What attempts are made on: a process of the same user, outside of every sandbox.
 *
 * It says on a line what there is of it, `name=value` separated by spaces. Then, for each line that it reads, it
 * says how it fares: which signals came, and what others have set of it. At the end of its input it takes its
 * objects away and ends.
 */
#include "attack.h"

#include <linux/keyctl.h>
#include <mqueue.h>
#include <sched.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define SECRET_BYTES 128
#define EVERYBODY 0x3f3f3f3f
#define BEST_EFFORT (2 << 13)

static char secret[SECRET_BYTES] = "?";
static volatile int value = 1;
static volatile sig_atomic_t signals;

static void count(int number) { signals |= number == SIGURG ? 1 : 1 << (number - SIGRTMIN); }

static long make_objects(int key, int *memory, int *queue, int *semaphore)
{
    *memory = shmget(key, 4096, IPC_CREAT | 0600);
    char *at = shmat(*memory, NULL, 0);
    if (at != (void *)-1)
        memcpy(at, secret, SECRET_BYTES);
    struct {
        long kind;
        char bytes[SECRET_BYTES];
    } message = {1, ""};
    memcpy(message.bytes, secret, SECRET_BYTES);
    *queue = msgget(key, IPC_CREAT | 0600);
    msgsnd(*queue, &message, SECRET_BYTES, 0);
    *semaphore = semget(key, 1, IPC_CREAT | 0600);
    struct mq_attr attr = {.mq_maxmsg = 4, .mq_msgsize = SECRET_BYTES};
    mqd_t posix = mq_open("/sandfleet-attack", O_CREAT | O_WRONLY, 0600, &attr);
    if (posix != (mqd_t)-1)
        mq_send(posix, secret, SECRET_BYTES, 0);
    int shared = shm_open("/sandfleet-attack", O_CREAT | O_RDWR, 0600);
    if (shared < 0 || write(shared, secret, SECRET_BYTES) < 0)
        perror("shm_open");
    long serial = syscall(SYS_add_key, "user", "sandfleet-victim", secret, strlen(secret), KEY_SPEC_SESSION_KEYRING);
    if (serial > 0)
        syscall(SYS_keyctl, KEYCTL_SETPERM, serial, EVERYBODY);
    return serial;
}

static void report(int semaphore)
{
    struct rlimit limit;
    cpu_set_t cpus;
    char score[16] = "";
    int fd = open("/proc/self/oom_score_adj", O_RDONLY);
    if (fd >= 0 && read(fd, score, sizeof score - 1) > 0)
        score[strcspn(score, "\n")] = 0;
    close(fd);
    getrlimit(RLIMIT_MSGQUEUE, &limit);
    sched_getaffinity(0, sizeof cpus, &cpus);
    printf("signals=%d value=%d limit=%llu nice=%d scheduler=%d cpus=%d disk=%ld oom=%s semaphore=%d\n", signals, value,
           (unsigned long long)limit.rlim_cur, getpriority(PRIO_PROCESS, 0), sched_getscheduler(0), CPU_COUNT(&cpus),
           syscall(SYS_ioprio_get, 1, 0), score, semctl(semaphore, 0, GETVAL));
    fflush(stdout);
}

int be_victim(void)
{
    int memory, queue, semaphore, key = number("key");
    char line[16];
    snprintf(secret, sizeof secret, "%s", param("secret"));
    setpgid(0, 0);
    syscall(SYS_ioprio_set, 1, 0, BEST_EFFORT | 4);
    struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
    sigaction(SIGURG, &action, NULL);
    for (int number = 1; number < SIGNALS; number++)
        sigaction(SIGRTMIN + number, &action, NULL);
    int file = memfd_create("secret", 0);
    if (file < 0 || write(file, secret, SECRET_BYTES) < 0)
        return 1;
    lseek(file, 0, SEEK_SET);
    long serial = make_objects(key, &memory, &queue, &semaphore);
    printf("pid=%d secret_at=%ld value_at=%ld secret_fd=%d serial=%ld nice=%d\n", getpid(), (long)secret, (long)&value,
           file, serial, getpriority(PRIO_PROCESS, 0));
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        report(semaphore);
    shmctl(memory, IPC_RMID, NULL);
    msgctl(queue, IPC_RMID, NULL);
    semctl(semaphore, 0, IPC_RMID);
    mq_unlink("/sandfleet-attack");
    shm_unlink("/sandfleet-attack");
    return 0;
}
