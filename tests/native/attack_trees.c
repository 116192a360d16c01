/* Trees of processes that do what they can to outlive their container.
 *
 * Each says "up" once it is what it is to be, and then stays. None makes more than MOST processes, and the storm not
 * more than CROWD at a time, so that a test that fails does no harm.
 */
#include "attack.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>

#define MOST 300
#define SOME 40
#define CROWD 500

static int *made;
static pid_t *seats;

static void up(void)
{
    if (write(1, "up\n", 3) < 0)
        _exit(1);
}

static void stay(void)
{
    for (;;)
        pause();
}

static void ignore_all(void)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_IGN);
}

/* Every process forks, for ever, some of them into sessions and groups of their own. */
static void bomb(void)
{
    for (;;) {
        int count = __atomic_add_fetch(made, 1, __ATOMIC_SEQ_CST);
        if (count == SOME)
            up();
        if (count > MOST) {
            __atomic_sub_fetch(made, 1, __ATOMIC_SEQ_CST);
            usleep(10000);
            continue;
        }
        pid_t child = fork();
        if (child < 0)
            __atomic_sub_fetch(made, 1, __ATOMIC_SEQ_CST);
        if (child == 0) {
            if (getpid() % 5 == 0)
                setsid();
            if (getpid() % 7 == 0)
                setpgid(0, 0);
        }
    }
}

/* A place for one more process, as a limit of processes gives it: one that nobody has, or whose process is reaped. */
static int take_seat(void)
{
    for (int look = 0; look < 16; look++) {
        int seat = random() % CROWD;
        pid_t sits = seats[seat];
        int gone = sits == 0 || (sits > 0 && kill(sits, 0) < 0 && errno == ESRCH);
        if (gone && __sync_bool_compare_and_swap(&seats[seat], sits, -1))
            return seat;
    }
    return -1;
}

/* The hardest bomb: all of them fork without a pause, whoever ends is replaced at once, and many end by themselves. */
static void storm(void)
{
    pid_t first = getpid();
    for (;;) {
        int seat = take_seat();
        if (seat >= 0) {
            pid_t child = fork();
            if (child != 0) {
                __sync_bool_compare_and_swap(&seats[seat], -1, child > 0 ? child : 0);
            } else {
                seats[seat] = getpid();
                srandom(getpid());
                if (random() % 3 == 0)
                    setsid();
            }
            if (child == 0 && __atomic_add_fetch(made, 1, __ATOMIC_SEQ_CST) == CROWD)
                up();
        }
        if (getpid() != first && random() % 64 == 0)
            _exit(0);
    }
}

/* Each process is replaced by its child and ends: whoever is looked at is gone. */
static void run_away(void)
{
    for (int runner = 0; runner < 8; runner++)
        if (fork() == 0)
            for (int generation = 0;; generation++) {
                if (generation == SOME && runner == 0)
                    up();
                pid_t child = fork();
                if (child > 0)
                    _exit(0);
                if (child == 0 && generation % 3 == 0)
                    setsid();
            }
    stay();
}

static void orphans(void)
{
    for (int i = 0; i < SOME; i++)
        if (fork() == 0) {
            setsid();
            if (fork() > 0)
                _exit(0);
            clearenv();
            stay();
        }
    for (int i = 0; i < SOME; i++)
        wait(NULL);
    up();
    stay();
}

static void deaf(void)
{
    ignore_all();
    for (int i = 0; i < SOME; i++)
        if (fork() == 0)
            stay();
    up();
    for (;;)
        pause();
}

static void stopped(void)
{
    for (int i = 0; i < SOME; i++)
        if (fork() == 0) {
            setsid();
            raise(SIGSTOP);
            stay();
        }
    up();
    raise(SIGSTOP);
    stay();
}

/* Brothers instead of children. */
static void beside(void)
{
    for (int i = 0; i < SOME; i++)
        if (syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0) == 0)
            stay();
    up();
    stay();
}

/* A reaper of orphans of its own, that does not reap. */
static void reaper(void)
{
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    for (int i = 0; i < SOME; i++)
        if (fork() == 0) {
            if (fork() > 0)
                _exit(0);
            setsid();
            stay();
        }
    up();
    stay();
}

/* A killed process that is traced is not gone before its tracer has looked. Where that is refused, as orphans. */
static void traced(void)
{
    ignore_all();
    for (int i = 0; i < SOME; i++) {
        pid_t child = fork();
        if (child == 0) {
            ptrace(PTRACE_TRACEME, 0, NULL, NULL);
            raise(SIGSTOP);
            stay();
        }
    }
    up();
    stay();
}

/* The first process is a zombie while a thread of it goes on. */
static char stack[65536];

static int thread(void *nothing)
{
    (void)nothing;
    up();
    stay();
    return 0;
}

static void headless(void)
{
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    if (clone(thread, stack + sizeof stack, flags, NULL) < 0)
        _exit(1);
    syscall(SYS_exit, 0);
}

int be_tree(const char *kind)
{
    const struct {
        const char *name;
        void (*be)(void);
    } kinds[] = {
        {"bomb", bomb},     {"run_away", run_away}, {"orphans", orphans}, {"deaf", deaf},         {"stopped", stopped},
        {"beside", beside}, {"reaper", reaper},     {"traced", traced},   {"headless", headless}, {"storm", storm},
    };
    made = mmap(NULL, (CROWD + 1) * sizeof *made, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    seats = made + 1;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kind, kinds[i].name))
            kinds[i].be();
    return 2;
}
