/* Objects that processes of one user share without a file, terminals, and what a program is born with. */
#include "attack.h"

#include <dirent.h>
#include <linux/keyctl.h>
#include <linux/tiocl.h>
#include <mqueue.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>

extern char **environ;

static int read_shared_memory(void)
{
    int id = shmget(number("key"), 0, 0);
    char *memory = id < 0 ? (void *)-1 : shmat(id, NULL, SHM_RDONLY);
    if (memory == (void *)-1)
        return errno;
    say_bytes(memory, 64);
    return 0;
}

static int take_message(void)
{
    struct {
        long kind;
        char bytes[256];
    } message;
    int id = msgget(number("key"), 0);
    ssize_t length = id < 0 ? -1 : msgrcv(id, &message, sizeof message.bytes, 0, IPC_NOWAIT);
    if (length < 0)
        return errno;
    say_bytes(message.bytes, length);
    return 0;
}

static int move_semaphore(void)
{
    struct sembuf up = {0, 5, IPC_NOWAIT};
    int id = semget(number("key"), 1, 0);
    return id < 0 || semop(id, &up, 1) < 0 ? errno : 0;
}

static int take_posix_message(void)
{
    char bytes[8192];
    mqd_t queue = mq_open("/sandfleet-attack", O_RDONLY | O_NONBLOCK);
    ssize_t length = queue == (mqd_t)-1 ? -1 : mq_receive(queue, bytes, sizeof bytes, NULL);
    if (length < 0)
        return errno;
    say_bytes(bytes, length);
    return 0;
}

static int read_posix_memory(void)
{
    int fd = shm_open("/sandfleet-attack", O_RDONLY, 0);
    return fd < 0 ? errno : show_descriptor(fd);
}

static int read_key_by_number(void)
{
    char bytes[256];
    if (!*param("serial")) {
        say("the victim could make no key");
        return UNAVAILABLE;
    }
    long length = syscall(SYS_keyctl, KEYCTL_READ, number("serial"), bytes, sizeof bytes);
    if (length < 0)
        return errno;
    say_bytes(bytes, length < (long)sizeof bytes ? length : (long)sizeof bytes);
    return 0;
}

static int read_inherited_key(void)
{
    char bytes[256];
    long key = syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_SESSION_KEYRING, "user", "sandfleet-attack", 0);
    long length = key < 0 ? -1 : syscall(SYS_keyctl, KEYCTL_READ, key, bytes, sizeof bytes);
    if (length < 0)
        return errno;
    say_bytes(bytes, length < (long)sizeof bytes ? length : (long)sizeof bytes);
    return 0;
}

static int make_keyring(void) { return syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 ? errno : 0; }

static int add_key(void)
{
    return syscall(SYS_add_key, "user", "attack", "x", 1L, KEY_SPEC_PROCESS_KEYRING) < 0 ? errno : 0;
}

static int type_into(const char *path, const char *line)
{
    int fd = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    for (const char *at = line; *at; at++)
        if (ioctl(fd, TIOCSTI, at) < 0)
            return errno;
    return 0;
}

static int type_into_terminal(void) { return type_into("/dev/tty", "type_into_terminal\n"); }
static int type_into_others_terminal(void) { return type_into(param("terminal"), "type_into_others_terminal\n"); }

static int write_to_others_terminal(void)
{
    return write_file(param("terminal"), O_WRONLY | O_NOCTTY, "write_to_others_terminal\n");
}

/* Only asks which console is in front. */
static int use_console(void)
{
    char request = TIOCL_GETFGCONSOLE;
    int fd = open("/dev/tty0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    return fd < 0 || ioctl(fd, TIOCLINUX, &request) < 0 ? errno : 0;
}

const struct attempt ipc_attempts[] = {
    {"read_shared_memory", read_shared_memory, 0},
    {"take_message", take_message, 0},
    {"move_semaphore", move_semaphore, 0},
    {"take_posix_message", take_posix_message, 0},
    {"read_posix_memory", read_posix_memory, 0},
    {"read_key_by_number", read_key_by_number, 0},
    {"read_inherited_key", read_inherited_key, 0},
    {"make_keyring", make_keyring, 0},
    {"add_key", add_key, 0},
    {"type_into_terminal", type_into_terminal, 1},
    {"type_into_others_terminal", type_into_others_terminal, 0},
    {"write_to_others_terminal", write_to_others_terminal, 0},
    {"use_console", use_console, 0},
    {0},
};

/* Whatever is open beyond input, output and errors. */
static int inherit_descriptor(void)
{
    int result = EBADF;
    for (int fd = 3; fd < 1024; fd++) {
        if (fcntl(fd, F_GETFD) < 0)
            continue;
        say("%d:", fd);
        lseek(fd, 0, SEEK_SET);
        result = 0;
        show_descriptor(fd);
    }
    return result;
}

static int inherit_environment(void)
{
    for (char **one = environ; *one; one++)
        say("%s\n", *one);
    return 0;
}

static int inherit_signals(void)
{
    sigset_t blocked;
    struct sigaction now;
    int result = ENODATA;
    sigprocmask(SIG_SETMASK, NULL, &blocked);
    for (int number = 1; number < 32; number++) {
        int odd = sigismember(&blocked, number) > 0;
        odd |= sigaction(number, NULL, &now) == 0 && now.sa_handler == SIG_IGN;
        if (!odd)
            continue;
        say("%d ", number);
        result = 0;
    }
    return result;
}

static int inherit_terminal(void) { return open("/dev/tty", O_RDWR | O_CLOEXEC) < 0 ? errno : 0; }

static int dump_core(void)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_CORE, &limit) == 0 && limit.rlim_max > 0 ? 0 : EPERM;
}

static int inherit_mask(void)
{
    mode_t mask = umask(022);
    say("%o", mask);
    return mask == 022 ? ENODATA : 0;
}

const struct attempt leak_attempts[] = {
    {"inherit_descriptor", inherit_descriptor, 1},
    {"inherit_environment", inherit_environment, 1},
    {"inherit_signals", inherit_signals, 1},
    {"inherit_mask", inherit_mask, 1},
    {"inherit_terminal", inherit_terminal, 1},
    {"dump_core", dump_core, 1},
    {0},
};
