/* Tries to get out of the sandbox that it runs in, one attempt after the other, and tells of each.
 *
 *   attack run name=value ...     every attempt, one JSON object a line: {"name", "errno", "said"}
 *   attack victim name=value ...  what attempts are made on: a process of the same user
 *   attack tree KIND              processes that are hard to end (attack_trees.c)
 *   attack probe FILE · caps · id · ran     what attempts execute, to see what it may do then
 *
 * errno is 0 when an attempt got through as far as it can tell; whether something was reached is judged from outside:
 * by the content that was said, which the program has no other way to know, or by what has changed. It is only to be
 * run in a machine of its own, see tests/integration/attack_machine.py, and refuses to start without its sign.
 */
#include "attack.h"

#include <linux/capability.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/prctl.h>

#define SAID_BYTES 65536
#define PATIENCE_MS 5000

struct told {
    int result;
    size_t length;
    char said[SAID_BYTES];
};

static struct told told;
static char **given;

const char *param(const char *name)
{
    size_t length = strlen(name);
    for (char **one = given; *one; one++)
        if (!strncmp(*one, name, length) && (*one)[length] == '=')
            return *one + length + 1;
    return "";
}

long number(const char *name) { return strtol(param(name), NULL, 0); }

void say_bytes(const void *bytes, size_t length)
{
    size_t room = sizeof told.said - told.length;
    if (length > room)
        length = room;
    memcpy(told.said + told.length, bytes, length);
    told.length += length;
}

void say(const char *format, ...)
{
    char line[4096];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    say_bytes(line, length < (int)sizeof line ? (size_t)length : sizeof line - 1);
}

char *text(const char *format, ...)
{
    char *made = NULL;
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(&made, format, arguments);
    va_end(arguments);
    if (length < 0)
        abort();
    return made;
}

char *outside(const char *name) { return text("%s/%s", param("outside"), name); }
char *own(const char *name) { return text("%s/%s", param("own"), name); }

int show_descriptor(int fd)
{
    char bytes[4096];
    ssize_t length = read(fd, bytes, sizeof bytes);
    if (length < 0)
        return errno;
    say_bytes(bytes, length);
    return 0;
}

int show_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return errno;
    int result = show_descriptor(fd);
    close(fd);
    return result;
}

int write_file(const char *path, int flags, const char *content)
{
    int fd = open(path, flags | O_CLOEXEC, 0644);
    if (fd < 0)
        return errno;
    int result = write(fd, content, strlen(content)) < 0 ? errno : 0;
    close(fd);
    return result;
}

int let_in(long result, int expected)
{
    if (result >= 0)
        return 0;
    if (errno != expected)
        return errno;
    say("let in: %s", strerror(errno));
    return 0;
}

int run_program(const char *path, char *const argv[])
{
    int ends[2];
    if (pipe(ends) < 0)
        return errno;
    pid_t child = fork();
    if (child < 0)
        return errno;
    if (child == 0) {
        dup2(ends[1], 1);
        close(ends[0]);
        close(ends[1]);
        execv(path, argv);
        _exit(errno);
    }
    close(ends[1]);
    char bytes[4096];
    for (ssize_t length; (length = read(ends[0], bytes, sizeof bytes)) > 0;)
        say_bytes(bytes, length);
    close(ends[0]);
    int status;
    if (waitpid(child, &status, 0) < 0)
        return errno;
    return WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
}

static void print_json(const char *name)
{
    printf("{\"name\":\"%s\",\"errno\":%d,\"said\":\"", name, told.result);
    for (size_t i = 0; i < told.length; i++) {
        unsigned char byte = told.said[i];
        if (byte == '"' || byte == '\\' || byte < 32 || byte > 126)
            printf("\\u%04x", byte);
        else
            putchar(byte);
    }
    printf("\"}\n");
    fflush(stdout);
}

/* An attempt in a process of its own: what it does to itself harms none of the others. */
static void apart(const struct attempt *one)
{
    int ends[2];
    told.length = 0;
    told.result = EAGAIN;
    if (pipe2(ends, O_CLOEXEC) < 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(ends[0]);
        told.result = one->act();
        size_t length = offsetof(struct told, said) + told.length;
        for (char *at = (char *)&told; length > 0;) {
            ssize_t part = write(ends[1], at, length);
            if (part <= 0)
                break;
            at += part;
            length -= part;
        }
        _exit(0);
    }
    close(ends[1]);
    char *at = (char *)&told, *end = at + sizeof told;
    struct pollfd waiting = {ends[0], POLLIN, 0};
    told.result = child < 0 ? EAGAIN : ECHILD;
    for (ssize_t part = 1; child > 0 && part > 0 && at < end;) {
        if (poll(&waiting, 1, PATIENCE_MS) <= 0) {
            told.result = ETIMEDOUT;
            break;
        }
        part = read(ends[0], at, end - at);
        at += part > 0 ? part : 0;
    }
    close(ends[0]);
    if (child > 0) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
}

static int run(void)
{
    const struct attempt *groups[] = {
        leak_attempts, metadata_attempts, system_attempts,  program_attempts, process_attempts, memory_attempts,
        ipc_attempts,  socket_attempts,   network_attempts, kernel_attempts,  mount_attempts,   file_attempts,
    };
    if (!*param("sign") || !*param("own"))
        return 2;
    for (size_t group = 0; group < sizeof groups / sizeof *groups; group++)
        for (const struct attempt *one = groups[group]; one->name; one++) {
            if (one->in_first) {
                told.length = 0;
                told.result = one->act();
            } else {
                apart(one);
            }
            print_json(one->name);
        }
    return 0;
}

static int show_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{0}, {0}};
    int has = syscall(SYS_capget, &header, data) == 0 && (data[0].effective || data[1].effective);
    return puts(has ? "capable" : "none") < 0;
}

static int show_descriptors(void)
{
    int count = 0;
    for (int fd = 3; fd < 1024; fd++)
        count += fcntl(fd, F_GETFD) >= 0;
    return printf("it ran, descriptors: %d\n", count) < 0;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    given = argv + (argc > 2 ? 2 : argc);
    if (!strcmp(mode, "run"))
        return run();
    if (!strcmp(mode, "victim"))
        return be_victim();
    if (!strcmp(mode, "tree") && argc > 2)
        return be_tree(argv[2]);
    if (!strcmp(mode, "caps"))
        return show_capabilities();
    if (!strcmp(mode, "id"))
        return printf("euid %d\n", geteuid()) < 0;
    if (!strcmp(mode, "ran"))
        return show_descriptors();
    if (!strcmp(mode, "probe") && argc > 2) {
        int result = show_file(argv[2]);
        fwrite(told.said, 1, told.length, stdout);
        return result;
    }
    return 2;
}
